"""One packed layer at every shape of 600M and 4.2B, against what a user would run instead.

    python tests/bench_kernel.py             a table, on the GPU if there is one, else on the CPU

    ours       packed_linear: kernel.cu on a GPU; on a CPU, blocks of the weight that are unpacked in its cache
    int8       packed_linear with activations in int8, on a CPU
    dense      F.linear with bf16 weights: cuBLAS or oneDNN
    plain      unpack the weight to bf16 in memory, then F.linear
    upstream   TerDiT's released code's way: unpack to fp32, times alpha, F.linear in fp32

Each shape's result is checked before it is timed. On a CPU they take turns, and a ratio is the median of its values
in each turn. On a GPU each one runs in a CUDA graph over copies of the weights that together exceed the L2 cache.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from terdit import forced_kernel, int8_linear_plain, pack_ternary, packed_linear, packed_linear_plain  # noqa: E402
from terdit import packed_path  # noqa: E402

SHAPES = {  # (N, K): where
    (1536, 1536): "600M attention",
    (4096, 1536): "600M w1, w3",
    (1536, 4096): "600M w2",
    (9216, 1024): "600M adaLN",
    (3072, 3072): "4.2B attention",
    (8192, 3072): "4.2B w1, w3",
    (3072, 8192): "4.2B w2",
    (18432, 1024): "4.2B adaLN",
}
HEIGHTS = {"cpu": (1, 2, 16, 64, 512, 2048), "cuda": (1, 2, 16, 64, 512, 2048, 4096)}  # M, the rows of x
RATIOS = ("ours", "int8", "plain", "upstream")  # their time over dense's is printed
CEILINGS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12)}  # measured bf16 FLOP/s and bytes/s, of SXM boards
CONTENDERS = {"cpu": ("ours", "int8", "dense", "plain", "upstream"), "cuda": ("ours", "dense", "plain", "upstream")}


def check(M, N, K, device):
    """Exit if the layer's result is wrong. Two calls must both give it, bit for bit.

    The inputs are small integers, so every sum is exact in fp32, and the result must be exact.
    """
    codes = torch.randint(-1, 2, (N, K), device=device)
    kept = torch.rand(M, K, device=device) < 24 / K  # about 24 in a row: bf16 holds such small sums exactly, too
    x = (torch.randint(-2, 3, (M, K), device=device) * kept).bfloat16()
    want = 2 * (x.float() @ codes.float().T)
    packed = pack_ternary(codes)
    alphas = torch.full((1,), 2.0, device=device)
    # The allocator hands this memory out again for the result: what a kernel forgets to write stays NaN.
    torch.full((M, N), float("nan"), dtype=x.dtype, device=device)
    first = packed_linear(x, packed, alphas, None)
    second = packed_linear(x, packed, alphas, None)
    if not (torch.equal(first.float(), want) and torch.equal(first, second)):
        sys.exit(f"wrong result at M={M} N={N} K={K}: nothing is timed")
    if device == "cpu":
        x = torch.randn(M, K)
        got = packed_linear(x, packed, alphas, None, torch.int8)
        if not torch.equal(got, int8_linear_plain(x, packed, alphas, None)):
            sys.exit(f"wrong result in int8 at M={M} N={N} K={K}: nothing is timed")


def cpu_rounds(functions, rounds):
    """Call the functions in turns -> for each round, the seconds of each function. A first round warms up."""
    times = []
    for _ in range(rounds + 1):
        row = []
        for function in functions:
            start = time.perf_counter()
            function()
            row.append(time.perf_counter() - start)
        times.append(row)
    return times[1:]


def graph_seconds(calls):
    """Median seconds of a call, in a CUDA graph that runs through all of them."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


def copies(size, most):
    """How many weights of `size` bytes exceed an L2 cache: at least 2 and at most `most`."""
    return max(2, min(most, int(2.5e8 / size)))


def measure(M, N, K, device, rounds):
    """-> median seconds of each contender, and the median of each one's time over dense, both by name."""
    n_packed = 1
    n_dense = 1
    if device != "cpu":
        n_packed = copies(N * K / 4, most=160)
        n_dense = copies(N * K * 2, most=40)
    alphas = torch.full((1,), 0.02, device=device)
    x = torch.randn(M, K, device=device).bfloat16()
    different = [pack_ternary(torch.randint(-1, 2, (N, K), device=device)) for _ in range(min(4, n_packed))]
    packed = [different[i % len(different)].clone() for i in range(n_packed)]
    dense = [torch.randn(N, K, device=device).bfloat16() for _ in range(n_dense)]
    calls = {
        "ours": [lambda w=w: packed_linear(x, w, alphas, None) for w in packed],
        "dense": [lambda w=w: F.linear(x, w) for w in dense],
        "plain": [lambda w=w: packed_linear_plain(x, w, alphas, None) for w in packed[:n_dense]],
        "upstream": [lambda w=w: packed_linear_plain(x.float(), w, alphas, None) for w in packed[:n_dense]],
    }
    names = CONTENDERS[device]
    if device == "cpu":
        x_fp32 = x.float()  # what a layer gets from the residual stream
        calls["int8"] = [lambda: packed_linear(x_fp32, packed[0], alphas, None, torch.int8)]
        times = cpu_rounds([calls[name][0] for name in names], rounds)
    else:
        times = [[graph_seconds(calls[name]) for name in names]]
    seconds = {}
    over_dense = {}
    for i, name in enumerate(names):
        seconds[name] = statistics.median(row[i] for row in times)
        over_dense[name] = statistics.median(row[i] / row[names.index("dense")] for row in times)
    return seconds, over_dense


def report(layer, M, N, K, seconds, over_dense, ceilings):
    """Print a row of the table -> what the JSON file keeps of it."""
    ours = seconds["ours"]
    flops = 2 * M * N * K
    moved = N * K / 4 + 2 * M * (N + K)  # bytes: the packed weight, x and the result
    share_of_floor = None
    percent = "-"
    if ceilings:
        flops_per_second, bytes_per_second = ceilings
        share_of_floor = max(flops / flops_per_second, moved / bytes_per_second) / ours
        percent = f"{share_of_floor:.0%}"
    ratios = [f"{over_dense[name]:>9.2f}" if name in over_dense else f"{'-':>9}" for name in RATIOS]
    print(
        f"{layer:<15} {N:>5} {K:>5} {M:>5}"
        f" {ours * 1e6:>9.1f} {flops / ours / 1e9:>8.0f} {moved / ours / 1e9:>6.0f} {percent:>8}"
        f" {seconds['dense'] * 1e6:>9.1f} {' '.join(ratios)}",
        flush=True,
    )
    return dict(layer=layer, N=N, K=K, M=M, seconds=seconds, over_dense=over_dense, share_of_floor=share_of_floor)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--m", type=int, nargs="+", help="rows of x; 2 x 256 tokens are one guided 256x256 image")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="also write the figures here")
    args = p.parse_args()
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{torch.get_num_threads()} threads"
    ceilings = next((ceiling for board, ceiling in CEILINGS.items() if board in where), None)
    path = packed_path(args.device, torch.bfloat16)
    kernel, tokens = forced_kernel()
    print(f"{where}, torch {torch.__version__}, bf16; packed layers run by {path!r} (TERDIT_KERNEL {kernel}:{tokens})")
    print(f"{'layer':<15} {'N':>5} {'K':>5} {'M':>5} {'ours us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'of floor':>8}"
          f" {'dense us':>9} {' '.join(f'{name:>9}' for name in RATIOS)}  (the last four: times over dense's)")
    heights = args.m or HEIGHTS["cuda" if args.device == "cuda" else "cpu"]
    results = []
    with torch.no_grad():
        for (N, K), layer in SHAPES.items():
            for M in heights:
                check(M, N, K, args.device)
                seconds, over_dense = measure(M, N, K, args.device, args.rounds)
                results.append(report(layer, M, N, K, seconds, over_dense, ceilings))
    for M in sorted({row["M"] for row in results}):
        for name in ("ours", "int8"):
            ratios = [row["over_dense"][name] for row in results if row["M"] == M and name in row["over_dense"]]
            if ratios:
                median = statistics.median(ratios)
                print(f"M={M}: {name} / dense {median:.2f} in the median, {min(ratios):.2f} to {max(ratios):.2f}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
