"""How many steps each sampler needs, what int8 costs, and what a guidance interval saves: the toy FID and seconds of
demo checkpoints, one FID for each checkpoint.

    python tests/bench_samplers.py runs/demo/packed.pt [OTHER_CKPT ...]

1,000 samples a cell, of the same noise, guidance 1.5; the judge and its FID are bench_quality.py's. Outside a guidance
interval the model runs without its unconditional half: the seconds show what that saves.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import DTYPES, sample_images  # noqa: E402
from terdit import load_model  # noqa: E402
from tests.bench_quality import Exam  # noqa: E402

ROWS = [  # sampler, steps, dtype, guidance interval
    ("ddpm", 25, "fp32", None),
    ("ddim", 16, "fp32", None),
    ("ddim", 25, "fp32", None),
    ("dpm", 8, "fp32", None),
    ("dpm", 12, "fp32", None),
    ("dpm", 16, "fp32", None),
    ("dpm", 25, "fp32", None),
    ("dpm", 16, "fp32", (0, 500)),  # not where there is most noise, which Kynkaanniemi et al. found harmful
    ("dpm", 16, "fp32", (100, 500)),  # nor where there is least, where they found it of little use
    ("dpm", 16, "fp32", (500, 999)),  # the other half, to compare with
    ("ddpm", 25, "int8", None),
    ("dpm", 16, "int8", None),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", nargs="+")
    parser.add_argument("-n", type=int, default=1000, help="samples of a cell")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    exam = Exam(load_model(args.ckpt[0]).config.input_size)
    y = torch.arange(args.n) % 10
    results = []
    print("| sampler | steps | products | guided at | s, median | accuracy, % | toy FID, median | by checkpoint |")
    print("|---|---|---|---|---|---|---|---|")
    for sampler, steps, dtype, interval in ROWS:
        qualities = []
        seconds = []
        for path in args.ckpt:
            model = load_model(path, dtype=DTYPES[dtype])
            start = time.time()
            images = sample_images(model, y, steps=steps, sampler=sampler, guidance_interval=interval)
            seconds.append(time.time() - start)
            qualities.append(exam.quality(images, y))
        fids = [quality["fid"] for quality in qualities]
        accuracy = statistics.median(100 * quality["accuracy"] for quality in qualities)
        by_checkpoint = ", ".join(f"{fid:.2f}" for fid in fids)
        guided_at = f"{interval[0]} to {interval[1]}" if interval else "all"
        print(f"| {sampler} | {steps} | {dtype} | {guided_at} | {statistics.median(seconds):.1f} | {accuracy:.1f} | "
              f"{statistics.median(fids):.2f} | {by_checkpoint} |", flush=True)
        results.append(dict(sampler=sampler, steps=steps, dtype=dtype, guidance_interval=interval, n=args.n,
                            seconds=seconds, qualities=qualities))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
