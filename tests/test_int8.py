"""Activations in int8: the plain form against the definition, and the fast form against the plain one, to the bit."""

import subprocess
import sys
from functools import lru_cache

import pytest
import torch

import sample
import terdit
from terdit import Config, DiT, int8_linear, int8_linear_plain, load_model, pack_model, pack_ternary, save_checkpoint
from tests.conftest import ROOT
from tests.helpers import SMALL, awake

needs_compiler = pytest.mark.skipif(not terdit.cpu_kernel(), reason="kernel.cu's CPU part does not compile here")


def case(M, N, K, dtype=torch.float32, bias=True):
    x = (torch.randn(M, K) * 3).to(dtype)
    codes = torch.randint(-1, 2, (N, K))
    b = torch.randn(N) if bias else None
    return x, codes, torch.tensor([-0.031]), b


def test_by_hand():
    # max|x| = 2, so a level is 2/127: 1.0 is 63.5 levels, half to even 64; -0.5 is -31.75, 32 below zero.
    x = torch.tensor([[2.0, 1.0, -0.5, 0.0]])
    codes = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
    y = int8_linear_plain(x, pack_ternary(codes), torch.tensor([127.0]), torch.tensor([0.0, 0.0, 1.0, 5.0]))
    want = torch.tensor([[(127 + 64 - 32) * 2.0, 64 * 2.0, 32 * 2.0 + 1, 5.0]])
    assert torch.equal(y.float(), want.bfloat16().float())


@pytest.mark.parametrize("M, N, K", [(1, 8, 5), (3, 64, 48), (40, 128, 333), (2, 4096, 1040)])
def test_against_the_exact_product_of_rounded_activations(M, N, K):
    x, codes, alphas, b = case(M, N, K)
    greatest = x.abs().amax(1, keepdim=True)
    rounded = (x * (torch.full_like(greatest, 127) / greatest)).round().double() * (greatest / 127).double()
    want = rounded @ codes.double().T * alphas.double() + b.double()
    got = int8_linear_plain(x, pack_ternary(codes), alphas, b)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max()  # rounded once, to bf16


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", [(1, 8, 5), (3, 64, 48), (40, 128, 333), (7, 12, 1), (600, 3072, 1000)])
def test_fast_equals_plain(M, N, K, dtype, bias):
    x, codes, alphas, b = case(M, N, K, dtype, bias)
    x[0] = 0  # a row without a greatest value
    packed = pack_ternary(codes)
    assert torch.equal(int8_linear(x, packed, alphas, b), int8_linear_plain(x, packed, alphas, b))
    views = (x.t().contiguous().t(), packed.t().contiguous().t())
    assert torch.equal(int8_linear(*views, alphas, b), int8_linear_plain(x, packed, alphas, b))


@needs_compiler
def test_several_blocks(monkeypatch):
    x, codes, alphas, b = case(5, 64, 32)
    want = int8_linear_plain(x, pack_ternary(codes), alphas, b)
    for block_bytes in (1, 700, 4 * 32 * 3):
        monkeypatch.setattr(terdit, "BLOCK_BYTES", block_bytes)
        assert torch.equal(int8_linear(x, pack_ternary(codes), alphas, b), want)


@pytest.mark.parametrize("linear", [int8_linear_plain, pytest.param(int8_linear, marks=needs_compiler)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_named(linear, bad):
    x, codes, alphas, b = case(4, 8, 16)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="activations are not finite"):
        linear(x, pack_ternary(codes), alphas, b)


def test_shapes_that_cublaslt_refuses_go_another_way(monkeypatch):
    """On a GPU torch._int_mm wants more than 16 rows, and K and N in eights. A stand-in for a GPU tensor says so."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    def refused(a, b):
        raise RuntimeError("self.size(0) needs to be greater than 16")

    monkeypatch.setattr(terdit, "has_int_mm", lambda kind: True)
    monkeypatch.setattr(torch, "_int_mm", refused)
    a = torch.randint(-127, 128, (4, 16), dtype=torch.int8)
    b = torch.randint(-1, 2, (16, 24), dtype=torch.int8)
    want = a.long() @ b.long()
    assert torch.equal(terdit.integer_matmul(a.as_subclass(OnGpu), b).long(), want)


@needs_compiler
def test_pointers_are_checked():
    x, codes, alphas, b = case(3, 64, 48)
    for wrong in (pack_ternary(codes).long(), pack_ternary(codes).to("meta")):
        with pytest.raises(ValueError, match="weight of uint8 on cpu wanted, got"):
            int8_linear(x, wrong, alphas, b)


def test_without_int_mm(monkeypatch):
    """Where torch's integer matmul is missing or wrong, fp32 gives the same sums; one warning says so."""
    x, codes, alphas, b = case(3, 64, 48)
    want = int8_linear_plain(x, pack_ternary(codes), alphas, b)

    def wrong(a, b):
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", wrong)
    monkeypatch.setattr(terdit, "has_int_mm", lru_cache(terdit.has_int_mm.__wrapped__))
    terdit.announce_once.cache_clear()
    with pytest.warns(UserWarning, match="_int_mm does not work on this cpu") as seen:
        for _ in range(2):
            assert torch.equal(int8_linear_plain(x, pack_ternary(codes), alphas, b), want)
    assert len(seen) == 1


def test_without_a_compiler(monkeypatch, tmp_path):
    x, codes, alphas, b = case(3, 64, 48)
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'kernel.cu: no OpenMP here' >&2\nexit 1\n")
    broken.chmod(0o755)
    for compiler, reason in (("no-such-compiler", "no-such-compiler"), (f"{broken} -v", "no OpenMP here")):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(terdit, "cpu_kernel", lru_cache(terdit.cpu_kernel.__wrapped__))
        terdit.announce_once.cache_clear()
        with pytest.warns(UserWarning, match=f"CPU part is not used .*{reason}.* plain PyTorch") as seen:
            for _ in range(2):
                got = terdit.packed_linear(x, pack_ternary(codes), alphas, b, torch.int8)
                assert torch.equal(got, int8_linear_plain(x, pack_ternary(codes), alphas, b))
        assert len(seen) == 1


def test_int16_is_finer():
    x, codes, alphas, b = case(6, 64, 512)
    want = x.double() @ codes.double().T * alphas.double() + b.double()
    errors = {}
    for dtype in (torch.int8, torch.int16):
        got = terdit.packed_linear(x.view(2, 3, 512), pack_ternary(codes), alphas, b, dtype)
        assert got.shape == (2, 3, 64)
        errors[dtype] = (got.view(6, 64).double() - want).norm() / want.norm()
    assert errors[torch.int16] < 0.5 * errors[torch.int8] and errors[torch.int16] < 2e-3  # bf16's rounding is left
    remainder = terdit.int8_remainder(x)
    assert (remainder.abs() <= x.abs().amax(1, keepdim=True) / 253).all()  # half a level
    model = DiT(Config(**SMALL), packed=True)
    model.set_product_dtype(torch.int8)
    block = model.layers[0]
    assert block.adaLN_modulation[1].product_dtype == torch.int16 and block.attention.wq.product_dtype == torch.int8


# Whole models ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_in_int8_is_near_fp32(tmp_path):
    model = awake(DiT(Config(**SMALL | dict(dim=96, qk_norm=True))))
    inputs = (torch.randn(4, 3, 8, 8), torch.tensor([3, 900, 400, 20]), torch.tensor([0, 5, 1, 2]))
    want = model(*inputs)
    save_checkpoint(tmp_path / "packed.pt", pack_model(model))
    save_checkpoint(tmp_path / "latents.pt", model)
    outs = []
    for name in ("packed.pt", "latents.pt"):
        loaded = load_model(tmp_path / name, dtype=torch.int8)
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
        outs.append(loaded(*inputs))
    assert torch.equal(outs[0], outs[1])
    assert 1e-4 < (outs[0] - want).norm() / want.norm() < 0.05
    save_checkpoint(tmp_path / "full.pt", DiT(Config(**SMALL, ternary=False)))
    with pytest.raises(ValueError, match="int8 is for ternary weights"):
        load_model(tmp_path / "full.pt", dtype=torch.int8)


@needs_compiler
@torch.no_grad()
def test_int8_layers_do_not_depend_on_threads_or_batch():
    x, codes, alphas, b = case(37, 256, 512)
    packed = pack_ternary(codes)
    want = int8_linear(x, packed, alphas, b)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(int8_linear(x, packed, alphas, b), want)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([int8_linear(row[None], packed, alphas, b) for row in x]), want)


def test_the_default_is_int8_for_ternary_latents_where_the_cpu_has_it(monkeypatch):
    flags = sample.Path("/proc/cpuinfo").read_text().split()
    latents = Config(vae="x")
    want = "int8" if {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags) else "fp32"
    assert sample.default_dtype("cpu", latents) == want
    assert sample.default_dtype("cpu", Config(**SMALL)) == "fp32"
    assert sample.default_dtype("cpu", Config(vae="x", ternary=False, adaln_norm=False)) == "fp32"
    assert sample.default_dtype("cuda", latents) == "bf16"


def test_sample_in_int8_says_how(tmp_path):
    save_checkpoint(tmp_path / "m.pt", pack_model(awake(DiT(Config(**SMALL)))))
    command = [sys.executable, ROOT / "sample.py", "--ckpt", tmp_path / "m.pt", "--dtype", "int8", "--n", "2"]
    command += ["--sampler", "dpm", "--steps", "3", "--out", tmp_path / "x.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "packed layers run by" in done.stdout and ", int8" in done.stdout
