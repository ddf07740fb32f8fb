"""kernel.cu without a GPU: its own source, run on the CPU; its compilation by nvcc; its check before the first use.

On a GPU the same cases run there, too.
"""

import ctypes
import re
import shutil
import subprocess
import warnings
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

import terdit
from terdit import check_kernels, launch_kernel, pack_ternary
from tests.conftest import ROOT

CPU = torch.device("cpu")  # where the emulation's pointers are; it stands for an sm_90 with 4 SMs
LATE = ["", "copies", "math"]  # what background work is done as late as the kernel's waits allow, not at once


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


def case(M, N, K, bias=True):
    """Small integers, few of them not 0: every product and sum is exact, and so is the result in bf16."""
    codes = torch.randint(-1, 2, (N, K))
    x = (torch.randint(-2, 3, (M, K)) * (torch.rand(M, K) < 24 / K)).bfloat16()
    b = torch.randint(-8, 9, (N,)).bfloat16() if bias else None
    want = 2 * x.double() @ codes.double().T + (b.double() if bias else 0)
    return x, pack_ternary(codes), torch.tensor([2.0]), b, want


# Kernel, tokens of the tile, M, N, K. Beside the cases of terdit's own check: sizes without remainders, other
# remainders, and a ring that is never full.
CASES = [
    *terdit.CHECKS,
    ("naive", 0, 17, 128, 100),
    ("small_batch", 0, 1, 32, 16),
    ("small_batch", 0, 2, 96, 1040),
    ("mma", 32, 33, 128, 128),
    ("mma", 64, 17, 96, 272),
    ("mma", 128, 130, 160, 400),
    ("wgmma", 64, 70, 160, 656),
    ("wgmma", 64, 128, 256, 896),
    ("wgmma", 128, 100, 288, 128),
    ("wgmma", 128, 130, 384, 1168),
]


@pytest.mark.parametrize("late", LATE, ids=["early", "late copies", "late math"])
@pytest.mark.parametrize("kernel, tokens, M, N, K", CASES)
def test_kernels_exactly(emulation, monkeypatch, kernel, tokens, M, N, K, late):
    if late and kernel in ("naive", "small_batch"):
        pytest.skip("has no background work")
    monkeypatch.setenv("EMULATION", late)
    for bias in (True, False):
        *args, want = case(M, N, K, bias)
        assert torch.equal(launch_kernel(emulation, *args, kernel, tokens).double(), want), bias


# Capability, M, N, K, then what is launched on the emulation's 4 SMs: blocks, and the threads of each
CHOICES = [
    ("9", 16, 96, 192, 3, 256),  # small_batch: 8 of the 24 byte rows a block
    ("9", 17, 96, 192, 1, 128),  # wgmma 128 x 64: no tile gives every SM a block, so the smallest
    ("9", 100, 256, 64, 4, 128),  # wgmma 128 x 64: 256 x 128 would make 1 block
    ("9", 130, 512, 64, 4, 256),  # wgmma 256 x 128
    ("8", 17, 96, 192, 1, 256),  # mma 128 x 32
    ("8", 100, 128, 64, 4, 256),  # mma 128 x 32: 128 x 64 would make 2 blocks
    ("8", 200, 128, 64, 4, 256),  # mma 128 x 64: 128 x 128 would make 2 blocks
    ("8", 200, 256, 64, 4, 256),  # mma 128 x 128
    ("9", 5, 36, 24, 1, 256),  # naive: these sizes fit no tile
]


@pytest.mark.filterwarnings("ignore:a layer of 36x24 fits no tile")
@pytest.mark.parametrize("capability, M, N, K, blocks, threads", CHOICES)
def test_automatic_choice(emulation, monkeypatch, capability, M, N, K, blocks, threads):
    monkeypatch.setenv("EMULATION_CC", capability)
    *args, want = case(M, N, K)
    assert torch.equal(launch_kernel(emulation, *args).double(), want)
    launched = [ctypes.c_int.in_dll(emulation, f"emulated_{name}").value for name in ("blocks", "threads")]
    assert launched == [blocks, threads]


def test_rounding(emulation):
    """Random data: fp32 sums, one rounding at the end."""
    codes = torch.randint(-1, 2, (64, 512))
    x = torch.randn(20, 512).bfloat16()
    want = 0.02 * x.double() @ codes.double().T
    for kernel in ("naive", "small_batch", "mma", "wgmma"):
        rows = 16 if kernel == "small_batch" else 20  # it takes no more
        got = launch_kernel(emulation, x[:rows], pack_ternary(codes), torch.tensor([0.02]), None, kernel)
        assert (got.double() - want[:rows]).norm() < 2**-8 * want[:rows].norm()


# Deliberate mistakes in kernel.cu that its check must notice: an emulation that finds none proves nothing.
# What it does wrong: (the right text, the wrong text, the first kernel that has it)
MISTAKES = {
    "waits for one copy too few": (
        "cp_async_wait<AHEAD - 1>();\n    __syncthreads();",
        "cp_async_wait<AHEAD>();\n    __syncthreads();",
        "mma",
    ),
    "no barrier in the loop": (
        "cp_async_wait<AHEAD - 1>();\n    __syncthreads();",
        "cp_async_wait<AHEAD - 1>();",
        "mma",
    ),
    "reads X without the swizzle": (
        "const int chunk = (2 * c + h) ^ g;",
        "const int chunk = 2 * c + h;",
        "mma",
    ),
    "overwrites registers of a running wgmma": (
        "wgmma_wait<2>",
        "wgmma_wait<4>",
        "wgmma",
    ),
    "reloads a stage while a wgmma reads it": (
        "AHEAD = STAGES - 2",
        "AHEAD = STAGES - 1",
        "wgmma",
    ),
    "does not show wgmma the copies": (
        "    show_copies_to_wgmma();\n",
        "",
        "wgmma",
    ),
    "reads W without the swizzle": (
        "const int chunk = step ^ g;",
        "const int chunk = step;",
        "wgmma",
    ),
    "too little shared memory": (
        "1024 + STAGES * STAGE_BYTES",
        "STAGES * STAGE_BYTES",
        "wgmma",
    ),
    "quarters in another order": (
        "a[fragment][2 * pair + lower_row]",
        "a[lower_row][2 * pair + fragment]",
        "small_batch",
    ),
}


def what_the_check_says(library):
    """The message of terdit's check where it fails, with background work done early or late, or None."""
    with pytest.MonkeyPatch.context() as patch:
        for late in LATE:
            patch.setenv("EMULATION", late)
            try:
                check_kernels(library, CPU)
            except RuntimeError as e:
                return str(e)
    return None


@pytest.fixture(scope="module")
def compile_mistake(emulation):
    """compile_mistake(mistake, folder) -> library. Skips while kernel.cu has a mistake of its own: an experiment."""
    message = what_the_check_says(emulation)
    if message:
        pytest.skip(f"kernel.cu itself fails its check: {message}")

    def compile_it(mistake, folder):
        right, wrong, _ = MISTAKES[mistake]
        source = (ROOT / "kernel.cu").read_text()
        assert source.count(right) == 1, f"kernel.cu should have once {right!r}: change MISTAKES, too"
        (folder / "kernel.cu").write_text(source.replace(right, wrong))
        return compile_emulation(folder / "kernel.cu", folder)

    return compile_it


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_finds(compile_mistake, tmp_path, mistake):
    """terdit's own check names the kernel that is wrong: a wrong result, a deadlock, a write past the end."""
    _, _, kernel = MISTAKES[mistake]
    message = what_the_check_says(compile_mistake(mistake, tmp_path))
    assert message and re.search(rf"kernel '{kernel}'.*tokens\D+\d+.*M=\d+.*N=\d+.*K=\d+", message), message


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
    assert len(spills) >= 8 and not any(spills), text
    assert not re.findall(r"warning|C7\d{3}", text), text


# Kernel, tokens, M, N, K, the compute capability
REFUSED = [
    ("small_batch", 0, 17, 32, 64, "9"),
    ("mma", 50, 17, 32, 64, "9"),
    ("mma", 0, 17, 36, 64, "9"),
    ("wgmma", 0, 17, 32, 40, "9"),
    ("wgmma", 0, 17, 32, 64, "8"),
]


@pytest.mark.parametrize("kernel, tokens, M, N, K, capability", REFUSED)
def test_refused_sizes(emulation, monkeypatch, kernel, tokens, M, N, K, capability):
    monkeypatch.setenv("EMULATION_CC", capability)
    with pytest.raises(RuntimeError, match=f"error -1 for kernel '{kernel}', tokens {tokens}, M={M} N={N} K={K}"):
        launch_kernel(emulation, *case(M, N, K)[:4], kernel, tokens)


def test_refused_tensors(emulation):
    x, w, a, b, _ = case(4, 32, 64)
    wrong = [(x.float(), w, a, b), (x[:, :32], w, a, b), (x, w.to(torch.int8), a, b), (x, w, a, b.float())]
    for args in [*wrong, (x, w, a.expand(32, 1), b)]:  # the last: a scale a channel, of which a kernel would use one
        with pytest.raises(ValueError, match="wanted .* got"):
            launch_kernel(emulation, *args)


def test_bytes_at_any_address(emulation):
    """The fast kernels load 16 bytes at a time, from multiples of 16. Elsewhere the naive one runs."""
    x, w, a, b, want = case(4, 32, 64)
    shifted = torch.zeros(w.numel() + 1, dtype=torch.uint8)
    shifted[1:] = w.flatten()
    assert torch.equal(launch_kernel(emulation, x, shifted[1:].view_as(w), a, b).double(), want)


# ----------------------------------------------------------------------------------------------------------------------
# Loading: all kernels, or none


@pytest.fixture
def build(monkeypatch):
    """build(library): cuda_kernel takes this library for what it has compiled, on a Hopper."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(terdit, "cuda_kernel", lru_cache(terdit.cuda_kernel.__wrapped__))

    def use(library):
        monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *args, **options: library._name)

    return use


def test_a_right_build_is_used(emulation, build):
    build(emulation)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert terdit.cuda_kernel(CPU)._name == emulation._name
    assert torch.equal(before, torch.get_rng_state())  # the user's random numbers stay as they are


def test_a_wrong_build_is_named_once_and_not_used(compile_mistake, build, tmp_path):
    build(compile_mistake("reads W without the swizzle", tmp_path))
    with pytest.warns(UserWarning, match="not used .*'wgmma'.*K=.* plain PyTorch, slower") as seen:
        for _ in range(2):
            assert terdit.cuda_kernel(CPU) is None
    assert len(seen) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_once(monkeypatch):
    monkeypatch.setattr(terdit, "cuda_kernel", lru_cache(terdit.cuda_kernel.__wrapped__))
    with pytest.warns(UserWarning, match="kernel.cu is not used .* plain PyTorch, slower") as seen:
        for _ in range(3):
            assert terdit.cuda_kernel(torch.device("cuda")) is None
    assert len(seen) == 1


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; the emulation can use its pointer."""

    is_cuda = True


@pytest.mark.filterwarnings("ignore:a layer of 36x40 fits no tile")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("N, K", [(64, 48), (36, 40)])
def test_through_the_layer(emulation, monkeypatch, N, K, bias):
    """PackedTernaryLinear in bf16, the emulation in a GPU's place. x and the bias come in fp32."""
    monkeypatch.setattr(terdit, "cuda_kernel", lambda device: emulation)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=None))
    x, weight, alphas, b, want = case(6, N, K, bias)
    layer = terdit.PackedTernaryLinear(K, N, bias=bias).requires_grad_(False)
    layer.weight = weight
    layer.alphas.data = alphas
    layer.product_dtype = torch.bfloat16
    if bias:
        layer.bias.data = b.float()
    y = layer(x.float().view(2, 3, K).as_subclass(OnGpu))
    assert y.dtype == torch.bfloat16 and torch.equal(y.double(), want.view(2, 3, N))


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
    assert library, "kernel.cu did not build, or is wrong: see the warning"
    for kernel, tokens, M, N, K in cases:
        if kernel == "wgmma" and major != 9:
            continue
        *args, want = (z.cuda() for z in case(M, N, K))
        # The allocator hands this memory out again: what a kernel forgets to write stays NaN.
        torch.full((M, N), float("nan"), dtype=torch.bfloat16, device="cuda")
        got = launch_kernel(library, *args, kernel, tokens)
        again = launch_kernel(library, *args, kernel, tokens)
        assert torch.equal(got.double(), want) and torch.equal(got, again), (kernel, tokens, M, N, K)
