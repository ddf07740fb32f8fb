"""A whole model at its real size, random weights: one guided step and a sampling run; seconds, bytes, peak memory.

    python tests/bench_model.py                          600M at 256x256, on a GPU also 512x512 and 4.2B
    python tests/bench_model.py --size 4.2B --modes packed

    packed     ours: 2 bits a weight in memory
    dense      Large-DiT of the same size in bf16: what packing is to be no slower than
    upstream   TerDiT's released code's way: packed in memory, unpacked to fp32 at every call, multiplied in fp32

Every row comes from a process of its own. The ratio comes from two that take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import terdit  # noqa: E402
from sample import peak_memory, sample_latents  # noqa: E402
from terdit import SIZES, Config, DiT, PackedTernaryLinear, packed_linear_plain  # noqa: E402
from tests.baselines import DiTConfig, DiTXL  # noqa: E402
from tests.turns import in_turns  # noqa: E402


def random_model(size, image_size, mode, device):
    with torch.device("meta"):
        if size == "DiT-XL/2":
            model = DiTXL(DiTConfig(input_size=image_size // 8))
        else:
            dense = dict(ternary=False, adaln_norm=False) if mode == "dense" else {}
            model = DiT(Config(**SIZES[size] | dense | dict(input_size=image_size // 8)), packed=mode != "dense")
    dtype = torch.float32 if mode == "upstream" else torch.bfloat16
    model = model.to(dtype).to_empty(device=device)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.constant_(p, float("norm" in name))
    # Four random codes of 0, 1, 2 a byte: one block for all layers, which spares the memory that is to be measured.
    codes = sum(torch.randint(3, (256, 8192), dtype=torch.uint8, device=device) << s for s in (0, 2, 4, 6))
    for module in model.modules():
        if isinstance(module, PackedTernaryLinear):
            module.alphas.data = torch.full((1,), 0.02, device=device)
            for part in module.weight.split(256):
                part.copy_(codes[: len(part), : part.shape[1]])
            if mode == "upstream":
                module.forward = lambda x, m=module: packed_linear_plain(x.float(), m.weight, m.alphas, m.bias)
    return model.eval().requires_grad_(False)


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def step_seconds(model, device):
    config = model.config
    dtype = next(model.parameters()).dtype
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size, device=device, dtype=dtype)
    t, y = torch.tensor([500, 500], device=device), torch.tensor([207, config.num_classes], device=device)
    sync(device)
    start = time.perf_counter()
    model.forward_with_cfg(x, t, y, 4.0)
    sync(device)
    return time.perf_counter() - start


def run_seconds(model, device, steps):
    start = time.perf_counter()
    sample_latents(model, [(0, 207)], 0, 4.0, steps, "ddpm")
    sync(device)
    return time.perf_counter() - start


def measure(size, image_size, mode, device, steps):
    """Median seconds of a step, of ten or as many as ten seconds hold; of a run of `steps` (0: none); bytes."""
    model = random_model(size, image_size, mode, device)
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    file = sum(t.numel() * (1 if t.dtype == torch.uint8 else 4) for t in tensors)  # the rest in fp32, as released
    times = [step_seconds(model, device)]
    while times[0] < 20 and (len(times) < 2 or len(times) <= 10 and sum(times) < 10):
        times.append(step_seconds(model, device))
    step = statistics.median(times[1:] or times)  # the first one warms up, and is all there is if it took 20 seconds
    run = run_seconds(model, device, steps) if steps and not (mode == "upstream" and device == "cpu") else None
    return dict(step_s=step, run_s=run, weight_bytes=weights, file_bytes=file, peak_bytes=peak_memory(device))


def in_its_own_process(*arguments):
    """measure(*arguments) there, so that its memory is its own. RuntimeError says in one line what went wrong."""
    child = subprocess.run([sys.executable, __file__, "--one", json.dumps(arguments)], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or ["killed, probably out of memory"])[-1][:100])
    return json.loads(child.stdout.splitlines()[-1])


def stepper(size, image_size, mode, device, seconds, *steps):
    model = random_model(size, image_size, mode, device)
    return lambda: seconds(model, device, *steps)


def ratios(size, image_size, device, steps, rounds):
    """packed / dense of a step and of a run: each turn's, sorted."""

    def measure(rounds, *clock):
        rivals = [(size, image_size, mode, device, *clock) for mode in ("packed", "dense")]
        return sorted(packed / dense for packed, dense in in_turns(stepper, rivals, 0, rounds))

    step_ratios = measure(rounds, step_seconds)
    run_ratios = measure(max(2, rounds // 4), run_seconds, steps) if steps else []
    return dict(step_ratios=step_ratios, run_ratios=run_ratios)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, nargs="+")
    p.add_argument("--image-size", type=int, nargs="+")
    p.add_argument(
        "--modes", nargs="+", choices=["packed", "dense", "upstream"], default=["packed", "dense", "upstream"]
    )
    p.add_argument("--steps", type=int, default=16, help="denoising steps of the sampling run")
    p.add_argument("--rounds", type=int, default=9, help="turns of the ratio's measurement, 0 for none")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="also write the figures here")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    gpu = args.device == "cuda"
    sizes = args.size or (["600M", "4.2B"] if gpu else ["600M"])
    image_sizes = args.image_size or ([256, 512] if gpu else [256])
    where = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    path = terdit.packed_path(args.device, torch.bfloat16)
    print(
        f"{where}, torch {torch.__version__}; packed layers run by {path!r}; a guided step is 2 images, a run {args.steps} steps"
    )
    print(f"{'size':<5} {'image':>5} {'mode':<9} {'step s':>8} {'run s':>8} {'weights MB':>11} {'peak MB':>9}")
    results = []
    for size in sizes:
        for image_size in image_sizes:
            for mode in args.modes:
                try:
                    row = in_its_own_process(size, image_size, mode, args.device, args.steps)
                except RuntimeError as e:
                    print(f"{size:<5} {image_size:>5} {mode:<9} failed: {e}")
                    continue
                results.append(dict(size=size, image_size=image_size, mode=mode, steps=args.steps, **row))
                run = f"{row['run_s']:8.2f}" if row["run_s"] else "       -"
                print(f"{size:<5} {image_size:>5} {mode:<9} {row['step_s']:8.3f} {run} {row['weight_bytes'] / 1e6:11.1f} "
                      f"{row['peak_bytes'] / 1e6:9.1f}", flush=True)  # fmt: skip
            if args.rounds and {"packed", "dense"} <= set(args.modes):
                try:
                    row = ratios(size, image_size, args.device, args.steps, args.rounds)
                except (EOFError, OSError):  # its own words are above
                    print(f"{size:<5} {image_size:>5} packed / dense failed: one of the two died")
                    continue
                results.append(dict(size=size, image_size=image_size, mode="packed / dense", **row))
                words = [
                    f"{kind} {statistics.median(v):.3f} ({v[0]:.3f}-{v[-1]:.3f})"
                    for kind in ("step", "run")
                    if (v := row[f"{kind}_ratios"])
                ]
                print(f"{size:<5} {image_size:>5} packed / dense, in turns: {', '.join(words)}", flush=True)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
