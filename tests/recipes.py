"""What a full-precision start and a teacher are worth: a study by held-out loss, on the embedded digits.

    python tests/recipes.py             all recipes, seeds 0, 1, 2; one training a core, hours; a stopped study goes on
    python tests/recipes.py --quick     one seed, size tiny, a fifth of the steps: minutes, to see that it works
    python tests/recipes.py --table     only the table and the plot, of what is there

Every recipe is train.py with other flags. It leaves runs/recipes/SIZE/NAME-seedN: the checkpoint, its losses and
samples. The table goes to runs/recipes/recipes.md, the plot to recipes.png.

The judge is the *paired held-out loss* (bench_quality.py's held_out_losses): the square error of v on 2,048 digits that
nobody learned from. All models see the same noise at the same timesteps. A model's loss depends far more on the digit
and the noise than on the model, and these parts cancel in the difference of two models on the same digits. So two
models can be told apart whose toy FIDs are the same to their error. The toy FID of 500 samples stands beside it.

Each difference has the standard error over the seeds; of three seeds, 95% lie within 4.3 standard errors.

What the study does not say: what helps a model of 3 million weights in a thousand steps can be useless or harmful to a
large one. The rates are chosen on the digits that then judge them. The reference has 4,500 steps for tiny and 1,500 for
small, which is not yet fully trained.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sample import find_checkpoint, run_main  # noqa: E402
from terdit import load_model  # noqa: E402
from tests.bench_quality import draw, exam_of, held_out_losses  # noqa: E402
from tests.paper import Panel, plot, publish  # noqa: E402
from train import digits  # noqa: E402

CLASSES = torch.arange(500) % 10  # of the samples for the toy FID
RESULTS = "results.npz"  # of a training; it is written last


@dataclass
class Recipe:
    name: str
    title: str
    steps: int
    flags: str = ""  # of train.py; FULL stands for the full-precision checkpoint of the same size and seed


START = "--init FULL --lr 2e-3"  # half of the rate of training from scratch
BOTH = START + " --teacher FULL"
SHORT = [
    Recipe("scratch-1500", "from scratch", 1500),
    Recipe("teacher-1500", "from scratch, with teacher", 1500, "--teacher FULL"),
    Recipe("init-1500", "from full precision", 1500, START),
    Recipe("both-1500", "from full precision, with teacher", 1500, BOTH),
]
LONG = [
    Recipe("scratch-1500-2e-3", "from scratch, rate 2e-3", 1500, "--lr 2e-3"),
    Recipe("scratch-4500", "from scratch", 4500),
    Recipe("both-4500", "from full precision, with teacher", 4500, BOTH),
    Recipe("scratch-6500", "from scratch", 6500),
    Recipe("full-6500", "full precision", 6500, "--full-precision"),
]
REFERENCES = {
    "tiny": Recipe("full", "full precision: the reference", 4500, "--full-precision"),
    "small": Recipe("full", "full precision: the reference", 1500, "--full-precision"),
}
STUDIES = {"tiny": [*SHORT, *LONG], "small": SHORT}  # --quick takes SHORT


def total_steps(recipe, size):
    """Training steps of all models together; one of the teacher's is a forward pass, about a third of a step."""
    total = recipe.steps
    if "FULL" in recipe.flags:
        total += REFERENCES[size].steps
    if "--teacher" in recipe.flags:
        total += recipe.steps / 3
    return total


def folder_of(args, size, recipe, seed):
    return args.out / size / f"{recipe.name}-seed{seed}"


def train_and_judge(args, size, recipe, seed):
    """Train a recipe by train.py on one thread; its output goes to log.txt. Then leave losses and samples beside it."""
    out = folder_of(args, size, recipe, seed)
    if (out / RESULTS).is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    full = folder_of(args, size, REFERENCES[size], seed) / "full.pt"
    flags = [str(full) if flag == "FULL" else flag for flag in recipe.flags.split()]
    if "--init" not in flags:
        flags += ["--size", size]
    command = [sys.executable, ROOT / "train.py", "--compile", "--grid", "0", "--seed", str(seed),
               "--steps", str(recipe.steps // args.divisor), "--out", out, *flags]  # fmt: skip
    with open(out / "log.txt", "a") as log:
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    if done.returncode:
        raise ValueError(f"{out}: the training failed, see log.txt there")
    model = load_model(find_checkpoint(out))
    losses = held_out_losses(model, *digits(2048, model.config.input_size, 5000))
    np.savez(out / RESULTS, losses=losses, samples=draw(model, CLASSES, seed=seed, steps=8).numpy())
    print(f"{out}: held-out loss {losses.mean():.4f}", flush=True)
    for state in out.glob("state-*.pt"):
        state.unlink()  # tens of megabytes


def run_study(args):
    """Train what is missing, the references first."""
    torch.set_num_threads(1)
    for study in ({size: [REFERENCES[size]] for size in args.sizes}, args.studies):
        jobs = [(size, recipe, seed) for seed in args.seeds for size in args.sizes for recipe in study[size]]
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(train_and_judge, args, *job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            finally:  # after Ctrl-C no further training starts; those that run save their state and end
                pool.shutdown(cancel_futures=True)


def read_results(args, size, recipe):
    """Seed: what its training left."""
    paths = {seed: folder_of(args, size, recipe, seed) / RESULTS for seed in args.seeds}
    return {seed: np.load(path) for seed, path in paths.items() if path.is_file()}


def report(args):
    """Print the table of what is trained: how much higher the loss is than full precision's, of the same seed. Leave it
    with the plot in --out."""
    rows = []
    points = {}
    for size in args.sizes:
        reference = read_results(args, size, REFERENCES[size])
        for recipe in (REFERENCES[size], *args.studies[size]):
            found = read_results(args, size, recipe)
            pairs = [(found[seed]["losses"], reference[seed]["losses"]) for seed in found if seed in reference]
            gaps = [losses - references for losses, references in pairs]
            if not gaps:
                continue
            of_seeds = [gap.mean() for gap in gaps]
            values = of_seeds if len(of_seeds) > 1 else gaps[0]  # with one seed, the error is that over the digits
            error = np.std(values, ddof=1) / len(values) ** 0.5
            loss, reference_loss = np.mean(pairs, axis=(0, 2))
            percent = 100 * np.mean(of_seeds) / reference_loss
            fids = []
            for result in found.values():
                x = torch.from_numpy(result["samples"])
                fids.append(f"{exam_of(x.shape[-1]).quality(x, CLASSES)['fid']:.2f}")
            steps = recipe.steps // args.divisor
            all_steps = total_steps(recipe, size) / args.divisor
            rows.append([size, recipe.title, f"{steps:,}", f"{all_steps:,.0f}", f"{loss:.4f}",
                         f"{np.mean(of_seeds):+.4f} +- {error:.4f} ({percent:+.1f}%)",
                         ", ".join(f"{gap:+.4f}" for gap in of_seeds), ", ".join(fids)])  # fmt: skip
            if size == "tiny" and recipe.name != "full":
                points.setdefault(recipe.title, []).append((steps, all_steps, np.mean(of_seeds)))
    if not rows:
        raise ValueError(f"{args.out} holds no results")
    columns = ["size", "recipe", "steps", "steps of all models", "held-out loss", "above full precision", "by seed",
               "toy FID by seed"]  # fmt: skip
    publish(args.out, "recipes", "Training recipes", columns, rows, rows)
    panels = []
    for i, label in enumerate(("steps of the student", "steps of all models")):
        lines = {name: ([point[i] for point in line], [gap for *_, gap in line]) for name, line in points.items()}
        panels.append(Panel("held-out loss above full precision's", label, lines, log=False))
    if points:
        plot(panels).save(args.out / "recipes.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--quick", action="store_true", help="seed 0, size tiny, a fifth of the steps")
    flag("--table", action="store_true", help="train nothing")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flag("--sizes", nargs="+", choices=STUDIES, default=list(STUDIES))
    flag("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, each on one thread")
    flag("--out", type=Path, help="default runs/recipes, with --quick runs/recipes-quick")
    args = parser.parse_args()
    args.out = args.out or Path("runs/recipes-quick" if args.quick else "runs/recipes")
    args.studies = STUDIES
    args.divisor = 1
    if args.quick:
        args.studies = {"tiny": SHORT}
        args.divisor = 5
        args.seeds = [0]
        args.sizes = ["tiny"]
    if not args.table:
        run_study(args)
    report(args)


if __name__ == "__main__":
    run_main(main)
