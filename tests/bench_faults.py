"""Kill a small training at random moments, again and again, and compare how it ends with one that was left alone.

    python tests/bench_faults.py

Each run gets SIGKILL after a random time, saving (every other step) included, and is started again by the same command
until it is done. Every tensor of its last state must equal, bit for bit, that of the run that was never killed.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

# A small model on few digits, so that what is killed is mostly training and saving, not starting.
SMALL = """
import sys, terdit, train
terdit.SIZES["tiny"] |= dict(dim=64, n_layers=2, n_heads=2)
digits = train.digits
train.digits = lambda n, size, seed: digits(100, size, seed)
print("ready", flush=True)
train.main(sys.argv[1:])
"""


class Faults:
    """Runs of `steps` steps in folders under `folder`; the first, made at once, is never killed."""

    def __init__(self, folder, steps=24):
        self.folder, self.steps = Path(folder), steps
        start = self.start("whole")
        started = time.time()
        if start.wait():
            raise RuntimeError("the run that nobody kills failed")
        self.seconds = time.time() - started
        self.want = self.end("whole")

    def start(self, name):
        flags = [
            "--steps",
            self.steps,
            "--save-every",
            2,
            "--batch",
            4,
            "--image-size",
            8,
            "--grid",
            0,
            "--dtype",
            "fp32",
        ]
        command = [sys.executable, "-c", SMALL, *map(str, flags), "--out", str(self.folder / name)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()  # imports are done
        return process

    def end(self, name):
        state = train.states(self.folder / name)[-1]
        index = train.dcp.FileSystemReader(state).read_metadata().state_dict_metadata
        tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in index.items()}
        train.load_tensors(state, tensors)
        return (
            json.loads((state / "run.json").read_text())["step"],
            tensors,
            (self.folder / name / "packed.pt").read_bytes(),
        )

    def run(self, seed):
        """Kill, restart, ... -> how often it was killed, how often while it was saving, and whether the end is the same."""
        rng, name, kills, saving = random.Random(seed), f"killed-{seed}", 0, 0
        while True:
            process = self.start(name)
            try:
                # Later each time, so that every run gets done.
                process.wait(rng.uniform(0.1, 0.6) * self.seconds * (1 + kills / 8))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                saving += any((self.folder / name).glob("state-*.tmp"))
        step, tensors, packed = self.end(name)
        same = step == self.want[0] and tensors.keys() == self.want[1].keys() and packed == self.want[2]
        same = same and all(torch.equal(tensors[k], self.want[1][k]) for k in tensors)
        return dict(seed=seed, kills=kills, while_saving=saving, exit=process.returncode, identical=same)


def main():
    import tempfile

    parser = argparse.ArgumentParser(description="killed and resumed runs against one that was left alone")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults, results = Faults(folder), []
        print(f"{'run':>3} {'kills':>5} {'while saving':>12} {'identical':>9}")
        for seed in range(args.runs):
            results.append(r := faults.run(seed))
            print(f"{seed:>3} {r['kills']:>5} {r['while_saving']:>12} {str(r['identical']):>9}", flush=True)
    good = sum(r["identical"] and r["exit"] == 0 for r in results)
    print(f"{good} of {len(results)} end identical to the uninterrupted run, "
          f"after {sum(r['kills'] for r in results)} kills")  # fmt: skip
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))
    sys.exit(good != len(results))


if __name__ == "__main__":
    main()
