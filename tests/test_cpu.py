"""Packed layers on a CPU: int8 activations and few tokens, each against its plain form."""

from functools import lru_cache

import pytest
import torch

import terdit
from terdit import Config, DiT, PackedTernaryLinear, in_dtype, int8_linear_plain, load_model
from terdit import pack_model, pack_ternary, packed_linear, packed_linear_plain, save_checkpoint
from tests.helpers import SMALL, awake

compiles = terdit.cpu_kernel()
needs_compiler = pytest.mark.skipif(not compiles, reason="kernel.cu's CPU part does not compile")


def case(M, N, K, dtype=torch.float32, bias=True):
    x = (torch.randn(M, K) * 3).to(dtype)
    codes = torch.randint(-1, 2, (N, K))
    b = torch.randn(N) if bias else None
    return x, codes, torch.tensor([-0.031]), b


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield lambda: torch.set_num_threads(1)
    torch.set_num_threads(threads)


# int8 ---------------------------------------------------------------------------------------------


def test_by_hand():
    # max|x| = 2, so a level is 2/127: 1.0 is 63.5 levels, half to even 64; -0.5 is -31.75.
    x = torch.tensor([[2.0, 1.0, -0.5, 0.0]])
    codes = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
    bias = torch.tensor([0.0, 0.0, 1.0, 5.0])
    y = int8_linear_plain(x, pack_ternary(codes), torch.tensor([127.0]), bias)
    want = torch.tensor([[(127 + 64 - 32) * 2.0, 64 * 2.0, 32 * 2.0 + 1, 5.0]])
    assert torch.equal(y.float(), want.bfloat16().float())


@pytest.mark.parametrize("M, N, K", [(1, 8, 5), (3, 64, 48), (40, 128, 333), (2, 4096, 1040)])
def test_against_the_exact_product_of_rounded_activations(M, N, K):
    x, codes, alphas, b = case(M, N, K)
    greatest = x.abs().amax(1, keepdim=True)
    levels = (x * (torch.full_like(greatest, 127) / greatest)).round()
    rounded = levels.double() * (greatest / 127).double()
    want = rounded @ codes.double().T * alphas.double() + b.double()
    got = int8_linear_plain(x, pack_ternary(codes), alphas, b)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max()  # rounded once, to bf16


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", [(17, 8, 5), (19, 64, 48), (40, 128, 333), (3000, 3072, 100)])
def test_the_fast_form_gives_the_bits_of_the_plain_one(M, N, K, dtype, bias):
    x, codes, alphas, b = case(M, N, K, dtype, bias)
    x[0] = 0  # a token without a greatest value
    packed = pack_ternary(codes)
    want = int8_linear_plain(x, packed, alphas, b)
    assert torch.equal(packed_linear(x, packed, alphas, b, torch.int8), want)
    views = (x.t().contiguous().t(), packed.t().contiguous().t())  # other strides
    assert torch.equal(packed_linear(*views, alphas, b, torch.int8), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_named(bad):
    x, codes, alphas, b = case(20, 8, 16)
    x[2, 3] = bad
    for linear in (int8_linear_plain, terdit.int8_linear):
        with pytest.raises(ValueError, match="activations are not finite"):
            linear(x, pack_ternary(codes), alphas, b)


@needs_compiler
@torch.no_grad()
def test_results_do_not_depend_on_threads_or_batch(one_thread):
    x, codes, alphas, b = case(37, 256, 512)
    packed = pack_ternary(codes)
    for linear in (terdit.int8_linear, terdit.small_rows):
        want = linear(x, packed, alphas, b)
        assert torch.equal(torch.cat([linear(row[None], packed, alphas, b) for row in x]), want)
        one_thread()
        assert torch.equal(linear(x, packed, alphas, b), want)


# Few tokens ---------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M, N, K", [(1, 8, 5), (4, 1152, 192), (7, 128, 333), (8, 4096, 1040)])
def test_few_tokens_are_exact_to_fp32(M, N, K, bias):
    x, codes, alphas, b = case(M, N, K, bias=bias)
    want = x.double() @ codes.double().T * alphas.double() + (b.double() if bias else 0)
    for dtype in (torch.float32, torch.int8):  # whatever the product dtype
        got = packed_linear(x, pack_ternary(codes), alphas, b, dtype)
        assert got.dtype == torch.float32
        assert (got.double() - want).abs().max() <= 3e-6 * want.abs().max()


def test_wrong_widths_are_refused():
    x, codes, alphas, b = case(3, 8, 16)
    with pytest.raises(ValueError, match=r"x of \(M, 16\) wanted, got \(3, 15\)"):
        packed_linear(x[:, 1:], pack_ternary(codes), alphas, b, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_no_tokens(dtype):
    layer = PackedTernaryLinear(16, 8).requires_grad_(False)
    layer.product_dtype = dtype
    for x in (torch.empty(0, 16), torch.empty(2, 0, 16)):
        assert layer(x).shape == (*x.shape[:-1], 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_without_a_compiler(monkeypatch, tmp_path, dtype):
    x, codes, alphas, b = case(3, 64, 48)
    packed = pack_ternary(codes)
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'In kernel.cu:\n9: error: no OpenMP here' >&2\nexit 1\n")
    broken.chmod(0o755)
    want = packed_linear_plain(x, packed, alphas, b)
    if dtype == torch.int8:
        want = int8_linear_plain(x, packed, alphas, b)
    for compiler, reason in (("no-such-g++", "no-such-g"), (str(broken), "no OpenMP here")):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(terdit, "cpu_kernel", lru_cache(terdit.cpu_kernel.__wrapped__))
        message = f"CPU part is not used .*{reason}.* plain PyTorch"
        with pytest.warns(UserWarning, match=message) as seen:
            for _ in range(2):
                assert torch.equal(packed_linear(x, packed, alphas, b, dtype), want)
        assert len(seen) == 1


# Whole models -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.03), (torch.int8, 0.05)])
def test_a_model_in_another_dtype_is_near_fp32(tmp_path, dtype, most):
    model = awake(DiT(Config(**SMALL | dict(dim=96, qk_norm=True, input_size=16))))
    t = torch.tensor([3, 900, 400, 20])
    inputs = (torch.randn(4, 3, 16, 16), t, torch.tensor([0, 5, 1, 2]))
    want = model(*inputs)
    save_checkpoint(tmp_path / "packed.pt", pack_model(model))
    loaded = load_model(tmp_path / "packed.pt", dtype=dtype)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())  # only products differ
    got = loaded(*inputs)
    assert got.dtype == torch.float32
    assert 1e-4 < (got - want).norm() / want.norm() < most


def test_adaln_stays_in_fp32_under_int8():
    model = in_dtype(DiT(Config(**SMALL), packed=True), torch.int8)
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            is_adaln = "adaLN" in name
            assert module.product_dtype == (torch.float32 if is_adaln else torch.int8), name
            assert module.is_adaln == is_adaln, name  # whatever the batch: the same bits
    with pytest.raises(ValueError, match="int8 is for ternary weights"):
        in_dtype(DiT(Config(**SMALL, ternary=False)), torch.int8)
