"""How fast ternary weights are, against dense bf16 ones: a layer, whole models, a training step.

    python tests/bench_speed.py             all three parts, on the GPU if there is one
    python tests/bench_speed.py layers      every shape of 600M and 4.2B
    python tests/bench_speed.py models      600M, a guided step, an image: seconds, memory, errors
    python tests/bench_speed.py training    forward, backward and AdamW, ternary over dense

layers: "ours" is packed_linear, which on a CPU is exact for few rows and else rounds activations to
int8; "plain" first unpacks the weight to bf16 in memory. models: one set of random weights; packed,
with products in int8, bf16 and fp32 (on a CPU that is what TerDiT's released code does), and dense
in bf16. Errors are relative to fp32. Rivals take turns, so that a busy machine slows all of them.
Times are medians; a ratio is the median, and the quartiles, of all turns.
"""

import argparse
import ctypes
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import DEVICES, DTYPES, number, run_main, sample_latents  # noqa: E402
from terdit import NUM_TIMESTEPS, SIZES, Config, DiT, atomic_write, diffusion_of  # noqa: E402
from terdit import check_writable, cuda_kernel, in_dtype, launch_kernel, pack_ternary  # noqa: E402
from terdit import packed_linear, packed_linear_plain, unpack_ternary  # noqa: E402
from tests.baselines import MetaDiT, MetaDiTConfig  # noqa: E402


def over(times, base):
    """-> lower quartile, median, upper quartile of times[i] / base[i]."""
    ratios = [a / b for a, b in zip(times, base)]
    return tuple(statistics.quantiles(ratios, n=4, method="inclusive"))


def take_turns(works, seconds):
    """Call the works, functions by name that return a time, in turns, at least seven times -> all
    their times."""
    times = {name: [] for name in works}
    for work in works.values():
        work()  # warms up
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 7:
        for name, work in works.items():
            times[name].append(work())
    return times


def report(**figures):
    """Print the figures in a line, a ratio with its quartiles behind it -> the same, for --json."""
    words = []
    for name, value in figures.items():
        if isinstance(value, tuple):
            value = f"{value[1]:.3f} ({value[0]:.3f}-{value[2]:.3f})"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        words.append(f"{name} {value}")
    print(", ".join(words), flush=True)
    return figures


def check_json(path):
    """OSError now if write_json(path, ...) would fail later. None: nothing is to be written."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)


def write_json(path, results):
    if path:
        atomic_write(path, lambda file: file.write(json.dumps(results, indent=1).encode()))


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
MODES = ["int8", "bf16", "fp32", "dense"]  # int8 is for CPUs
CASES = [  # model, images
    ("tiny", Config(**SIZES["tiny"]), 16),
    ("600M block", Config(**SIZES["600M"] | dict(n_layers=1)), 4),
]
# Measured bf16 FLOP/s and bytes/s, of SXM boards
CEILINGS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12)}


def ours(x, weight, alphas, args):
    if args.device == "cpu":
        return packed_linear(x, weight, alphas, None, torch.int8)
    return launch_kernel(cuda_kernel(x.device), x, weight, alphas, None, args.kernel, args.tokens)


@lru_cache(maxsize=None)
def kernel_without_fence():
    """kernel.cu for Hopper without wgmma's proxy fence: only its time counts, its results may be
    wrong. The fence may wait for the copies that are on their way; this row shows what it costs."""
    source = (Path(__file__).resolve().parent.parent / "kernel.cu").read_text()
    fence = "    show_copies_to_wgmma();\n"
    assert source.count(fence) == 1, f"kernel.cu should have once {fence!r}"
    folder = Path(tempfile.mkdtemp())
    (folder / "kernel.cu").write_text(source.replace(fence, ""))
    flags = ["-O3", "-std=c++17", "-arch=sm_90a", "-Xcompiler", "-fPIC", "-shared"]
    library = str(folder / "kernel.so")
    subprocess.run(["nvcc", *flags, str(folder / "kernel.cu"), "-o", library], check=True)
    return ctypes.CDLL(library)


def check(M, N, K, args):
    """Exit if the layer is wrong. In x 1 and -1 are so rare that bf16 and int8 hold all sums."""
    codes = torch.randint(-1, 2, (N, K), device=args.device)
    kept = torch.rand(M, K, device=args.device) < 24 / K
    x = ((torch.randint(0, 2, (M, K), device=args.device) * 2 - 1) * kept).bfloat16()
    got = ours(x, pack_ternary(codes), torch.full((1,), 2.0, device=args.device), args)
    if not torch.equal(got.bfloat16().float(), 2 * (x.float() @ codes.float().T)):
        sys.exit(f"wrong result at M={M} N={N} K={K}: nothing is timed")


def make_clock(calls, device):
    """-> function that runs all the calls, on a GPU as a CUDA graph -> seconds of one."""
    calls[0]()  # what is compiled or chosen at the first call cannot be recorded in a graph
    if device == "cpu":
        return partial(timeit.timeit, calls[0], number=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def clock():
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return clock


def time_layer(M, N, K, args):
    """-> the times of each rival."""
    # Bytes of a rival's copies of the weight: more than an L2 cache
    n_bytes = 2.5e8 if args.device == "cuda" else 0
    alphas = torch.full((1,), 0.02, device=args.device)
    x = torch.randn(M, K, device=args.device).bfloat16()
    x_ours = x.float() if args.device == "cpu" else x  # what a layer gets from the residual stream
    weight = pack_ternary(torch.randint(-1, 2, (N, K), device=args.device))
    packed = [weight.clone() for _ in range(1 + int(n_bytes / (N * K / 4)))]
    n_dense = 1 + int(n_bytes / (N * K * 2))
    dense = [torch.randn(N, K, device=args.device).bfloat16() for _ in range(n_dense)]
    calls = {
        "ours": [lambda w=w: ours(x_ours, w, alphas, args) for w in packed],
        "dense": [lambda w=w: F.linear(x, w) for w in dense],
        "plain": [lambda w=w: packed_linear_plain(x, w, alphas, None) for w in packed[:n_dense]],
    }
    is_hopper = args.device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    if is_hopper and args.kernel in ("auto", "wgmma") and M > 16:
        library = kernel_without_fence()
        rest = (alphas, None, "wgmma", args.tokens)
        calls["no_fence"] = [lambda w=w: launch_kernel(library, x, w, *rest) for w in packed]
    return take_turns({name: make_clock(calls[name], args.device) for name in calls}, args.seconds)


@torch.no_grad()
def layers(args):
    where = torch.cuda.get_device_name() if args.device == "cuda" else ""
    ceilings = next((ceiling for board, ceiling in CEILINGS.items() if board in where), None)
    results = []
    for (N, K), layer in SHAPES.items():
        for M in args.rows:
            check(M, N, K, args)
            times = time_layer(M, N, K, args)
            ours_s = statistics.median(times["ours"])
            figures = dict(layer=layer, N=N, K=K, M=M, ours_us=1e6 * ours_s)
            figures["dense_us"] = 1e6 * statistics.median(times["dense"])
            figures["ours_over_dense"] = over(times["ours"], times["dense"])
            figures["plain_over_dense"] = over(times["plain"], times["dense"])
            if "no_fence" in times:
                figures["no_fence_over_ours"] = over(times["no_fence"], times["ours"])
            if ceilings:
                n_bytes = N * K / 4 + 2 * M * (N + K)  # the packed weight, x and the result
                least_s = max(2 * M * N * K / ceilings[0], n_bytes / ceilings[1])
                figures["share_of_ceiling"] = least_s / ours_s
            results.append(report(**figures))
    for M in args.rows:
        medians = [row["ours_over_dense"][1] for row in results if row["M"] == M]
        ratio = f"{statistics.median(medians):.2f} in the median of the shapes"
        print(f"M={M}: ours / dense {ratio}, {min(medians):.2f} to {max(medians):.2f}")
    return results


def serve(pipe, make, arguments):
    work = make(*arguments)
    with suppress(EOFError):  # nobody asks any more
        while True:
            pipe.send(work(pipe.recv()))


def start(make, *arguments):
    """-> function that has work(job) done in a new process, in which work = make(*arguments). In a
    process of its own no other model's memory counts, and no memory is reused that another one has
    freed. OSError: the process has died."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    main = partial(serve, theirs, make, arguments)
    process = context.Process(target=run_main, args=(main,), daemon=True)
    process.start()
    theirs.close()  # otherwise recv() would wait for ever for a process that has died

    def ask(job):
        try:
            pipe.send(job)
            return pipe.recv()
        except (EOFError, OSError):
            process.join()
            reason = f"exit code {process.exitcode}; -9 is mostly the system, short of memory"
            raise OSError(f"the process of {arguments!r:.99} has died ({reason})") from None

    return ask


@torch.no_grad()
def random_model(size, image_size, mode, device):
    """The same weights in every mode, made in place: what would be in memory twice would count."""
    with torch.device("meta"):
        if size == "DiT-XL/2":
            model = MetaDiT(MetaDiTConfig(input_size=image_size // 8)).to(torch.bfloat16)
        else:
            fields = dict(input_size=image_size // 8, ternary=mode != "dense")
            config = Config(**SIZES[size] | fields)
            dtype = torch.bfloat16 if mode == "dense" else DTYPES[mode]
            model = in_dtype(DiT(config, packed=config.ternary), dtype)
    model = model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    # A byte holds four codes of 0, 1 or 2. One block of random bytes serves all layers.
    codes = torch.randint(3, (4, 256, 8192), dtype=torch.uint8, device=device)
    codes = sum(codes[i] << 2 * i for i in range(4))
    for name, tensor in model.state_dict().items():
        if name.startswith("layers.") and tensor.ndim == 2:
            is_packed = tensor.dtype == torch.uint8
            n_rows = len(tensor) if is_packed else len(tensor) // 4
            packed = codes.repeat(n_rows // 256 + 1, 1)[:n_rows, : tensor.shape[1]]
            if is_packed:
                tensor.copy_(packed)
            else:
                tensor.copy_(unpack_ternary(packed)).mul_(0.02)
        elif tensor.ndim > 1:
            tensor.normal_(std=1.0 if "y_embedder" in name else 0.02)  # labels differ
        elif name.endswith("alphas"):
            tensor.fill_(0.02)
        elif name.endswith("adaLN_modulation.2.weight"):
            tensor.fill_(0.3)  # gates of a trained model's size
        else:
            tensor.fill_(1.0 if "norm" in name else 0.0)
    return model.eval()


@torch.no_grad()
def guided_step(model, device):
    """The model on two images, one with its class and one without; each time the same."""
    config = model.config
    torch.manual_seed(0)
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size, device=device)
    t = torch.tensor([500, 500], device=device)
    return model.forward_with_cfg(x, t, torch.tensor([7, config.num_classes], device=device), 4.0)


def make_model_work(size, image_size, mode, device, steps):
    """-> function of a job: seconds of a "step" or an "image" of so many steps, "bytes" so far, a
    step's "output"."""
    model = random_model(size, image_size, mode, device)

    def work(job):
        if job == "bytes":
            tensors = model.state_dict().values()
            in_memory = sum(z.numel() * z.element_size() for z in tensors)
            in_file = sum(z.numel() * (1 if z.dtype == torch.uint8 else 4) for z in tensors)  # fp32
            if device == "cuda":
                peak = torch.cuda.max_memory_allocated()
            else:  # not resource's ru_maxrss: it begins with the peak of the parent process
                status = Path("/proc/self/status").read_text()
                peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
            return dict(weights=in_memory, file=in_file, peak=peak)
        if job == "output":
            return guided_step(model, device).float().cpu().numpy()
        start = time.perf_counter()
        if job == "step":
            guided_step(model, device)
        else:
            y = torch.tensor([7])
            sample_latents(model, y, torch.tensor([0]), cfg_scale=4.0, steps=steps, sampler="dpm")
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return work


def models(args):
    asks = {}
    for mode in args.modes:
        asks[mode] = start(make_model_work, args.size, 256, mode, args.device, args.steps)
    steps = take_turns({mode: partial(ask, "step") for mode, ask in asks.items()}, args.seconds)
    outputs = {mode: ask("output") for mode, ask in asks.items()}
    results = []
    for mode, ask in asks.items():
        image_s = ask("image")
        n_bytes = ask("bytes")
        step_s = statistics.median(steps[mode])
        figures = dict(size=args.size, mode=mode, step_s=step_s, image_s=image_s)
        figures["image_steps"] = args.steps
        figures["weights_mb"] = n_bytes["weights"] / 1e6
        figures["peak_mb"] = n_bytes["peak"] / 1e6
        if "dense" in args.modes:
            figures["step_over_dense"] = over(steps[mode], steps["dense"])
        if "fp32" in args.modes:
            error = np.linalg.norm(outputs[mode] - outputs["fp32"])
            figures["error"] = float(error / np.linalg.norm(outputs["fp32"]))
        results.append(report(**figures))
    return results


def make_training_work(config, n, bf16, compiled, device):
    """-> function that trains a model of this config for one step, always on the same n images, and
    times it."""
    with torch.device(device):
        model = DiT(config)
        x0 = torch.randn(n, config.in_channels, config.input_size, config.input_size)
        y = torch.randint(config.num_classes, (n,))
        t = torch.randint(NUM_TIMESTEPS, (n,))
    if compiled:
        for block in model.layers:
            block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    diffusion = diffusion_of(config)

    def work(job):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            losses = diffusion.training_losses(model, x0, t, y, noise=torch.randn_like(x0))
            loss = losses["mse"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return work


def training(args):
    results = []
    for (name, config, n), bf16, compiled in itertools.product(CASES, (False, True), (False, True)):
        works = {}
        for ternary in (False, True):
            rival = replace(config, ternary=ternary)
            ask = start(make_training_work, rival, n, bf16, compiled, args.device)
            works[ternary] = partial(ask, "step")
        times = take_turns(works, args.seconds)
        figures = dict(model=name, images=n, bf16=bf16, compiled=compiled)
        figures["dense_s"] = statistics.median(times[False])
        figures["ternary_over_dense"] = over(times[True], times[False])
        results.append(report(**figures))
    return results


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    parts = dict(layers=layers, models=models, training=training)
    count = number(int, 1)
    modes = MODES if DEVICES == ["cpu"] else MODES[1:]
    flag("part", nargs="?", choices=parts)
    flag("--device", choices=DEVICES, default=DEVICES[0])
    flag("--seconds", type=number(float, 0), default=5, help="of a row's turns (default 5)")
    flag("--rows", type=count, nargs="+", default=[1, 2, 4, 16, 512, 2048], help="layers: M of x")
    flag("--kernel", default="auto", help="layers on a GPU: naive, small_batch, mma or wgmma")
    flag("--tokens", type=int, default=0, help="layers on a GPU: of a thread block's tile")
    flag("--size", choices=SIZES, default="600M", help="models")
    flag("--modes", nargs="+", choices=MODES, default=modes, help="models")
    flag("--steps", type=number(int, 1, NUM_TIMESTEPS), default=16, help="models: of an image, dpm")
    flag("--json", help="also write the figures to this file")
    args = parser.parse_args()
    check_json(args.json)
    print(f"{torch.get_num_threads()} threads, {args.device}, torch {torch.__version__}")
    results = {name: part(args) for name, part in parts.items() if args.part in (None, name)}
    write_json(args.json, results)


if __name__ == "__main__":
    run_main(main)
