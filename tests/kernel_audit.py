"""What kernel.cu does to memory, without a GPU: races, bank conflicts, unused parts of sectors.

    python tests/kernel_audit.py        (make kernel-audit)

kernel.cu runs unchanged in cpu_emulation.h, whose section "Audit" says what is watched. A row is a
line of kernel.cu ("a < b": line a of a function that line b calls), and x1.00 is the ideal. In
small_batch x2.00 is right: a lane reads half a sector and then the other half, and the next block
writes the other half. Where nvcc and nvdisasm are found, the compiled main loops follow.

Exits with 1 at a wrong result, a race, a bank conflict, or more than twice the sectors needed.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from terdit import CHECKS, launch_kernel, pack_ternary, packed_linear_plain  # noqa: E402

# Kernel, tokens, M, N, K: one thread block each, no remainders, so the traffic of a large layer.
# mma and wgmma have 9 slices: the last one is in stage 0, where the outputs go, too.
ONE_BLOCK = [
    ("small_batch", 0, 8, 32, 1024),
    ("small_batch", 0, 16, 32, 1024),
    ("mma", 32, 32, 128, 576),
    ("mma", 64, 64, 128, 576),
    ("mma", 128, 128, 128, 576),
    ("wgmma", 64, 64, 128, 1152),
    ("wgmma", 128, 128, 256, 1152),
]


def compile_emulation(source, folder, audit=False):
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-DCPU_EMULATION"]
    if audit:  # the header defines what -fsanitize=thread calls, so the sanitizer's library is out
        flags += ["-DAUDIT", "-g1", "-fsanitize=thread", "-nodefaultlibs"]
    libraries = ["-lstdc++", "-lm", "-lc", "-lgcc", "-ldl"]
    library = folder / ("audit.so" if audit else "kernel.so")
    command = ["g++", *flags, f"-I{ROOT}", "-x", "c++", str(source), *libraries, "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library))


def run_and_compare(library, kernel, tokens, M, N, K):
    """-> what is wrong, or None. Sums of small integers are exact."""
    x = torch.randint(-2, 3, (M, K)).bfloat16()
    weight = pack_ternary(torch.randint(-1, 2, (N, K)))
    alphas = torch.tensor([0.5])
    bias = torch.randint(-8, 9, (N,)).bfloat16()
    try:
        y = launch_kernel(library, x, weight, alphas, bias, kernel, tokens)
    except RuntimeError as e:
        return str(e)
    want = packed_linear_plain(x.float(), weight, alphas, bias).bfloat16()
    return None if torch.equal(y, want) else "wrong result"


def read_report(library):
    """-> rows of the emulation's report: what, name, lines of kernel.cu, three numbers."""
    library.emulated_report.restype = ctypes.c_char_p
    rows = [row.split("\t") for row in library.emulated_report().decode().splitlines()]
    command = ["addr2line", "-a", "-i", "-e", library._name, *(f"0x{row[2]}" for row in rows)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    places = re.split(r"^0x.*\n", text, flags=re.M)[1:]
    lines = [" < ".join(re.findall(r"kernel\.cu:(\d+)", place)[:2]) for place in places]
    numbers = {}  # a line may have several places, where a loop is unrolled
    for (what, name, _, *n), line in zip(rows, lines):
        before = numbers.get((what, name, line), (0, 0, 0))
        numbers[what, name, line] = [a + int(b) for a, b in zip(before, n)]
    return [(*key, *n) for key, n in sorted(numbers.items())]


def audit(library, case):
    """Run one case and print its table -> complaints."""
    kernel, tokens, M, N, K = case
    wrong = run_and_compare(library, *case)
    complaints = [wrong] if wrong else []
    print(f"\n{kernel}, tokens {tokens}, M={M} N={N} K={K}")
    for what, name, line, n, ideal, actual in read_report(library):
        if what == "complaint":
            complaints.append(f"{name}: line {line}, {n} times")
        elif what == "count":
            print(f"  {name:12}  {n} by warps")
        elif case in ONE_BLOCK:
            # In CHECKS, K is no multiple of 32: every other byte row begins within a sector, so
            # reading its 64 bytes takes 3 sectors, not 2 (mma: x1.30 with the last slice's rest).
            unit = "wavefronts" if name.startswith("shared") else "sectors"
            factor = actual / ideal
            print(
                f"  {name:12}  line {line:9}  {n:5} requests  {actual:5} {unit:10}  x{factor:.2f}"
            )
            if unit == "wavefronts" and factor > 1:
                complaints.append(f"bank conflicts, x{factor:.2f} wavefronts: {name}, line {line}")
            if factor > 2:
                complaints.append(f"x{factor:.2f} sectors: {name}, line {line}")
    for complaint in complaints:
        print(f"  COMPLAINT  {complaint}")
    return complaints


def show_compiled_loops(arch, folder):
    """Instructions of a warp in a round of the main loop. It covers 512 columns in small_batch (8
    warps), 64 in mma and 128 in wgmma: a slice."""
    cubin = str(folder / "kernel.cubin")
    flags = ["-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"]
    command = ["nvcc", *flags, str(ROOT / "kernel.cu"), "-o", cubin]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    used = dict(re.findall(r"function '(\w+)' for.*?Used (\d+) registers", log, flags=re.S))
    command = ["nvdisasm", "-c", cubin]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"\nsm_{arch}" + " " * 30 + "registers  instructions of a round  of them (HG)MMA")
    for function in re.split(r"\n//-+ \.text\.", sass)[1:]:
        name = function.split()[0]
        labels = {}
        instructions = []
        for line in function.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                instructions.append(instruction[1])
        for end, instruction in enumerate(instructions):
            target = re.search(r"BRA.*(\.L_x_\d+)", instruction)
            if target and labels[target[1]] <= end:  # a jump back: a loop
                loop = instructions[labels[target[1]] : end + 1]
                products = sum("MMA." in instruction for instruction in loop)
                if products:
                    print(f"  {name:33}{used[name]:>10}{len(loop):>26}{products:>17}")


def main():
    complaints = []
    with tempfile.TemporaryDirectory() as folder:
        library = compile_emulation(ROOT / "kernel.cu", Path(folder), audit=True)
        for case in [*ONE_BLOCK, *CHECKS]:
            complaints += audit(library, case)
        if shutil.which("nvcc") and shutil.which("nvdisasm"):
            for arch in ("80", "90a"):
                show_compiled_loops(arch, Path(folder))
        else:
            print("\nno nvcc or no nvdisasm: the compiled loops are not shown")
    print(f"\n{len(complaints)} complaints")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
