"""kernel.cu without a GPU (its own source, run on the CPU), its compilation by nvcc, and the paths of packed layers."""

import ctypes
import re
import shutil
import subprocess
import sys
import warnings
from functools import lru_cache

import pytest
import torch

import terdit
from terdit import KERNELS, launch_kernel, pack_ternary, packed_linear, packed_linear_plain
from tests.conftest import ROOT

HALF = (torch.bfloat16, torch.float16)


def compile_emulation(source, folder):
    library = folder / "kernel.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DCPU_EMULATION", f"-I{ROOT}", "-x", "c++"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++: kernel.cu is not run")
    return compile_emulation(ROOT / "kernel.cu", tmp_path_factory.mktemp("kernel"))


def case(M, N, K, dtype, bias=True):
    """Small integers, few of them not 0: every product and sum is exact, and so is the result in 16 bits."""
    codes = torch.randint(-1, 2, (N, K))
    x = (torch.randint(-2, 3, (M, K)) * (torch.rand(M, K) < 24 / K)).to(dtype)
    b = torch.randint(-8, 9, (N,)).to(dtype) if bias else None
    want = 2 * x.double() @ codes.double().T + (b.double() if bias else 0)
    return x, pack_ternary(codes), torch.tensor([2.0]), b, want


# kernel, tokens of the tile, M, N, K: tails of M, N (rows of a tile, quarters of it) and K (of a load, a stage, the ring)
CASES = [
    ("naive", 0, 3, 20, 7),
    ("naive", 0, 17, 128, 100),
    ("few", 0, 1, 32, 16),
    ("few", 0, 2, 96, 1040),
    ("few", 0, 8, 128, 64),
    ("few", 0, 13, 64, 592),
    ("mma", 32, 33, 128, 128),
    ("mma", 64, 17, 96, 272),
    ("mma", 128, 130, 160, 400),
    ("wgmma", 48, 50, 128, 144),
    ("wgmma", 64, 70, 160, 656),
    ("wgmma", 64, 128, 256, 896),
    ("wgmma", 96, 100, 288, 128),
    ("wgmma", 128, 130, 384, 1168),
]


@pytest.mark.parametrize("mode", ["", "copies", "math"], ids=["early", "late copies", "late math"])
@pytest.mark.parametrize("kernel, tokens, M, N, K", CASES)
def test_kernels_exactly(emulation, monkeypatch, kernel, tokens, M, N, K, mode):
    """Background work done at once, or as late as the kernel's waits allow."""
    if mode and kernel in ("naive", "few"):
        pytest.skip("has no background work")
    monkeypatch.setenv("EMULATION", mode)
    for dtype in HALF:
        *args, want = case(M, N, K, dtype)
        exact = torch.equal(launch_kernel(emulation, *args, kernel, tokens).double(), want)
        assert exact, dtype


@pytest.mark.parametrize("capability, kernels", [("8", ("few", "mma")), ("9", ("few", "wgmma"))])
def test_automatic_choice(emulation, monkeypatch, capability, kernels):
    monkeypatch.setenv("EMULATION_CC", capability)
    for M in (1, 16, 17, 60):
        *args, want = case(M, 96, 192, torch.bfloat16, bias=False)
        got = launch_kernel(emulation, *args)
        assert torch.equal(got.double(), want)
        assert torch.equal(got, launch_kernel(emulation, *args, kernels[M > 16]))
    *args, want = case(5, 36, 24, torch.bfloat16)  # fits no tile
    assert torch.equal(launch_kernel(emulation, *args).double(), want)


def test_rounding(emulation):
    """Random data: fp32 sums, one rounding at the end."""
    for dtype, eps in zip(HALF, (2**-8, 2**-11)):
        codes, x = torch.randint(-1, 2, (64, 512)), torch.randn(20, 512).to(dtype)
        want = 0.02 * x.double() @ codes.double().T
        for kernel in KERNELS:
            if kernel != "few":
                got = launch_kernel(emulation, x, pack_ternary(codes), torch.tensor([0.02]), None, kernel)
                assert (got.double() - want).norm() / want.norm() < eps


# Deliberate mistakes in kernel.cu that the cases above must notice: an emulation that finds none proves nothing.
MISTAKES = {
    "waits for one copy too few": ("cp_async_wait<2>();\n    __syncthreads();  //", "cp_async_wait<3>();\n    __syncthreads();  //", "mma"),
    "no barrier in the loop": ("cp_async_wait<2>();\n    __syncthreads();", "cp_async_wait<2>();", "mma"),
    "overwrites registers of a running wgmma": ("wgmma_wait<2>", "wgmma_wait<4>", "wgmma"),
    "stages signalled by half of the warps": ("barrier_init(&empty[s], 4 * WG)", "barrier_init(&empty[s], 2 * WG)", "wgmma"),
    "gives a stage back while a wgmma reads it": ("if (s == 1) barrier_arrive_if", "if (s == 0) barrier_arrive_if", "wgmma"),
    "ignores the swizzle": ("(s ^ g) * 16", "s * 16", "wgmma"),
    "quarters in another order": ("a[q / 2][2 * i + q % 2]", "a[q % 2][2 * i + q / 2]", "few"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulation_finds(emulation, tmp_path, monkeypatch, mistake):
    right, wrong, name = MISTAKES[mistake]
    source = (ROOT / "kernel.cu").read_text()
    assert source.count(right) == 1
    (tmp_path / "kernel.cu").write_text(source.replace(right, wrong))
    library = compile_emulation(tmp_path / "kernel.cu", tmp_path)
    found = False
    for kernel, tokens, M, N, K in CASES:
        for mode in ("", "copies", "math") if kernel == name and not found else ():
            monkeypatch.setenv("EMULATION", mode)
            *args, want = case(M, N, K, torch.bfloat16)
            try:
                found |= not torch.equal(launch_kernel(library, *args, kernel, tokens).double(), want)
            except terdit.KernelError:  # a deadlock
                found = True
    assert found


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc(tmp_path, arch):
    """kernel.cu compiles for Ampere and Hopper; no registers spill, and ptxas finds no wgmma that it must serialize."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: kernel.cu is not compiled for GPUs")
    flags = [
        "-O3",
        "-std=c++17",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xptxas",
        "-v",
        "-Xcompiler",
        "-fPIC",
    ]
    command = ["nvcc", *flags, "-shared", str(ROOT / "kernel.cu"), "-o", str(tmp_path / "kernel.so")]
    log = subprocess.run(command, capture_output=True, text=True)
    assert log.returncode == 0, log.stderr
    text = log.stdout + log.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", text)]
    assert len(spills) > 10 and not any(spills), text
    assert not re.findall(r"warning|C7\d{3}", text), text


def test_launch_refuses(emulation):
    x, w, a, b, _ = case(4, 32, 64, torch.bfloat16)
    for args, message in [
        ((x.float(), w, a, b), "float32"),
        ((x[:, :32], w, a, b), r"weight of \[\(8, 32\).* got \[\(8, 64\)"),
        ((x, w.to(torch.int8), a, b), "got .*int8"),
        ((x, w, a.bfloat16(), b), "alphas of .*float32.* got .*bfloat16"),
        ((x, w, a, b.float()), "bias of"),
        ((x, w, a, b[:8]), "bias of"),
    ]:
        with pytest.raises(ValueError, match=message):
            launch_kernel(emulation, *args)
    with pytest.raises(ValueError, match="M=17"):
        launch_kernel(emulation, *case(17, 32, 64, torch.bfloat16)[:4], "few")
    with pytest.raises(ValueError, match="tokens 50"):
        launch_kernel(emulation, x, w, a, b, "mma", 50)
    assert launch_kernel(emulation, x[:0], w, a, b).shape == (0, 32)


def test_launch_of_views(emulation):
    """Strided or misaligned tensors are copied, never misread."""
    x, w, a, b, want = case(4, 32, 64, torch.bfloat16)
    wide = torch.zeros(4, 67, dtype=x.dtype)
    wide[:, 3:] = x
    shifted = torch.zeros(w.numel() + 1, dtype=torch.uint8)
    shifted[1:] = w.flatten()
    odd = shifted[1:].view_as(w)
    assert odd.data_ptr() % 16
    assert torch.equal(launch_kernel(emulation, wide[:, 3:], odd, a, b).double(), want)


# ----------------------------------------------------------------------------------------------------------------------
# Packed layers on the CPU


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 192, 512), (7, 8192, 1040)])  # the last is widened in several blocks
def test_blocks_against_plain(shape):
    M, N, K = shape
    codes, alphas = torch.randint(-1, 2, (N, K)), torch.tensor([-0.031])
    packed = pack_ternary(codes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (None, torch.randn(N).to(dtype)):
            x = torch.randn(M, K).to(dtype)
            got, plain = (f(x, packed, alphas, bias) for f in (packed_linear, packed_linear_plain))
            want = alphas.double() * (x.double() @ codes.double().T) + (0 if bias is None else bias.double())
            error = lambda y: ((y.double() - want).norm() / want.norm()).item()
            if dtype == torch.float32:
                assert (got - plain).abs().max() <= 1e-6 * plain.abs().max()
            else:
                assert got.dtype == dtype and error(got) < torch.finfo(dtype).eps / 2
                assert error(got) <= 1.05 * error(plain)  # alpha in fp32 rounds once less


def test_widening():
    """kernel.cu's part for CPUs, as g++ compiles it here, against PyTorch and against the codes themselves."""
    if sys.platform == "darwin" or not shutil.which("g++"):
        pytest.skip("no g++ with OpenMP: widened by PyTorch alone")
    assert terdit.cpu_kernel()
    codes = torch.randint(-1, 2, (20, 333))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want = 2 * codes.to(dtype)
        x, alphas = torch.eye(333, dtype=dtype), torch.ones(1)
        fast, plain = (torch.empty(4, 5, 333, dtype=dtype) for _ in range(2))
        terdit.widen(terdit.cpu_kernel(), pack_ternary(codes), fast)
        terdit.widen_plain(pack_ternary(codes), plain)
        assert torch.equal(fast.flatten(0, 1), want) and torch.equal(plain.flatten(0, 1), want)
        assert torch.equal(packed_linear(x, pack_ternary(codes), alphas, None), codes.T.to(dtype))


def test_without_a_compiler(monkeypatch, tmp_path):
    """PyTorch widens the weights then, and one warning names the reason."""
    *args, want = case(3, 64, 48, torch.bfloat16)
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'kernel.cu: no OpenMP here' >&2\nexit 1\n")
    broken.chmod(0o755)
    for compiler, reason in (("no-such-compiler", "no-such-compiler"), (f"{broken} -v", "no OpenMP here")):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(terdit, "cpu_kernel", lru_cache(terdit.cpu_kernel.__wrapped__))
        terdit._announce.cache_clear()
        with pytest.warns(UserWarning, match=f"CPU part is not used .*{reason}.* widened by PyTorch") as seen:
            assert all(torch.equal(packed_linear(*args).double(), want) for _ in range(2))
        assert len(seen) == 1


def test_blocks_refuse():
    """Pointers are behind them: what is no weight must not get there."""
    x, weight, alphas, _, _ = case(3, 64, 48, torch.bfloat16)
    for wrong in (weight.long(), weight.float(), weight.to("meta")):
        with pytest.raises(ValueError, match="weight of uint8 on cpu wanted, got"):
            packed_linear(x, wrong, alphas, None)


def test_shapes_of_x():
    packed, alphas = pack_ternary(torch.randint(-1, 2, (8, 16))), torch.ones(1)
    for shape in [(16,), (0, 16), (2, 0, 16), (2, 3, 5, 16)]:
        assert packed_linear(torch.randn(shape), packed, alphas, None).shape == (*shape[:-1], 8)
    x = torch.randn(16, 6).t()  # strided
    assert torch.allclose(
        packed_linear(x, packed, alphas, None), packed_linear_plain(x, packed, alphas, None), atol=1e-5
    )


def test_little_memory():
    """A layer of 9 MB packed (dense bf16: 75 MB) runs within 16 MB of what is not input or output."""
    x, packed, alphas = torch.randn(2, 4096).bfloat16(), torch.zeros(2304, 4096, dtype=torch.uint8), torch.ones(1)
    packed_linear(x, packed, alphas, None)  # makes the scratch, which stays
    with torch.profiler.profile(profile_memory=True) as profile:
        packed_linear(x, packed, alphas, None)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0 and 6e6 < len(terdit._scratch.bytes) + peak < 16e6


def test_operator():
    """What torch.compile needs: schema, a fake implementation that agrees, no hidden aliases; and one graph."""
    args = torch.randn(3, 16), pack_ternary(torch.randint(-1, 2, (8, 16))), torch.ones(1), torch.randn(8)
    torch.library.opcheck(torch.ops.terdit.packed_linear.default, args)
    layer = terdit.PackedTernaryLinear(16, 8).requires_grad_(False)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(args[0]), layer(args[0]))


def test_layer_with_gradients():
    """Where a gradient is wanted, the path that has one runs."""
    layer = terdit.PackedTernaryLinear(16, 8).requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    layer.bias = torch.nn.Parameter(torch.zeros(8))
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 3.0))
    assert torch.allclose(x.grad, terdit.unpack_ternary(layer.weight).float().sum(0).expand(3, 16))
    with pytest.raises(ValueError, match=r"x of \(..., 16\) wanted"):
        layer(torch.randn(3, 17))


def test_environment(monkeypatch):
    assert terdit.packed_path("cpu", torch.bfloat16) == "blocks"
    assert terdit.packed_path("cpu", torch.float64) == "plain"
    monkeypatch.setenv("TERDIT_KERNEL", "off")
    assert terdit.packed_path("cpu", torch.bfloat16) == "plain"
    monkeypatch.setenv("TERDIT_KERNEL", "mma:64")
    assert terdit.forced_kernel() == ("mma", 64)
    for wrong in ("fast", "mma:x"):
        monkeypatch.setenv("TERDIT_KERNEL", wrong)
        with pytest.raises(ValueError, match="expected off, auto, naive"):
            terdit.forced_kernel()


def test_through_the_layer(emulation, monkeypatch):
    """PackedTernaryLinear on the kernel's path, with the emulation in the GPU's place; and what it says when it can't."""
    monkeypatch.setattr(terdit, "packed_path", lambda *a: "kernel")
    monkeypatch.setattr(terdit, "cuda_kernel", lambda device: emulation)
    for N, K, remark in [(64, 48, None), (36, 40, "36x40 fits no tile of kernel.cu")]:
        x, weight, alphas, bias, want = case(6, N, K, torch.bfloat16)
        layer = terdit.PackedTernaryLinear(K, N, bias=True).requires_grad_(False)
        layer.weight, layer.alphas.data, layer.bias.data = weight, alphas, bias
        terdit._announce.cache_clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert torch.equal(layer(x.view(2, 3, K)).double(), want.view(2, 3, N))
        assert [remark in str(w.message) for w in seen] == [True] * bool(remark)

    def fails(*args):
        return 999

    monkeypatch.setattr(
        terdit, "cuda_kernel", lambda device: type("library", (), {"ternary_linear": staticmethod(fails)})
    )
    with pytest.warns(UserWarning, match="error 999 .*unpack in plain PyTorch"):
        assert torch.equal(layer(x).double(), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_once():
    terdit.cuda_kernel.cache_clear()
    terdit._announce.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [terdit.packed_path("cuda", torch.bfloat16) for _ in range(3)] == ["plain"] * 3
    assert len(seen) == 1 and "kernel.cu is not used (" in str(seen[0].message)
    terdit.cuda_kernel.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


REAL = [("auto", 0, M, N, K) for M in (1, 2, 16, 17, 511, 1000) for N, K in [(9216, 1024), (1536, 4096), (3072, 3072)]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("cases", [CASES, REAL], ids=["small", "real"])
def test_gpu(cases):
    library, major = terdit.cuda_kernel(torch.device("cuda")), torch.cuda.get_device_capability()[0]
    assert library, "kernel.cu did not build"
    for kernel, tokens, M, N, K in cases:
        for dtype in HALF if kernel != "wgmma" or major == 9 else ():
            *args, want = (z.cuda() for z in case(M, N, K, dtype))
            torch.full((M, N), float("nan"), dtype=dtype, device="cuda")  # the allocator hands this memory out again
            got = launch_kernel(library, *args, kernel, tokens)
            exact = torch.equal(got.double(), want) and torch.equal(got, launch_kernel(library, *args, kernel, tokens))
            assert exact, (kernel, tokens, M, N, K, dtype)
