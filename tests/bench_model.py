"""A whole model at its real size, random weights: one guided step and a sampling run; seconds, bytes, peak memory.

    python tests/bench_model.py                          600M at 256x256, on a GPU also 512x512 and 4.2B
    python tests/bench_model.py --size 4.2B --modes packed

    int8       ours: 2 bits a weight in memory, activations in int8 (on a CPU)
    packed     ours, products in bf16
    dense      Large-DiT of the same size in bf16, which packed layers should not be slower than
    upstream   TerDiT's released code's way: packed in memory, unpacked to fp32 at every call, multiplied in fp32

A process of its own measures each row. A ratio comes from two processes that take turns. A sampling run is of
DPM-Solver++; the paper's 250 steps of DDPM take 250 times a step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import peak_memory, sample_latents  # noqa: E402
from terdit import SIZES, Config, DiT, MetaDiTConfig, MetaDiT, PackedTernaryLinear, packed_linear_plain  # noqa: E402
from terdit import packed_path, unpack_ternary  # noqa: E402
from tests.turns import in_turns  # noqa: E402

MODES = ["int8", "packed", "dense", "upstream"]
RUN_STEPS = 16  # of DPM-Solver++, in a sampling run


def empty_model(size, image_size, mode):
    """A model on the meta device: shapes without memory."""
    latent_size = image_size // 8
    with torch.device("meta"):
        if size == "DiT-XL/2":
            return MetaDiT(MetaDiTConfig(input_size=latent_size))
        fields = SIZES[size] | dict(input_size=latent_size)
        if mode == "dense":
            return DiT(Config(**fields, ternary=False, adaln_norm=False))
        return DiT(Config(**fields), packed=True)


def fill_packed(module, codes, device):
    """Give a packed layer a scale and the given codes (256, 8192), repeated down its rows."""
    module.alphas.data = torch.full((1,), 0.02, device=device)
    for rows in module.weight.split(256):
        rows.copy_(codes[: len(rows), : rows.shape[1]])


def upstream_forward(module, x):
    return packed_linear_plain(x.float(), module.weight, module.alphas, module.bias)


def random_model(size, image_size, mode, device):
    model = empty_model(size, image_size, mode)
    if mode in ("packed", "int8"):  # all else is in fp32, as load_model leaves it
        model.set_product_dtype(torch.int8 if mode == "int8" else torch.bfloat16)
    elif mode == "dense":
        model = model.to(torch.bfloat16)
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.zeros_(parameter)
    # A byte holds four codes of 0, 1 or 2. One block of random bytes serves all layers: more would count as memory.
    codes = sum(torch.randint(3, (256, 8192), dtype=torch.uint8, device=device) << shift for shift in (0, 2, 4, 6))
    for module in model.modules():
        if isinstance(module, PackedTernaryLinear):
            fill_packed(module, codes, device)
            if mode == "upstream":
                module.forward = partial(upstream_forward, module)
    return model.eval().requires_grad_(False)


def synchronize(device):
    """Wait until the GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def step_seconds(model, device):
    """Seconds of one guided step: the model runs on two images, one with its class and one without."""
    config = model.config
    dtype = next(model.parameters()).dtype
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size, device=device, dtype=dtype)
    t = torch.tensor([500, 500], device=device)
    y = torch.tensor([207, config.num_classes], device=device)
    synchronize(device)
    start = time.perf_counter()
    model.forward_with_cfg(x, t, y, 4.0)
    synchronize(device)
    return time.perf_counter() - start


def run_seconds(model, device, steps):
    """Seconds of sampling one image."""
    start = time.perf_counter()
    sample_latents(model, y=[207], index=[0], cfg_scale=4.0, steps=steps, sampler="dpm")
    synchronize(device)
    return time.perf_counter() - start


def median_step(model, device):
    """Median seconds of a step: of ten steps, or of as many as end within ten seconds, after one that warms up.

    A step of 20 seconds or more is timed only once.
    """
    warm_up = step_seconds(model, device)
    if warm_up >= 20:
        return warm_up
    times = [step_seconds(model, device)]
    while len(times) < 10 and warm_up + sum(times) < 10:
        times.append(step_seconds(model, device))
    return statistics.median(times)


def measure(size, image_size, mode, device, steps):
    """Seconds of a step, and of a run of `steps` (0: none); bytes of the weights and of their file; peak memory."""
    model = random_model(size, image_size, mode, device)
    weight_bytes = 0
    file_bytes = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        weight_bytes += tensor.numel() * tensor.element_size()
        if tensor.dtype == torch.uint8:
            file_bytes += tensor.numel()
        else:
            file_bytes += 4 * tensor.numel()  # fp32, as released
    step_s = median_step(model, device)
    run_s = None
    too_slow = mode == "upstream" and device == "cpu"
    if steps and not too_slow:
        run_s = run_seconds(model, device, steps)
    return dict(step_s=step_s, run_s=run_s, weight_bytes=weight_bytes, file_bytes=file_bytes,
                peak_bytes=peak_memory(device))


def in_its_own_process(*arguments):
    """measure(*arguments) in a new process, so that no other model's memory counts.

    RuntimeError says in one line what went wrong there.
    """
    child = subprocess.run([sys.executable, __file__, "--one", json.dumps(arguments)], capture_output=True, text=True)
    if child.returncode != 0:
        errors = child.stderr.strip().splitlines() or ["killed, probably out of memory"]
        raise RuntimeError(errors[-1][:100])
    return json.loads(child.stdout.splitlines()[-1])


def make_timer(size, image_size, mode, device, clock):
    model = random_model(size, image_size, mode, device)
    return lambda: clock(model, device)


def over_dense(mode, size, image_size, device, rounds, clock):
    """The ratio of each round, sorted. clock(model, device) does the work once and returns its seconds."""
    rivals = [(size, image_size, rival, device, clock) for rival in (mode, "dense")]
    return sorted(packed / dense for packed, dense in in_turns(make_timer, rivals, 0, rounds))


@torch.no_grad()
def errors(size, image_size):
    """Relative errors of a guided step on a CPU against products in fp32, by mode, of one set of random weights."""
    packed = random_model(size, image_size, "packed", "cpu")
    torch.nn.init.normal_(packed.y_embedder.embedding_table.weight, std=1.0)  # two labels that differ
    for block in packed.layers:
        block.adaLN_modulation[2].weight.data.fill_(0.3)  # gates of a trained model's size
    config = packed.config
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    inputs = (x, torch.tensor([500, 500]), torch.tensor([207, config.num_classes]), 4.0)
    outs = {}
    for mode, dtype in (("fp32", torch.float32), ("packed", torch.bfloat16), ("int8", torch.int8)):
        packed.set_product_dtype(dtype)
        outs[mode] = packed.forward_with_cfg(*inputs)
    with torch.device("meta"):
        dense = DiT(replace(config, ternary=False)).to(torch.bfloat16)
    state = {}
    for name, value in packed.state_dict().items():
        if value.dtype == torch.uint8:
            value = unpack_ternary(value) * packed.get_parameter(name.removesuffix("weight") + "alphas")
        if not name.endswith("alphas"):
            state[name] = value.to(torch.bfloat16)
    dense.load_state_dict(state, assign=True)
    outs["dense"] = dense.forward_with_cfg(*inputs)
    want = outs.pop("fp32")
    return {mode: ((out.float() - want).norm() / want.norm()).item() for mode, out in outs.items()}


def report_row(size, image_size, mode, args, results):
    """Measure and print a row of the table, and add it to results."""
    start = f"{size:<5} {image_size:>5} {mode:<9}"
    try:
        row = in_its_own_process(size, image_size, mode, args.device, args.steps)
    except RuntimeError as e:
        print(f"{start} failed: {e}")
        return
    run = f"{row['run_s']:8.2f}" if row["run_s"] else f"{'-':>8}"
    weight_mb = row["weight_bytes"] / 1e6
    peak_mb = row["peak_bytes"] / 1e6
    print(f"{start} {row['step_s']:8.3f} {run} {weight_mb:11.1f} {peak_mb:9.1f}", flush=True)
    results.append(dict(size=size, image_size=image_size, mode=mode, steps=args.steps, **row))


def report_ratios(mode, size, image_size, args, results):
    """Measure and print the line that compares a mode with dense, and add it to results."""
    start = f"{size:<5} {image_size:>5} {mode} / dense"
    run_ratios = []
    try:
        step_ratios = over_dense(mode, size, image_size, args.device, args.rounds, step_seconds)
        if args.steps:
            rounds = max(2, args.rounds // 4)
            clock = partial(run_seconds, steps=args.steps)
            run_ratios = over_dense(mode, size, image_size, args.device, rounds, clock)
    except (EOFError, OSError):  # the process has printed its own error
        print(f"{start} failed: one of the two died")
        return
    words = []
    for kind, ratios in (("step", step_ratios), ("run", run_ratios)):
        if ratios:
            words.append(f"{kind} {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})")
    print(f"{start}, in turns: {', '.join(words)}", flush=True)
    results.append(dict(size=size, image_size=image_size, mode=f"{mode} / dense",
                        step_ratios=step_ratios, run_ratios=run_ratios))


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, nargs="+")
    p.add_argument("--image-size", type=int, nargs="+")
    p.add_argument("--modes", nargs="+", choices=MODES)
    p.add_argument("--steps", type=int, default=RUN_STEPS, help="steps of dpm in a sampling run, 0 for no run")
    p.add_argument("--rounds", type=int, default=9, help="turns of the ratio's measurement, 0 for none")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="also write the figures here")
    p.add_argument("--one", help=argparse.SUPPRESS)  # JSON of measure's arguments, from in_its_own_process
    return p.parse_args()


def main():
    args = parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
        sizes = args.size or ["600M", "4.2B"]
        image_sizes = args.image_size or [256, 512]
    else:
        where = f"{torch.get_num_threads()} threads"
        sizes = args.size or ["600M"]
        image_sizes = args.image_size or [256]
    print(f"{where}, torch {torch.__version__}; packed layers run by {packed_path(args.device, torch.bfloat16)!r}; "
          f"a guided step is 2 images, a run {args.steps} steps")
    print(f"{'size':<5} {'image':>5} {'mode':<9} {'step s':>8} {'run s':>8} {'weights MB':>11} {'peak MB':>9}")
    args.modes = args.modes or (MODES if args.device == "cpu" else MODES[1:])
    results = []
    for size in sizes:
        for image_size in image_sizes:
            for mode in args.modes:
                report_row(size, image_size, mode, args, results)
            for mode in ("int8", "packed"):
                if args.rounds and mode in args.modes and "dense" in args.modes:
                    report_ratios(mode, size, image_size, args, results)
            if args.device == "cpu" and "dense" in args.modes:
                found = errors(size, image_size)
                words = ", ".join(f"{mode} {error:.1e}" for mode, error in found.items())
                print(f"{size:<5} {image_size:>5} error against products in fp32: {words}", flush=True)
                results.append(dict(size=size, image_size=image_size, mode="errors", **found))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
