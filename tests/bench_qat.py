"""What ternary weights cost a training step: its time over the time of the same step with dense weights.

    python tests/bench_qat.py

Both models are stepped in turn in one process (forward, backward, fused AdamW), so that a busy machine slows both. The
ratio is the median of the ratios of neighbouring steps.
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


def step_seconds(model, optimizer, batch, bf16):
    x0, y, t, noise = batch
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = GaussianDiffusion().training_losses(model, x0, t, y, noise)["mse"].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def compare(config, n, bf16, rounds):
    """Median seconds of a dense and of a ternary step, and the median ratio of the two."""
    models = [DiT(replace(config, ternary=ternary)) for ternary in (False, True)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in models]
    shape = (n, config.in_channels, config.input_size, config.input_size)
    batch = torch.randn(shape), torch.randint(config.num_classes, (n,)), torch.randint(1000, (n,)), torch.randn(shape)
    times = [[step_seconds(m, o, batch, bf16) for m, o in zip(models, optimizers)] for _ in range(rounds + 2)][2:]
    return *(statistics.median(column) for column in zip(*times)), statistics.median(b / a for a, b in times)


def main():
    parser = argparse.ArgumentParser(description="training step with ternary weights against dense weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    block = Config(**{**SIZES["600M"], "n_layers": 1})
    tiny = Config(**SIZES["tiny"])
    results = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} interleaved rounds")
    print(f"{'model':<12} {'tokens':>6} {'dtype':>14} {'dense ms':>9} {'ternary ms':>10} {'ratio':>6}")
    for name, config, n in (("tiny", tiny, 32), ("tiny", tiny, 64), ("600M block", block, 4), ("600M block", block, 8)):
        for bf16 in (False, True):
            dense, ternary, ratio = compare(config, n, bf16, args.rounds)
            tokens = n * (config.input_size // config.patch_size) ** 2
            dtype = "bf16 autocast" if bf16 else "fp32"
            print(
                f"{name:<12} {tokens:>6} {dtype:>14} {dense * 1e3:>9.1f} {ternary * 1e3:>10.1f} {ratio:>6.3f}",
                flush=True,
            )
            results.append(dict(model=name, tokens=tokens, dtype=dtype, dense_s=dense, ternary_s=ternary, ratio=ratio))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
