"""How many steps each sampler needs, and what int8 costs: the toy FID of demo checkpoints, one column a checkpoint.

    python tests/bench_samplers.py runs/demo/packed.pt [OTHER_CKPT ...]      (four minutes a checkpoint)

1,000 samples a cell, of the same noise, guidance 1.5; the judge and its FID are bench_quality.py's.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import DTYPES, sample_images  # noqa: E402
from terdit import load_model  # noqa: E402
from tests.bench_quality import Exam  # noqa: E402

ROWS = [  # sampler, steps, dtype
    ("ddpm", 25, "fp32"),
    ("ddim", 16, "fp32"),
    ("ddim", 25, "fp32"),
    ("dpm", 8, "fp32"),
    ("dpm", 12, "fp32"),
    ("dpm", 16, "fp32"),
    ("dpm", 25, "fp32"),
    ("ddpm", 25, "int8"),
    ("dpm", 16, "int8"),
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
    print("| sampler | steps | products | accuracy, % | toy FID, median | by checkpoint |\n|---|---|---|---|---|---|")
    for sampler, steps, dtype in ROWS:
        qualities = []
        for path in args.ckpt:
            model = load_model(path, dtype=DTYPES[dtype])
            qualities.append(exam.quality(sample_images(model, y, steps=steps, sampler=sampler), y))
        fids = [quality["fid"] for quality in qualities]
        accuracy = statistics.median(100 * quality["accuracy"] for quality in qualities)
        by_checkpoint = ", ".join(f"{fid:.2f}" for fid in fids)
        print(f"| {sampler} | {steps} | {dtype} | {accuracy:.1f} | {statistics.median(fids):.2f} | {by_checkpoint} |",
              flush=True)
        results.append(dict(sampler=sampler, steps=steps, dtype=dtype, n=args.n, qualities=qualities))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
