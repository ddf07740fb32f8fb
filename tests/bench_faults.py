"""Kill a small training at random moments, again and again, and compare how it ends with one that nobody killed.

    python tests/bench_faults.py

Each run gets SIGKILL after a random time, also while it saves (it saves at every other step). The same command then
starts it again, until it is done. Every tensor of its last state must equal, bit for bit, that of the run that was
never killed.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

# A small model on few digits: most of its time is training and saving, so that is where the kills hit.
SMALL = """
import sys, terdit, train
terdit.SIZES["tiny"] |= dict(dim=64, n_layers=2, n_heads=2)
digits = train.digits
train.digits = lambda n, size, seed: digits(100, size, seed)
print("ready", flush=True)
train.main(sys.argv[1:])
"""
FLAGS = "--save-every 2 --batch 4 --image-size 8 --grid 0 --dtype fp32".split()


@dataclass
class End:
    """What a finished run leaves."""

    step: int
    tensors: dict  # of its last state
    packed: bytes  # its packed.pt

    def equals(self, other):
        if self.step != other.step or self.packed != other.packed or self.tensors.keys() != other.tensors.keys():
            return False
        return all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())


class Faults:
    """Runs of `steps` steps in folders under `folder`. The first run starts at once and is never killed."""

    def __init__(self, folder, steps=24):
        self.folder = Path(folder)
        self.steps = steps
        process = self.start("whole")
        start = time.time()
        if process.wait() != 0:
            raise RuntimeError("the run that nobody kills failed")
        self.seconds = time.time() - start
        self.want = self.end("whole")

    def start(self, name):
        flags = [*FLAGS, "--steps", str(self.steps), "--out", str(self.folder / name)]
        process = subprocess.Popen([sys.executable, "-c", SMALL, *flags], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()  # returns at "ready": the imports are done
        return process

    def end(self, name):
        state = train.states(self.folder / name)[-1]
        step = json.loads((state / "run.json").read_text())["step"]
        return End(step, train.read_state(state), (self.folder / name / "packed.pt").read_bytes())

    def run(self, seed):
        """Kill a run and start it again, until it is done -> how often that was, and whether the end is identical."""
        rng = random.Random(seed)
        name = f"killed-{seed}"
        kills = 0
        kills_while_saving = 0
        while True:
            process = self.start(name)
            # Wait longer after each kill, so that every run gets done.
            patience = rng.uniform(0.1, 0.6) * self.seconds * (1 + kills / 8)
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            kills += 1
            if any((self.folder / name).glob("state-*.tmp")):
                kills_while_saving += 1
        identical = self.end(name).equals(self.want)
        return dict(seed=seed, kills=kills, while_saving=kills_while_saving, exit=process.returncode,
                    identical=identical)


def main():
    parser = argparse.ArgumentParser(description="killed and resumed runs against one that was left alone")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(folder)
        print(f"{'run':>3} {'kills':>5} {'while saving':>12} {'identical':>9}")
        for seed in range(args.runs):
            result = faults.run(seed)
            results.append(result)
            identical = str(result["identical"])
            print(f"{seed:>3} {result['kills']:>5} {result['while_saving']:>12} {identical:>9}", flush=True)
    good = sum(result["identical"] and result["exit"] == 0 for result in results)
    kills = sum(result["kills"] for result in results)
    print(f"{good} of {len(results)} end identical to the uninterrupted run, after {kills} kills")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))
    if good != len(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
