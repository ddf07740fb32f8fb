"""What a training run takes at most, against the formula by which train.py chooses its micro-batch.

    python tests/bench_memory.py                 tiny, B and 600M, with and without --checkpointing (10 minutes, 18 GB)
    python tests/bench_memory.py --sizes tiny

Each case trains two steps in a process of its own. Measured is the peak of its resident memory, less what it held when
the formula was asked: the interpreter and its libraries.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from sample import peak_memory  # noqa: E402

MICRO_BATCH = {"tiny": 16, "B": 8, "600M": 2}


def run_one(flags):
    """Train, and print the formula's bytes and the measured ones as the last line."""
    choose = train.choose_micro_batch
    seen = {}

    def note(model_config, cfg, world):
        seen["before"] = peak_memory("cpu")
        micro_batch = choose(model_config, cfg, world)
        fixed, per_image = train.memory_needed(model_config, cfg, world)
        seen["formula"] = fixed + micro_batch * per_image
        return micro_batch

    train.choose_micro_batch = note
    train.main(flags)
    print(json.dumps(dict(formula=seen["formula"], measured=peak_memory("cpu") - seen["before"])))


def measure(size, dtype, checkpointing):
    """-> dict of formula and measured, in bytes."""
    n = str(MICRO_BATCH[size])
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--size", size, "--batch", n, "--micro-batch", n, "--steps", "2", "--grid", "0", "--dtype", dtype,
                 "--device", "cpu", "--out", f"{folder}/run"]  # fmt: skip
        if checkpointing:
            flags.append("--checkpointing")
        child = subprocess.run([sys.executable, __file__, "--one", *flags], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or ["killed, probably out of memory"])[-1])
    return json.loads(child.stdout.splitlines()[-1])


def main():
    if sys.argv[1:2] == ["--one"]:
        run_one(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MICRO_BATCH, default=list(MICRO_BATCH))
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    results = []
    columns = f"{'size':<6}{'images':>7} {'dtype':<6}{'checkpointing':<14}"
    print(f"{columns}{'formula GB':>11}{'measured GB':>12}{'ratio':>7}")
    for size in args.sizes:
        for checkpointing in (False, True):
            for dtype in ("bf16", "fp32"):
                row = measure(size, dtype, checkpointing)
                results.append(dict(size=size, dtype=dtype, checkpointing=checkpointing, **row))
                ratio = row["formula"] / row["measured"]
                word = "yes" if checkpointing else "no"
                print(f"{size:<6}{MICRO_BATCH[size]:>7} {dtype:<6}{word:<14}{row['formula'] / 1e9:>11.2f}"
                      f"{row['measured'] / 1e9:>12.2f}{ratio:>7.2f}", flush=True)  # fmt: skip
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
