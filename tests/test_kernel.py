"""kernel.cu without a GPU: its own source, run on the CPU; its compilation by nvcc; its check
before the first use. On a GPU the same cases run there, too."""

import ctypes
import math
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

import terdit
from terdit import check_kernels, launch_kernel, pack_ternary
from tests.conftest import ROOT
from tests.kernel_audit import ONE_BLOCK, audit, compile_emulation

CPU = torch.device("cpu")  # where the emulation's pointers are; it stands for an sm_90 with 4 SMs
LATE = ["", "copies", "math"]  # work that is done as late as the kernel's waits allow


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++: kernel.cu is not run")
    return compile_emulation(ROOT / "kernel.cu", tmp_path_factory.mktemp("kernel"))


def case(M, N, K, bias=True):
    """Small integers, few of them not 0: all products and sums are exact, and so is the result."""
    codes = torch.randint(-1, 2, (N, K))
    x = (torch.randint(-2, 3, (M, K)) * (torch.rand(M, K) < 24 / K)).bfloat16()
    b = torch.randint(-8, 9, (N,)).bfloat16() if bias else None
    want = 2 * x.double() @ codes.double().T + (b.double() if bias else 0)
    return x, pack_ternary(codes), torch.tensor([2.0]), b, want


# Kernel, tokens of the tile, M, N, K. Beside the cases of terdit's own check: sizes without
# remainders, other remainders, and a ring that is never full.
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


def launched(library):
    names = ("emulated_blocks", "emulated_threads")
    return [ctypes.c_int.in_dll(library, name).value for name in names]


# Capability, M, N, K, then what is launched on the emulation's 4 SMs: blocks, threads of each
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
    assert launched(emulation) == [blocks, threads]


# Real layers: capability, SMs, M -> tokens of the tile that is chosen for each N. wgmma's tiles are
# 256 x 128 and 128 x 64, mma's 128 x 128, 64 and 32.
#   Example: mma on 128 SMs, M = 2048, N = 1536. 12 * 16 = 192 blocks of 128 x 128 take 2 rounds. In
#   the last one 64 SMs have no work. 12 * 32 = 384 blocks of 128 x 64 take 3 full rounds.
LAYERS = [1536, 4096, 3072, 8192]  # N: 600M's attention, w1 and w3; then 4.2B's
REAL_CHOICES = {
    ("9", 132, 512): [64, 64, 64, 128],
    ("9", 132, 2048): [128, 128, 128, 128],
    ("8", 108, 512): [64, 64, 128, 64],
    ("8", 108, 2048): [128, 128, 128, 128],
    ("8", 128, 512): [64, 128, 128, 128],
    ("8", 128, 2048): [64, 128, 128, 128],
}


@pytest.mark.parametrize("capability, sms, M", REAL_CHOICES)
def test_choice_for_real_layers(emulation, monkeypatch, capability, sms, M):
    monkeypatch.setenv("EMULATION", "launch only")
    monkeypatch.setenv("EMULATION_CC", capability)
    monkeypatch.setenv("EMULATION_SMS", str(sms))
    pointers = [None] * 5  # nothing is read or written
    for N, tokens in zip(LAYERS, REAL_CHOICES[capability, sms, M]):
        assert emulation.ternary_linear(*pointers, M, N, 1536, 0, 0, None) == 0
        rows = 2 * tokens if capability == "9" else 128
        threads = rows if capability == "9" else 256
        blocks = math.ceil(N / rows) * math.ceil(M / tokens)
        assert launched(emulation) == [blocks, threads], N


def test_no_tokens(emulation):
    before = launched(emulation)
    assert emulation.ternary_linear(*[None] * 5, 0, 64, 64, 0, 0, None) == 0
    assert launched(emulation) == before


def test_rounding(emulation):
    """Random data: fp32 sums, one rounding at the end."""
    codes = torch.randint(-1, 2, (64, 512))
    weight = pack_ternary(codes)
    alphas = torch.tensor([0.02])
    x = torch.randn(20, 512).bfloat16()
    want = 0.02 * x.double() @ codes.double().T
    for kernel in ("naive", "small_batch", "mma", "wgmma"):
        rows = 16 if kernel == "small_batch" else 20  # it takes no more
        got = launch_kernel(emulation, x[:rows], weight, alphas, None, kernel)
        assert (got.double() - want[:rows]).norm() < 2**-8 * want[:rows].norm()


@dataclass
class Mistake:
    kernel: str  # the first kernel that has it
    right: str  # text of kernel.cu
    wrong: str  # what stands there instead
    cause: str  # what the audit says
    also: tuple = ("", "")  # a second right and wrong text
    check: bool = True  # terdit's check finds it, too: a wrong result, or a write past the end


# Deliberate mistakes in kernel.cu that must be noticed: a check that finds none proves nothing.
WAIT = "cp_async_wait<AHEAD - 1>();\n"
SHOW = "show_copies_to_wgmma();\n"
BARRIER = "__syncthreads();\n"
RELOAD = "copy_x(slice + AHEAD);\n"
INDENT = "    "
MISTAKES = {
    "waits for one copy too few": Mistake(
        "mma", WAIT + INDENT + BARRIER, "cp_async_wait<AHEAD>();\n" + INDENT + BARRIER,
        "reads a copy that was not waited for"),
    "no barrier in the loop": Mistake(
        "mma", WAIT + INDENT + BARRIER, WAIT,
        "reads what another thread wrote, no barrier between"),
    "reads X without the swizzle": Mistake(
        "mma", "const int chunk = (2 * c + h) ^ g;", "const int chunk = 2 * c + h;",
        "bank conflicts"),
    "overwrites registers of a running wgmma": Mistake(
        "wgmma", "wgmma_wait<2>", "wgmma_wait<4>",
        "overwrites a register that an unfinished wgmma reads"),
    "reloads a stage while a wgmma reads it": Mistake(
        "wgmma", "AHEAD = STAGES - 2", "AHEAD = STAGES - 1",
        "overwrites what a wgmma may still read"),
    "does not show wgmma the copies": Mistake(
        "wgmma", INDENT + SHOW, "", "wgmma reads a copy without fence.proxy.async"),
    "reads W without the swizzle": Mistake(
        "wgmma", "const int chunk = step ^ g;", "const int chunk = step;", "bank conflicts"),
    "too little shared memory": Mistake(
        "wgmma", "1024 + STAGES * STAGE_BYTES", "STAGES * STAGE_BYTES",
        "copies past shared memory"),
    "quarters in another order": Mistake(
        "small_batch", "a[fragment][2 * pair + lower_row]", "a[lower_row][2 * pair + fragment]",
        "wrong result"),
    # From here on the audit alone is asked. Some of these mistakes give right results here.
    "fence after the barrier": Mistake(
        "wgmma", SHOW + INDENT + BARRIER, BARRIER + INDENT + SHOW,
        "wgmma reads a copy, no barrier after fence.proxy.async", check=False),
    "barrier before the wait": Mistake(
        "wgmma", WAIT + INDENT + SHOW + INDENT + BARRIER, BARRIER + INDENT + WAIT + INDENT + SHOW,
        "wgmma reads a copy, no barrier after the wait for it", check=False),
    "reload before the barrier": Mistake(
        "mma", BARRIER + INDENT + RELOAD, RELOAD + INDENT + BARRIER,
        "overwrites what another thread reads, no barrier between", check=False),
    "two sets of registers": Mistake(
        "wgmma", "a[step % 4]", "a[step % 2]",
        "overwrites a register that an unfinished wgmma reads", check=False),
    "no wgmma_fence": Mistake(
        "wgmma", "      wgmma_fence();\n", "",
        "wgmma uses a register that was changed after wgmma_fence", check=False),
    "uses the sums too early": Mistake(
        "wgmma", "wgmma_wait<0>();\n", "", "uses the sums of an unfinished wgmma", check=False),
    "outputs before the ring is free": Mistake(
        "mma", "__syncthreads();  // all warps have read their last slice\n", "",
        "overwrites what another thread reads, no barrier between", check=False),
    "no barrier between small_batch's sums": Mistake(
        "small_batch", BARRIER + "\n  if (warp >= TOKEN_TILES) return;",
        "if (warp >= TOKEN_TILES) return;",
        "reads what another thread wrote, no barrier between", check=False),
    # The result is right, so only the wavefronts show it: X is copied and read without the swizzle.
    "no swizzle": Mistake(
        "mma", "const int chunk = (2 * c + h) ^ g;", "const int chunk = 2 * c + h;",
        "bank conflicts, x2.00 wavefronts: shared read", check=False,
        also=("16 * (chunk ^ (line % 8))", "16 * chunk")),
}


def what_the_check_says(library):
    """-> the message of terdit's check where it fails, with work done early or late; or None."""
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
    """compile_mistake(name, folder, audit=False) -> library. Skips while kernel.cu is wrong."""
    message = what_the_check_says(emulation)
    if message:
        pytest.skip(f"kernel.cu itself fails its check: {message}")

    def compile_it(name, folder, audit=False):
        mistake = MISTAKES[name]
        source = (ROOT / "kernel.cu").read_text()
        for right, wrong in [(mistake.right, mistake.wrong), mistake.also]:
            assert right in source, f"kernel.cu should have {right!r}: change MISTAKES, too"
            source = source.replace(right, wrong)
        (folder / "kernel.cu").write_text(source)
        return compile_emulation(folder / "kernel.cu", folder, audit)

    return compile_it


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if MISTAKES[name].check])
def test_check_finds(compile_mistake, tmp_path, mistake):
    """terdit's check names the kernel: a wrong result, a deadlock, or a write past the end."""
    message = what_the_check_says(compile_mistake(mistake, tmp_path))
    kernel = MISTAKES[mistake].kernel
    pattern = rf"kernel '{kernel}'.*tokens\D+\d+.*M=\d+.*N=\d+.*K=\d+"
    assert message and re.search(pattern, message), message


def small_case(kernel):
    """-> the first case of ONE_BLOCK with this kernel."""
    return next(case for case in ONE_BLOCK if case[0] == kernel)


def test_audit_has_no_complaint(emulation, tmp_path):
    library = compile_emulation(ROOT / "kernel.cu", tmp_path, audit=True)
    for kernel in ("small_batch", "mma", "wgmma"):
        assert audit(library, small_case(kernel)) == []


# All of them take minutes: make kernel-mistakes. The tests take two.
AUDITED = MISTAKES if os.environ.get("ALL_MISTAKES") else ["fence after the barrier", "no swizzle"]


@pytest.mark.parametrize("mistake", AUDITED)
def test_audit_names(compile_mistake, tmp_path, mistake):
    library = compile_mistake(mistake, tmp_path, audit=True)
    complaints = audit(library, small_case(MISTAKES[mistake].kernel))
    assert any(complaint.startswith(MISTAKES[mistake].cause) for complaint in complaints)


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc(tmp_path, arch):
    """kernel.cu compiles; no registers spill, and ptxas finds no wgmma that it must serialize."""
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
    message = f"error -1 for kernel '{kernel}', tokens {tokens}, M={M} N={N} K={K}"
    with pytest.raises(RuntimeError, match=message):
        launch_kernel(emulation, *case(M, N, K)[:4], kernel, tokens)


def test_refused_tensors(emulation):
    x, w, a, b, _ = case(4, 32, 64)
    wrong = [(x.float(), w, a, b), (x[:, :32], w, a, b), (x, w.char(), a, b), (x, w, a, b.float())]
    wrong.append((x, w, a.expand(32, 1), b))  # a scale a channel, of which a kernel would use one
    for args in wrong:
        with pytest.raises(ValueError, match="wanted .* got"):
            launch_kernel(emulation, *args)


def test_bytes_at_any_address(emulation):
    """The fast kernels load 16 bytes at a time, from multiples of 16. Else the naive one runs."""
    x, w, a, b, want = case(4, 32, 64)
    shifted = torch.zeros(w.numel() + 1, dtype=torch.uint8)
    shifted[1:] = w.flatten()
    assert torch.equal(launch_kernel(emulation, x, shifted[1:].view_as(w), a, b).double(), want)


# --------------------------------------------------------------------------------------------------
# Loading: all kernels, or none


@pytest.fixture
def build(monkeypatch):
    """build(library): cuda_kernel takes this library for what it has compiled, on a Hopper."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(terdit, "cuda_kernel", lru_cache(terdit.cuda_kernel.__wrapped__))

    def use(library):
        load = "torch.utils.cpp_extension.load"
        monkeypatch.setattr(load, lambda *args, **options: library._name)

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
    stream = SimpleNamespace(cuda_stream=None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    x, weight, alphas, b, want = case(6, N, K, bias)
    layer = terdit.PackedTernaryLinear(K, N, bias=bias).requires_grad_(False)
    layer.weight = weight
    layer.alphas.data = alphas
    layer.product_dtype = torch.bfloat16
    if bias:
        layer.bias.data = b.float()
    y = layer(x.float().view(2, 3, K).as_subclass(OnGpu))
    assert y.dtype == torch.bfloat16 and torch.equal(y.double(), want.view(2, 3, N))


# --------------------------------------------------------------------------------------------------
# On a GPU


# Sizes of real layers
REAL = [
    ("auto", 0, M, N, K)  # in the order of CASES
    for M in (1, 2, 16, 17, 511, 1000)
    for N, K in [(9216, 1024), (1536, 4096), (3072, 3072)]
]
REAL += 3 * [("auto", 0, 4096, 3072, 8192)]  # a race need not show at the first time


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
        is_right = torch.equal(got.double(), want) and torch.equal(got, again)
        assert is_right, (kernel, tokens, M, N, K)
