"""What ternary weights cost a training step: its time over the time of the same step with dense weights.

    python tests/bench_qat.py

The two models step in turns (forward, backward, fused AdamW), each in a process of its own. The ratio is the median of
the ratios of neighbouring steps; their quartiles are printed beside it.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from terdit import SIZES, Config, DiT, GaussianDiffusion  # noqa: E402
from tests.turns import in_turns  # noqa: E402

TINY = Config(**SIZES["tiny"])
BLOCK = Config(**SIZES["600M"] | dict(n_layers=1))
MODELS = [("tiny", TINY, 32), ("tiny", TINY, 64), ("600M block", BLOCK, 4), ("600M block", BLOCK, 8)]  # batch sizes


def step_seconds(model, optimizer, batch, bf16):
    x0, y, t, noise = batch
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = GaussianDiffusion().training_losses(model, x0, t, y, noise)["mse"].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def make_stepper(config, n, bf16):
    """-> a function that trains a model of this config for one step, always on the same batch of n, and times it."""
    model = DiT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (n, config.in_channels, config.input_size, config.input_size)
    x0 = torch.randn(shape)
    y = torch.randint(config.num_classes, (n,))
    t = torch.randint(1000, (n,))
    noise = torch.randn(shape)
    return lambda: step_seconds(model, optimizer, (x0, y, t, noise), bf16)


def measure(name, config, n, bf16, seconds):
    """Time dense and ternary steps in turns, print a row of the table -> what the JSON file keeps of it."""
    rivals = [(replace(config, ternary=ternary), n, bf16) for ternary in (False, True)]
    pairs = in_turns(make_stepper, rivals, seconds, least=15)
    dense = statistics.median(dense for dense, _ in pairs)
    ternary = statistics.median(ternary for _, ternary in pairs)
    low, ratio, high = statistics.quantiles((ternary / dense for dense, ternary in pairs), n=4)
    tokens = n * (config.input_size // config.patch_size) ** 2
    dtype = "bf16 autocast" if bf16 else "fp32"
    print(f"{name:<12} {tokens:>6} {dtype:>14} {dense * 1e3:>9.1f} {ternary * 1e3:>10.1f} {ratio:>6.3f}"
          f" {low:>6.2f}-{high:.2f} {len(pairs):>5}", flush=True)
    return dict(model=name, tokens=tokens, dtype=dtype, dense_s=dense, ternary_s=ternary, ratio=ratio,
                quartiles=[low, high], pairs=len(pairs))


def main():
    parser = argparse.ArgumentParser(description="training step with ternary weights against dense weights")
    parser.add_argument("--seconds", type=float, default=40, help="how long each of the eight cells is measured")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'model':<12} {'tokens':>6} {'dtype':>14} {'dense ms':>9} {'ternary ms':>10} {'ratio':>6}"
          f" {'quartiles':>12} pairs")
    results = []
    for name, config, n in MODELS:
        for bf16 in (False, True):
            results.append(measure(name, config, n, bf16, args.seconds))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
