"""kernel.cu without a GPU (its own source, run on the CPU), its compilation by nvcc, and the paths of packed layers."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
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


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


# kernel, tokens of the tile, M, N, K. The sizes leave remainders of M, of N (rows of a tile, quarters of it) and of K
# (columns of a load, of a slice, of the ring).
CASES = [
    ("naive", 0, 3, 20, 7),
    ("naive", 0, 17, 128, 100),
    ("small_batch", 0, 1, 32, 16),
    ("small_batch", 0, 2, 96, 1040),
    ("small_batch", 0, 8, 128, 64),
    ("small_batch", 0, 13, 64, 592),
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
    if mode and kernel in ("naive", "small_batch"):
        pytest.skip("has no background work")
    monkeypatch.setenv("EMULATION", mode)
    for dtype in HALF:
        *args, want = case(M, N, K, dtype)
        exact = torch.equal(launch_kernel(emulation, *args, kernel, tokens).double(), want)
        assert exact, dtype


@pytest.mark.parametrize("capability, kernels", [("8", ("small_batch", "mma")), ("9", ("small_batch", "wgmma"))])
def test_automatic_choice(emulation, monkeypatch, capability, kernels):
    monkeypatch.setenv("EMULATION_CC", capability)
    for M in (1, 16, 17, 60):
        *args, want = case(M, 96, 192, torch.bfloat16, bias=False)
        got = launch_kernel(emulation, *args)
        assert torch.equal(got.double(), want)
        expected = kernels[0] if M <= 16 else kernels[1]
        assert torch.equal(got, launch_kernel(emulation, *args, expected))
    *args, want = case(5, 36, 24, torch.bfloat16)  # fits no tile
    assert torch.equal(launch_kernel(emulation, *args).double(), want)


def test_rounding(emulation):
    """Random data: fp32 sums, one rounding at the end."""
    for dtype, eps in zip(HALF, (2**-8, 2**-11)):
        codes = torch.randint(-1, 2, (64, 512))
        x = torch.randn(20, 512).to(dtype)
        want = 0.02 * x.double() @ codes.double().T
        for kernel in KERNELS:
            if kernel != "small_batch":  # it takes up to 16 tokens, and these are 20
                got = launch_kernel(emulation, x, pack_ternary(codes), torch.tensor([0.02]), None, kernel)
                assert relative_error(got, want) < eps


# Deliberate mistakes in kernel.cu that the cases above must notice: an emulation that finds none proves nothing.
# What it does wrong: (the right text, the wrong text, the kernel that has it)
MISTAKES = {
    "waits for one copy too few": (
        "cp_async_wait<MMA_STAGES - 2>();",
        "cp_async_wait<MMA_STAGES - 1>();",
        "mma",
    ),
    "no barrier in the loop": (
        "cp_async_wait<MMA_STAGES - 2>();\n    __syncthreads();",
        "cp_async_wait<MMA_STAGES - 2>();",
        "mma",
    ),
    "overwrites registers of a running wgmma": (
        "wgmma_wait<2>",
        "wgmma_wait<4>",
        "wgmma",
    ),
    "stages signalled by half of the warps": (
        "barrier_init(&empty[stage], 4 * WARPGROUPS)",
        "barrier_init(&empty[stage], 2 * WARPGROUPS)",
        "wgmma",
    ),
    "gives a stage back while a wgmma reads it": (
        "if (step == 1) {",
        "if (step == 0) {",
        "wgmma",
    ),
    "ignores the swizzle": (
        "const int chunk = step ^ g;",
        "const int chunk = step;",
        "wgmma",
    ),
    "quarters in another order": (
        "a[fragment][2 * pair + lower_row]",
        "a[lower_row][2 * pair + fragment]",
        "small_batch",
    ),
}


def is_wrong(library, kernel, tokens, M, N, K):
    """Whether this case finds a mistake: another result, or a deadlock."""
    *args, want = case(M, N, K, torch.bfloat16)
    try:
        got = launch_kernel(library, *args, kernel, tokens)
    except terdit.KernelError:
        return True
    return not torch.equal(got.double(), want)


def compile_mistake(mistake, folder):
    right, wrong, _ = MISTAKES[mistake]
    source = (ROOT / "kernel.cu").read_text()
    assert source.count(right) == 1
    (folder / "kernel.cu").write_text(source.replace(right, wrong))
    return compile_emulation(folder / "kernel.cu", folder)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulation_finds(emulation, tmp_path, monkeypatch, mistake):
    library = compile_mistake(mistake, tmp_path)
    _, _, name = MISTAKES[mistake]
    found = False
    for mode in ("", "copies", "math"):
        monkeypatch.setenv("EMULATION", mode)
        for kernel, *sizes in CASES:
            if kernel == name and not found:
                found = is_wrong(library, kernel, *sizes)
    assert found


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc(tmp_path, arch):
    """kernel.cu compiles for Ampere and Hopper; no registers spill, and ptxas finds no wgmma that it must serialize."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: kernel.cu is not compiled for GPUs")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-O3", "-std=c++17", target, "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-shared"]
    command = ["nvcc", *flags, str(ROOT / "kernel.cu"), "-o", str(tmp_path / "kernel.so")]
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
        launch_kernel(emulation, *case(17, 32, 64, torch.bfloat16)[:4], "small_batch")
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


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 192, 512), (7, 8192, 1040)])  # the last takes several blocks
def test_blocks_against_plain(shape):
    M, N, K = shape
    codes = torch.randint(-1, 2, (N, K))
    alphas = torch.tensor([-0.031])
    packed = pack_ternary(codes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (None, torch.randn(N).to(dtype)):
            x = torch.randn(M, K).to(dtype)
            got = packed_linear(x, packed, alphas, bias)
            plain = packed_linear_plain(x, packed, alphas, bias)
            want = alphas.double() * (x.double() @ codes.double().T)
            if bias is not None:
                want = want + bias.double()
            if dtype == torch.float32:
                assert (got - plain).abs().max() <= 1e-6 * plain.abs().max()
            else:
                assert got.dtype == dtype and relative_error(got, want) < torch.finfo(dtype).eps / 2
                # alpha in fp32 rounds once less
                assert relative_error(got, want) <= 1.05 * relative_error(plain, want)


def test_shapes_of_x():
    packed = pack_ternary(torch.randint(-1, 2, (8, 16)))
    alphas = torch.ones(1)
    for shape in [(16,), (0, 16), (2, 0, 16), (2, 3, 5, 16)]:
        assert packed_linear(torch.randn(shape), packed, alphas, None).shape == (*shape[:-1], 8)
    x = torch.randn(16, 6).t()  # strided
    want = packed_linear_plain(x, packed, alphas, None)
    assert torch.allclose(packed_linear(x, packed, alphas, None), want, atol=1e-5)


def test_little_memory():
    """A layer of 9 MB packed (dense bf16: 75 MB) runs within 24 MB of what is not input or output."""
    x = torch.randn(2, 4096).bfloat16()
    packed = torch.zeros(2304, 4096, dtype=torch.uint8)
    alphas = torch.ones(1)
    with torch.profiler.profile(profile_memory=True) as profile:
        packed_linear(x, packed, alphas, None)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 6e6 < peak < 24e6


def test_layer_with_gradients():
    """Where a gradient is wanted, the path that has one runs."""
    layer = terdit.FastPackedTernaryLinear(16, 8).requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    layer.bias = torch.nn.Parameter(torch.zeros(8))
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 3.0))
    assert torch.allclose(x.grad, terdit.unpack_ternary(layer.weight).float().sum(0).expand(3, 16))
    with pytest.raises(ValueError, match=r"x of \(..., 16\) wanted"):
        layer(torch.randn(3, 17))


def test_environment(monkeypatch):
    assert terdit.packed_path("cpu", torch.bfloat16) == "blocks"
    assert terdit.packed_path("cpu", torch.int8) == "int8"
    assert terdit.packed_path("meta", torch.float32) == "plain"
    monkeypatch.setenv("TERDIT_KERNEL", "off")
    assert terdit.packed_path("cpu", torch.bfloat16) == "plain"
    monkeypatch.setenv("TERDIT_KERNEL", "mma:64")
    assert terdit.forced_kernel() == ("mma", 64)
    for wrong in ("fast", "mma:x"):
        monkeypatch.setenv("TERDIT_KERNEL", wrong)
        with pytest.raises(ValueError, match="expected off, auto, naive"):
            terdit.forced_kernel()


class FailingLibrary:
    """In the place of the compiled kernel.cu: every launch returns an error."""

    @staticmethod
    def ternary_linear(*args):
        return 999


def packed_layer(K, N, weight, alphas, bias):
    layer = terdit.FastPackedTernaryLinear(K, N, bias=True).requires_grad_(False)
    layer.weight = weight
    layer.alphas.data = alphas
    layer.bias.data = bias
    return layer


# N, K, what the layer must say about it
LAYERS = [
    (64, 48, None),
    (36, 40, "36x40 fits no tile of kernel.cu"),
]


@pytest.fixture
def use_library(monkeypatch):
    """Packed layers take a library in the place of the GPU's, which is not checked yet."""

    def use(library):
        monkeypatch.setattr(terdit, "packed_path", lambda *a: "kernel")
        monkeypatch.setattr(terdit, "cuda_kernel", lambda device: library)

    terdit.trusted_kernels.cache_clear()
    terdit.announce_once.cache_clear()
    yield use
    terdit.trusted_kernels.cache_clear()


@pytest.mark.parametrize("N, K, remark", LAYERS)
def test_through_the_layer(emulation, use_library, N, K, remark):
    """PackedTernaryLinear on the kernel's path, the emulation in the GPU's place; and what it says of odd sizes."""
    use_library(emulation)
    x, weight, alphas, bias, want = case(6, N, K, torch.bfloat16)
    layer = packed_layer(K, N, weight, alphas, bias)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert torch.equal(layer(x.view(2, 3, K)).double(), want.view(2, 3, N))
    if remark is None:
        assert not seen
    else:
        assert len(seen) == 1 and remark in str(seen[0].message)


@pytest.mark.parametrize(
    "forced, reason",
    [("auto", "no kernel that passed its check"), ("mma", "error 999 for M=6 N=64 K=48, kernel 'mma'")],
)
def test_failing_launch(use_library, monkeypatch, forced, reason):
    """Every kernel fails its check. Where one is forced, it is launched all the same. Plain PyTorch has the result."""
    use_library(FailingLibrary)
    monkeypatch.setenv("TERDIT_KERNEL", forced)
    x, weight, alphas, bias, want = case(6, 64, 48, torch.bfloat16)
    layer = packed_layer(48, 64, weight, alphas, bias)
    with pytest.warns(UserWarning) as seen:
        for _ in range(2):
            assert torch.equal(layer(x).double(), want)
    *failed, last = [str(warning.message) for warning in seen]
    assert len(failed) == 4
    for kernel, message in zip(KERNELS[1:], failed):
        assert f"kernel.cu's {kernel} with" in message and "error 999" in message
    assert reason in last and "unpack in plain PyTorch" in last


@pytest.mark.parametrize("capability, missing", [("8", {"wgmma"}), ("9", set())])
def test_check_trusts(emulation, use_library, monkeypatch, capability, missing):
    monkeypatch.setenv("EMULATION_CC", capability)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trusted = terdit.trusted_kernels(emulation, torch.device("cpu"))
    assert trusted == set(KERNELS) - missing
    assert torch.equal(before, torch.get_rng_state())  # the user's random numbers stay as they are


# mistake in kernel.cu, the kernels that fail their check, what layers run instead at 6 tokens and at 20
DISTRUSTED = [
    ("ignores the swizzle", ["wgmma"], "small_batch", "mma"),
    ("quarters in another order", ["small_batch", "mma", "wgmma"], None, None),  # in dequantize, which they share
]


@pytest.mark.parametrize("mistake, wrong, at_6, at_20", DISTRUSTED)
def test_check_distrusts(emulation, use_library, tmp_path, mistake, wrong, at_6, at_20):
    """A wrong kernel is named with its case and error, and the layer's results are right without it."""
    library = compile_mistake(mistake, tmp_path)
    use_library(library)
    with pytest.warns(UserWarning) as seen:
        trusted = terdit.trusted_kernels(library, torch.device("cpu"))
    assert trusted == set(KERNELS) - {"auto", *wrong}
    assert len(seen) == len(wrong)
    for kernel, warning in zip(wrong, seen):
        message = rf"{kernel} with \(tokens, M, N, K\) = \(\d+, \d+, \d+, \d+\) fails .* the largest error is [1-9]"
        assert re.search(message, str(warning.message))
    for M, N, K, expected in ((6, 64, 48, at_6), (20, 64, 48, at_20), (6, 36, 40, "naive")):
        x, weight, alphas, bias, want = case(M, N, K, torch.bfloat16)
        layer = packed_layer(K, N, weight, alphas, bias)
        if expected:
            assert terdit.choose_kernel(library, x, weight) == (expected, 0)
            assert torch.equal(layer(x).double(), want)
        else:
            terdit.announce_once.cache_clear()
            with pytest.warns(UserWarning, match="no kernel that passed its check .*unpack in plain PyTorch"):
                assert torch.equal(layer(x).double(), want)


# M, trusted kernels, the one that a layer of 64x48 takes
ORDER = [
    (16, ["small_batch", "wgmma", "mma"], "small_batch"),
    (16, ["wgmma", "mma"], "wgmma"),
    (16, ["mma"], "mma"),
    (17, ["small_batch", "mma"], "mma"),
    (17, ["small_batch", "mma", "wgmma", "auto"], "auto"),
]


@pytest.mark.parametrize("M, trusted, expected", ORDER)
def test_order_of_kernels(monkeypatch, M, trusted, expected):
    monkeypatch.setattr(terdit, "trusted_kernels", lambda library, device: trusted)
    x, weight, *_ = case(M, 64, 48, torch.bfloat16)
    assert terdit.choose_kernel(None, x, weight) == (expected, 0)
    if expected != "auto":
        x, weight, *_ = case(M, 36, 40, torch.bfloat16)
        with pytest.raises(terdit.KernelError, match="no kernel that passed"):  # naive is not trusted
            terdit.choose_kernel(None, x, weight)


@pytest.fixture
def lock(emulation, monkeypatch, tmp_path):
    """The lock of a build for sm_80, in which load takes the emulation for what it has built."""
    folder = tmp_path / f"terdit_sm_80_torch_{torch.__version__}"

    def load(name, sources, build_directory, **options):
        assert build_directory == str(folder) and not (folder / "lock").exists()
        return emulation._name

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder.mkdir()
    lock = folder / "lock"
    lock.touch()
    return lock


def test_stale_build_lock(lock):
    """What a killed build left is named at once, and packed layers run in plain PyTorch."""
    long_ago = time.time() - 121
    os.utime(lock, (long_ago, long_ago))
    terdit.announce_once.cache_clear()
    start = time.time()
    with pytest.warns(UserWarning, match=f"delete {re.escape(str(lock))} .*unpack in plain PyTorch"):
        assert terdit.cuda_kernel.__wrapped__("cuda") is None
    assert time.time() - start < 5


def test_fresh_build_lock(lock):
    """Another process builds, and ends."""
    threading.Timer(0.3, lock.unlink).start()
    with pytest.warns(UserWarning, match="building kernel.cu for sm_80"):
        assert terdit.cuda_kernel.__wrapped__("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_once():
    terdit.cuda_kernel.cache_clear()
    terdit.announce_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert terdit.packed_path("cuda", torch.bfloat16) == "plain"
    assert len(seen) == 1 and "kernel.cu is not used (" in str(seen[0].message)
    terdit.cuda_kernel.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


# Sizes of real layers
REAL = [
    ("auto", 0, M, N, K)  # in the order of CASES
    for M in (1, 2, 16, 17, 511, 1000)
    for N, K in [(9216, 1024), (1536, 4096), (3072, 3072)]
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("cases", [CASES, REAL], ids=["small", "real"])
def test_gpu(cases):
    library = terdit.cuda_kernel(torch.device("cuda"))
    major, _ = torch.cuda.get_device_capability()
    assert library, "kernel.cu did not build"
    for kernel, tokens, M, N, K in cases:
        if kernel == "wgmma" and major != 9:
            continue
        for dtype in HALF:
            *args, want = (z.cuda() for z in case(M, N, K, dtype))
            torch.full((M, N), float("nan"), dtype=dtype, device="cuda")  # the allocator hands this memory out again
            got = launch_kernel(library, *args, kernel, tokens)
            again = launch_kernel(library, *args, kernel, tokens)
            exact = torch.equal(got.double(), want) and torch.equal(got, again)
            assert exact, (kernel, tokens, M, N, K, dtype)
