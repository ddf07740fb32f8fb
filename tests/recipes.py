"""What a full-precision start and a teacher are worth: a study by held-out loss, on the digits.

    python tests/recipes.py             all recipes, seeds 0, 1, 2: hours; a stopped study goes on
    python tests/recipes.py --quick     one seed, size tiny, a fifth of the steps: minutes
    python tests/recipes.py train --teacher FULL ...    one run of train.py, with a teacher

Every recipe is train.py with other flags, some with a teacher: the mean square between its outputs
and the model's is added to the loss of training, and to log.csv's `loss`, but not to `val_loss`. A
run's state does not know the teacher: only the same command goes on with it.

A recipe leaves runs/recipes/SIZE/NAME-seedN: the checkpoint, its losses and samples. The table goes
to runs/recipes/recipes.md.

The judge is the *paired held-out loss* (bench_quality.py): the square error of v on 2,048 digits
that nobody learned from, with the same noise for all models. A model's loss depends far more on the
digit and the noise than on the model, and these parts cancel in the difference of two models. So
two models can be told apart whose toy FIDs are the same to their error. Each difference has the
standard error over the seeds; of three seeds, 95% lie within 4.3 standard errors.

What the study does not say: what helps a model of 3 million weights in a thousand steps can be
useless or harmful to a large one. The rates are chosen on the digits that then judge them. The
reference has 4,500 steps for tiny and 1,500 for small, which is not yet fully trained.
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
import train  # noqa: E402
from sample import MAX_SEED, find_checkpoint, number, require_same, run_main  # noqa: E402
from terdit import load_model  # noqa: E402
from tests.bench_quality import draw, exam_of, held_out_losses, paired_difference  # noqa: E402
from tests.paper import publish  # noqa: E402
from train import digits  # noqa: E402

CLASSES = torch.arange(500) % 10  # of the samples for the toy FID
RESULTS = "results.npz"  # of a training; it is written last


@dataclass
class Recipe:
    name: str
    title: str
    steps: int
    flags: str = ""  # of train.py; FULL is the full-precision checkpoint of the same size and seed


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
    Recipe("init-4500", "from full precision", 4500, START),
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
    """Training steps of all models together; a forward pass of the teacher is a third of a step."""
    total = recipe.steps
    if "FULL" in recipe.flags:
        total += REFERENCES[size].steps
    if "--teacher" in recipe.flags:
        total += recipe.steps / 3
    return total


def add_teacher(path):
    """Add the teacher's term to the loss of every step of training."""
    teacher = load_model(find_checkpoint(path))
    batch_losses = train.batch_losses
    outputs = ("prediction", "learn_sigma", "in_channels", "input_size", "class_names")

    def losses_with_teacher(run, model, batch):
        if model is not run.model:  # validation, of the average
            return batch_losses(run, model, batch)
        ours = {name: getattr(model.config, name) for name in outputs}
        require_same(f"--teacher {path}", vars(teacher.config), ours, "it cannot teach this model")
        teacher.to(batch.x0.device)
        distill = []

        def model_and_teacher(x, t, y):
            out = model(x, t, y)
            with torch.no_grad():
                wanted = teacher(x, t, y)
            distill.append((wanted.float() - out.float()).square().flatten(1).mean(1))
            return out

        return batch_losses(run, model_and_teacher, batch) + distill[0]

    train.batch_losses = losses_with_teacher


def train_with_teacher(argv):
    parser = argparse.ArgumentParser(prog="recipes.py train", allow_abbrev=False)
    parser.add_argument("--teacher", required=True, help="its checkpoint; all else is train.py's")
    args, flags = parser.parse_known_args(argv)
    add_teacher(args.teacher)
    train.main(flags)


def folder_of(args, size, recipe, seed):
    return args.out / size / f"{recipe.name}-seed{seed}"


def run_on_one_thread(command, out):
    """Run a command, its output in out/log.txt. -> its exit code"""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out / "log.txt", "a") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode


def train_and_judge(args, size, recipe, seed):
    """Train a recipe. Then leave its losses and samples in its folder."""
    out = folder_of(args, size, recipe, seed)
    if (out / RESULTS).is_file():
        return
    full = folder_of(args, size, REFERENCES[size], seed) / "full.pt"
    flags = [str(full) if flag == "FULL" else flag for flag in recipe.flags.split()]
    if "--init" not in flags:
        flags += ["--size", size]
    program = [__file__, "train"] if "--teacher" in flags else [ROOT / "train.py"]
    steps = recipe.steps // args.divisor
    flags += f"--compile --grid 0 --seed {seed} --steps {steps}".split()
    if run_on_one_thread([sys.executable, *program, "--out", out, *flags], out):
        raise ValueError(f"{out}: the training failed, see log.txt there")
    model = load_model(find_checkpoint(out))
    losses = held_out_losses(model, *digits(2048, model.config.input_size, 5000))
    np.savez(out / RESULTS, losses=losses, samples=draw(model, CLASSES, seed=seed, steps=8).numpy())
    print(f"{out}: held-out loss {losses.mean():.4f}", flush=True)
    for state in train.states(out):
        state.unlink()  # tens of megabytes


def run_study(args):
    """Train what is missing, the references first."""
    torch.set_num_threads(1)
    for study in ({size: [REFERENCES[size]] for size in args.sizes}, args.studies):
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = []
            for seed in args.seeds:
                for size in args.sizes:
                    for recipe in study[size]:
                        futures.append(pool.submit(train_and_judge, args, size, recipe, seed))
            try:
                for future in futures:
                    future.result()
            finally:  # after Ctrl-C none starts any more; those that run save their state and end
                pool.shutdown(cancel_futures=True)


def read_results(args, size, recipe):
    """What the training left, by seed."""
    return [np.load(folder_of(args, size, recipe, seed) / RESULTS) for seed in args.seeds]


def report(args):
    """Print the table: how much higher the loss is than full precision's, of the same seed."""
    rows = []
    for size in args.sizes:
        reference = read_results(args, size, REFERENCES[size])
        references = np.array([result["losses"] for result in reference])
        for recipe in (REFERENCES[size], *args.studies[size]):
            found = read_results(args, size, recipe)
            losses = np.array([result["losses"] for result in found])
            gaps, error = paired_difference(losses, references)
            percent = 100 * gaps.mean() / references.mean()
            fids = []
            for result in found:
                x = torch.from_numpy(result["samples"])
                fids.append(f"{exam_of(x.shape[-1]).quality(x, CLASSES)['fid']:.2f}")
            steps = recipe.steps // args.divisor
            all_steps = total_steps(recipe, size) / args.divisor
            row = [size, recipe.title, f"{steps:,}", f"{all_steps:,.0f}", f"{losses.mean():.4f}"]
            row.append(f"{gaps.mean():+.4f} +- {error:.4f} ({percent:+.1f}%)")
            rows.append([*row, ", ".join(f"{gap:+.4f}" for gap in gaps), ", ".join(fids)])
    columns = ["size", "recipe", "steps", "steps of all models", "held-out loss"]
    columns += ["above full precision", "by seed", "toy FID by seed"]
    publish(args.out, "recipes", "Training recipes", columns, rows, rows)


def main():
    if sys.argv[1:2] == ["train"]:
        train_with_teacher(sys.argv[2:])
        return
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    jobs = os.cpu_count()
    flag("--quick", action="store_true", help="seed 0, size tiny, a fifth of the steps")
    flag("--seeds", type=number(int, 0, MAX_SEED), nargs="+", default=[0, 1, 2])
    flag("--sizes", nargs="+", choices=STUDIES, default=list(STUDIES))
    flag("--jobs", type=number(int, 1), default=jobs, help="trainings at a time, of one thread")
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
    run_study(args)
    report(args)


if __name__ == "__main__":
    run_main(main)
