"""One packed layer at every shape of 600M and 4.2B, against what a user would run instead.

    python tests/bench_kernel.py             a table, on the GPU if there is one, else on the CPU

    ours       packed_linear: kernel.cu on a GPU, blocks widened in cache on a CPU
    dense      F.linear with bf16 weights: cuBLAS or oneDNN
    plain      unpack to bf16 in memory, then F.linear
    upstream   TerDiT's released code's way: unpack to fp32, times alpha, F.linear in fp32

Each shape's result is checked before it is timed. On a CPU the four take turns and the ratios are medians of turns. On
a GPU each is timed in a CUDA graph over copies of the weights larger than its L2 cache.
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
from terdit import forced_kernel, pack_ternary, packed_linear, packed_linear_plain, packed_path  # noqa: E402

SHAPES = {  # (N, K): where
    (1536, 1536): "600M attention", (4096, 1536): "600M w1, w3", (1536, 4096): "600M w2", (9216, 1024): "600M adaLN",
    (3072, 3072): "4.2B attention", (8192, 3072): "4.2B w1, w3", (3072, 8192): "4.2B w2", (18432, 1024): "4.2B adaLN",
}  # fmt: skip
CEILINGS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12)}  # measured bf16 FLOP/s and bytes/s, of SXM boards


def check(M, N, K, device):
    """Small integers, so that every sum is exact in fp32: the result must be, too. Twice, to the bit."""
    codes = torch.randint(-1, 2, (N, K), device=device)
    x = (torch.randint(-2, 3, (M, K), device=device) * (torch.rand(M, K, device=device) < 24 / K)).bfloat16()
    want = 2 * (x.float() @ codes.float().T)
    packed, alphas = pack_ternary(codes), torch.full((1,), 2.0, device=device)
    torch.full((M, N), float("nan"), dtype=x.dtype, device=device)  # the allocator hands this memory out again
    got = packed_linear(x, packed, alphas, None)
    if not (torch.equal(got.float(), want) and torch.equal(got, packed_linear(x, packed, alphas, None))):
        sys.exit(f"wrong result at M={M} N={N} K={K}: nothing is timed")


def turns(functions, rounds):
    """Seconds of each function in each round."""
    times = []
    for _ in range(rounds + 1):
        row = []
        for f in functions:
            start = time.perf_counter()
            f()
            row.append(time.perf_counter() - start)
        times.append(row)
    return times[1:]


def graph_seconds(calls):
    """Median seconds of a call, in a CUDA graph that runs through all of them."""
    for f in calls[:3]:
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in calls:
            f()
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


def measure(M, N, K, device, rounds):
    """-> seconds of ours, dense, plain and upstream, and the ratios of the others to ours and of ours to dense."""
    copies = 1 if device == "cpu" else max(2, min(160, int(2.5e8 / (N * K / 4))))
    few = 1 if device == "cpu" else max(2, min(40, int(2.5e8 / (N * K * 2))))
    alphas = torch.full((1,), 0.02, device=device)
    x = torch.randn(M, K, device=device).bfloat16()
    packed = [pack_ternary(torch.randint(-1, 2, (N, K), device=device)) for _ in range(min(4, copies))]
    packed = [packed[i % len(packed)].clone() for i in range(copies)]
    dense = [torch.randn(N, K, device=device).bfloat16() for _ in range(few)]
    calls = [
        [lambda w=w: packed_linear(x, w, alphas, None) for w in packed],
        [lambda w=w: F.linear(x, w) for w in dense],
        [lambda w=w: packed_linear_plain(x, w, alphas, None) for w in packed[:few]],
        [lambda w=w: packed_linear_plain(x.float(), w, alphas, None) for w in packed[:few]],
    ]
    rows = turns([c[0] for c in calls], rounds) if device == "cpu" else [[graph_seconds(c) for c in calls]]
    seconds = [statistics.median(column) for column in zip(*rows)]
    return seconds, [statistics.median(row[i] / row[0] for row in rows) for i in range(4)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--m", type=int, nargs="+", help="rows of x; 2 x 256 tokens are one guided 256x256 image")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="also write the figures here")
    args = p.parse_args()
    gpu = args.device == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    ceilings = next((c for key, c in CEILINGS.items() if key in name), None)
    path, forced = packed_path(args.device, torch.bfloat16), ":".join(map(str, forced_kernel()))
    print(f"{name}, torch {torch.__version__}, bf16; packed layers run by {path!r} (TERDIT_KERNEL {forced})")
    print(f"{'layer':<15} {'N':>5} {'K':>5} {'M':>5} {'ours us':>9} {'GFLOP/s':>8} {'GB/s':>6}"
          f" {'of floor':>8} {'dense us':>9} {'ours/dense':>10} {'plain/ours':>10} {'upstr./ours':>11}")  # fmt: skip
    results = []
    with torch.no_grad():
        for (N, K), where in SHAPES.items():
            for M in args.m or ((1, 2, 16, 64, 512, 2048, 4096) if gpu else (1, 2, 16, 64, 512, 2048)):
                check(M, N, K, args.device)
                (ours, dense, plain, theirs), ratio = measure(M, N, K, args.device, args.rounds)
                flops, moved = 2 * M * N * K, N * K / 4 + 2 * M * (N + K)
                floor = max(flops / ceilings[0], moved / ceilings[1]) / ours if ceilings else None
                results.append(dict(layer=where, N=N, K=K, M=M, ours_s=ours, dense_s=dense, plain_s=plain, upstream_s=theirs,
                                    ours_over_dense=1 / ratio[1], share_of_floor=floor))  # fmt: skip
                print(f"{where:<15} {N:>5} {K:>5} {M:>5} {ours * 1e6:>9.1f} {flops / ours / 1e9:>8.0f} {moved / ours / 1e9:>6.0f}"
                      f" {f'{floor:.0%}' if floor else '-':>8} {dense * 1e6:>9.1f} {1 / ratio[1]:>10.2f} {ratio[2]:>10.2f} {ratio[3]:>11.2f}",
                      flush=True)  # fmt: skip
    for M in sorted({r["M"] for r in results}):
        part = [r["ours_over_dense"] for r in results if r["M"] == M]
        print(f"M={M}: ours / dense {statistics.median(part):.2f} in the median, {min(part):.2f} to {max(part):.2f}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
