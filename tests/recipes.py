"""Which training recipe is better: a study by held-out loss, on the embedded digits.

    python tests/recipes.py             all recipes, seeds 0, 1, 2; one training a core, hours; a stopped study goes on
    python tests/recipes.py --quick     one seed and a fifth of the steps: minutes, to see that it works
    python tests/recipes.py --table     only the table and the plot, of what is there
    python tests/recipes.py --table --against both-1500    differences to this recipe instead of full precision

Every recipe is train.py with other flags, or with one function of it replaced. It leaves runs/recipes/SIZE/NAME-seedN:
the checkpoint, its losses and samples. The table goes to runs/recipes/recipes.md, the plot to recipes.png.

The judge is the *paired held-out loss*: the square error of v on 2,048 digits that nobody learned from, each with its
label at two timesteps, which are spread evenly over 0..999. All models see the same noise. A model's loss depends far
more on the digit and the noise than on the model, and these parts cancel in the difference of two models on the same
digits. So two models can be told apart whose toy FIDs are the same to their error. The toy FID of 500 samples stands
beside it.

Each difference has the standard error over the seeds; of three seeds, 95% lie within 4.3 standard errors. To compare
two recipes, use --against: rows of one table share the noise of the reference.

What the study does not say: what helps a model of 3 million weights in a thousand steps can be useless or harmful to a
large one. The rates that are tried are few, and they are chosen on the digits that then judge them. The reference has
4,500 steps for tiny and 1,500 for small, which is not yet fully trained.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import terdit  # noqa: E402
import train  # noqa: E402
from sample import generator, positive, run_main, sample_images, to_uint8  # noqa: E402
from terdit import GaussianDiffusion, PackedTernaryLinear, TernaryLinear, atomic_write, load_model  # noqa: E402
from terdit import model_from_state, pack_model, ternarize  # noqa: E402
from tests.paper import Panel, exam_of, plot, publish, save_png  # noqa: E402

N_HELD_OUT = 2048  # digits
N_TIMESTEPS = 2  # of each digit
N_SAMPLES = 500  # for the toy FID, in SAMPLE_STEPS steps of dpm
SAMPLE_STEPS = 8
RESULTS = "results.npz"  # of a training; it is written last

# ----------------------------------------------------------------------------------------------------------------------
# Changes to train.py that have no flag


def alphas_at_full_rate():
    make_optimizer = train.make_optimizer

    def with_full_rate(model, cfg):
        optimizer = make_optimizer(model, cfg)
        for group in optimizer.param_groups:
            group["lr_scale"] = 1.0
        return optimizer

    train.make_optimizer = with_full_rate


def constant_rate():
    def learning_rate(cfg, step):
        return cfg.lr * min(1, (step + 1) / cfg.warmup)

    train.learning_rate = learning_rate


def two_stage_rate():
    """BitNet b1.58's training notes: the rate falls along a line, and drops by a third in the middle of the run."""

    def learning_rate(cfg, step):
        stage = 1 if step < cfg.steps / 2 else 2 / 3
        return cfg.lr * min(1, (step + 1) / cfg.warmup) * stage * (1 - step / cfg.steps)

    train.learning_rate = learning_rate


class ScalePerChannel(TernaryLinear):
    """TernaryLinear with one scale for each output; the unit of the rounding is still the whole matrix's."""

    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias)
        self.alphas = torch.nn.Parameter(self.weight.detach().abs().mean(1, keepdim=True))  # (N, 1)


class PackedScalePerChannel(PackedTernaryLinear):
    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias)
        self.alphas = torch.nn.Parameter(torch.ones(out_features, 1))


def scale_per_channel():
    terdit.FastTernaryLinear = ScalePerChannel
    terdit.FastPackedTernaryLinear = PackedScalePerChannel


def alphas_from_normal():
    """Upstream's start of the scales, and nothing else of upstream's."""
    build_model = train.build_model

    def with_drawn_alphas(*args):
        model = build_model(*args)
        for name, p in model.named_parameters():
            if name.endswith("alphas"):
                torch.nn.init.normal_(p)
        return model

    train.build_model = with_drawn_alphas


RAMP = torch.ones(())  # the share of the ternary weight in what is multiplied by


class RampedTernaryLinear(TernaryLinear):
    """Multiplies by W + RAMP (ternary(W) - W)."""

    def forward(self, x):
        ternary = ternarize(self.weight) * self.alphas
        return F.linear(x, self.weight + RAMP * (ternary - self.weight), self.bias)


def ramp():
    """Full precision becomes ternary along a line, over the first 5% of the steps."""
    terdit.FastTernaryLinear = RampedTernaryLinear
    set_learning_rate = train.set_learning_rate

    def with_ramp(optimizer, cfg, step):
        RAMP.fill_(min(1, step / (0.05 * cfg.steps)))
        return set_learning_rate(optimizer, cfg, step)

    train.set_learning_rate = with_ramp


def fading_teacher():
    """The teacher's weight falls along a line from 2 to 0."""
    train_step = train.train_step

    def with_fading(run, batch, show_part=None):
        weight = run.cfg.teacher_weight
        run.cfg.teacher_weight = 2 * (1 - run.step / run.cfg.steps)
        stats = train_step(run, batch, show_part)
        run.cfg.teacher_weight = weight
        return stats

    train.train_step = with_fading


def teacher_weight(weight):
    def change():
        train.FINE_TUNE = replace(train.FINE_TUNE, teacher_weight=weight)

    return change


def decay_in_the_first_half():
    train.DEMO = replace(train.DEMO, decay_until=0.5)


# ----------------------------------------------------------------------------------------------------------------------
# The recipes


@dataclass
class Recipe:
    name: str
    title: str
    steps: int
    flags: str = ""  # of train.py; FULL stands for the full-precision checkpoint
    change: object = None  # a function that changes train.py or terdit.py, in the recipe's own process


FULL = "full"  # name of the reference of each size, which is trained first
START = "--init FULL"
BOTH = "--init FULL --teacher FULL"
FASTER = "--lr 4e-3"  # the rate of training from scratch; from full precision train.py takes half of it

SCRATCH = [
    Recipe("scratch-1500", "from scratch", 1500),
    Recipe("teacher-1500", "from scratch, with teacher", 1500, "--teacher FULL"),
    Recipe("scratch-lr2-1500", "from scratch, rate 2e-3", 1500, "--lr 2e-3"),
]
FROM_FULL = [
    Recipe("init-1500", "from full precision", 1500, START),
    Recipe("both-1500", "from full precision, with teacher", 1500, BOTH),
]
LONGER = [
    Recipe("scratch-4500", "from scratch", 4500),
    Recipe("init-4500", "from full precision", 4500, START),
    Recipe("both-4500", "from full precision, with teacher", 4500, BOTH),
    Recipe("scratch-6500", "from scratch", 6500),
    Recipe("full-1500", "full precision", 1500, "--full-precision"),
    Recipe("full-6500", "full precision", 6500, "--full-precision"),
]
VARIANTS = [  # of training from full precision
    Recipe("init-lr4-1500", "start, rate 4e-3", 1500, f"{START} {FASTER}"),
    Recipe("init-lr4-ramp-1500", "start, rate 4e-3, ramp", 1500, f"{START} {FASTER}", ramp),
    Recipe("init-lr4-no-norm-1500", "start, rate 4e-3, no RMS Norm", 1500, f"{START} {FASTER} --no-adaln-norm"),
    Recipe("both-lr4-1500", "start and teacher, rate 4e-3", 1500, f"{BOTH} {FASTER}"),
    Recipe("both-lr4-ramp-1500", "start and teacher, rate 4e-3, ramp", 1500, f"{BOTH} {FASTER}", ramp),
    Recipe("both-lr4-no-norm-1500", "start and teacher, rate 4e-3, no RMS Norm", 1500,
           f"{BOTH} {FASTER} --no-adaln-norm"),
    Recipe("both-lr4-w4-1500", "start and teacher, rate 4e-3, weight 4", 1500, f"{BOTH} {FASTER}", teacher_weight(4)),
    Recipe("both-lr4-w16-1500", "start and teacher, rate 4e-3, weight 16", 1500, f"{BOTH} {FASTER}",
           teacher_weight(16)),
    Recipe("both-lr4-fading-1500", "start and teacher, rate 4e-3, weight 2 to 0", 1500, f"{BOTH} {FASTER}",
           fading_teacher),
    Recipe("both-lr4-d0-1500", "start and teacher, rate 4e-3, no decay", 1500, f"{BOTH} {FASTER} --decay 0"),
    Recipe("both-w4-1500", "start and teacher, weight 4", 1500, BOTH, teacher_weight(4)),
    Recipe("both-d0-1500", "start and teacher, no decay", 1500, f"{BOTH} --decay 0"),
    Recipe("both-w4-d0-1500", "start and teacher, weight 4, no decay", 1500, f"{BOTH} --decay 0", teacher_weight(4)),
    Recipe("both-lr1-w4-1500", "start and teacher, rate 1e-3, weight 4", 1500, f"{BOTH} --lr 1e-3", teacher_weight(4)),
    Recipe("both-w4-4500", "start and teacher, weight 4", 4500, BOTH, teacher_weight(4)),
]
PARTS = [  # of training from scratch
    Recipe("no-decay-1500", "no weight decay", 1500, "--decay 0"),
    Recipe("half-decay-1500", "weight decay in the first half alone", 1500, "", decay_in_the_first_half),
    Recipe("alphas-1500", "alphas at the full rate", 1500, "", alphas_at_full_rate),
    Recipe("constant-1500", "constant rate", 1500, "", constant_rate),
    Recipe("two-stage-1500", "two-stage rate", 1500, "", two_stage_rate),
    Recipe("channel-1500", "one scale a channel", 1500, "", scale_per_channel),
    Recipe("upstream-alphas-1500", "alphas start from N(0, 1), as upstream's", 1500, "", alphas_from_normal),
]
REFERENCES = {
    "tiny": Recipe(FULL, "full precision: the reference", 4500, "--full-precision"),
    "small": Recipe(FULL, "full precision: the reference", 1500, "--full-precision"),
}
STUDIES = {
    "tiny": [REFERENCES["tiny"], *SCRATCH, *FROM_FULL, *LONGER, *VARIANTS, *PARTS],
    "small": [REFERENCES["small"], *SCRATCH, *FROM_FULL],
}
RAW_TOO = ("scratch-1500", "scratch-4500", "both-1500")  # their raw weights are judged, too
FORWARD = 1 / 3  # of a training step: the backward pass takes about twice as long as the forward pass


def total_steps(recipe, size):
    """Training steps of all models together; a step of the teacher's is a forward pass alone."""
    total = recipe.steps
    if "FULL" in recipe.flags:
        total += REFERENCES[size].steps
    if "--teacher" in recipe.flags:
        total += FORWARD * recipe.steps
    return total


# ----------------------------------------------------------------------------------------------------------------------
# One training, and what it is worth


def folder_of(args, size, recipe, seed):
    return args.out / size / f"{recipe.name}-seed{seed}"


@torch.no_grad()
def held_out_losses(model):
    """-> the loss of each held-out digit (2048,), the mean over its timesteps; the same noise for every model."""
    config = model.config
    diffusion = GaussianDiffusion(prediction=config.prediction)
    x0, y = train.digits(N_HELD_OUT, config.input_size, 5000)
    rng = generator(5000)
    losses = torch.zeros(N_HELD_OUT, dtype=torch.float64)
    for k in range(N_TIMESTEPS):
        # Evenly over 0..999, and each digit once in the lower half and once in the upper.
        t = torch.randperm(N_HELD_OUT, generator=rng) * 500 // N_HELD_OUT + 500 * k
        noise = torch.randn(x0.shape, generator=rng)
        for part in torch.arange(N_HELD_OUT).split(256):
            terms = diffusion.training_losses(model, x0[part], t[part], y[part], noise[part])
            losses[part] += terms["loss"].double() / N_TIMESTEPS
    return losses.numpy()


def classes_in_turn():
    return torch.arange(N_SAMPLES) % 10


def raw_model(out):
    """The trained weights of the newest state in `out`, not their average."""
    path = train.states(out)[-1]
    state = {name.removeprefix("model."): value for name, value in train.read_state(path, "model.").items()}
    model = model_from_state(path, train.read_metadata(path)["config"], state)
    return pack_model(model) if model.config.ternary else model


def train_one(args, size, name, seed):
    """Train a recipe, judge it, and leave the result in its folder."""
    recipe = next(recipe for recipe in STUDIES[size] if recipe.name == name)
    out = folder_of(args, size, recipe, seed)
    full = folder_of(args, size, REFERENCES[size], seed) / "full.pt"
    if recipe.change:
        recipe.change()
    flags = [str(full) if flag == "FULL" else flag for flag in recipe.flags.split()]
    if "--init" not in flags:
        flags += ["--size", size]
    train.main(["--compile", "--grid", "0", "--steps", str(recipe.steps // args.divisor), "--seed", str(seed),
                "--out", str(out), *flags])  # fmt: skip
    model = load_model(out / ("full.pt" if "--full-precision" in flags else "packed.pt"))
    samples = sample_images(model, classes_in_turn(), seed, steps=SAMPLE_STEPS)
    results = dict(losses=held_out_losses(model), samples=to_uint8(samples))
    if name in RAW_TOO:
        results["raw_losses"] = held_out_losses(raw_model(out))
    atomic_write(out / RESULTS, lambda file: np.savez(file, **results))
    for state in train.states(out):
        shutil.rmtree(state)


def start(size, recipe, seed, args):
    """Run train_one in a process of its own, on one thread; its output goes to log.txt."""
    out = folder_of(args, size, recipe, seed)
    if (out / RESULTS).is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--one", size, recipe.name, str(seed),
               "--divisor", str(args.divisor), "--out", str(args.out)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out / "log.txt", "a") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f"{out}: the training failed, see log.txt there")
    print(f"{out}: held-out loss {np.load(out / RESULTS)['losses'].mean():.4f}", flush=True)


def run_study(args):
    """Train what is missing, the references first, seed by seed."""
    jobs = [(size, recipe, seed) for seed in args.seeds for size in args.sizes for recipe in STUDIES[size]
            if args.only is None or recipe.name in (FULL, *args.only)]  # fmt: skip
    references = [job for job in jobs if job[1].name == FULL]
    others = [job for job in jobs if job[1].name != FULL]
    for part in (references, others):
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(start, *job, args) for job in part]
            try:
                for future in futures:
                    future.result()
            finally:  # after Ctrl-C no further training starts; those that run save their state and end
                pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


@lru_cache(maxsize=None)
def toy_fid(path):
    x = torch.from_numpy(np.load(path)["samples"]).permute(0, 3, 1, 2) / 127.5 - 1
    return exam_of(x.shape[-1]).quality(x, classes_in_turn())["fid"]


@dataclass
class Gap:
    """How much higher a recipe's held-out loss is than that of --against, of the same seed."""

    mean: float  # over the seeds
    error: float  # standard error over the seeds; with one seed, over the digits
    of_seeds: list
    loss: float  # the recipe's own, mean over the seeds
    percent: float  # mean / the loss of --against

    def __str__(self):
        return f"{self.mean:+.4f} +- {self.error:.4f} ({self.percent:+.1f}%)"


def gap_of(args, size, recipe, kind="losses"):
    """-> Gap over the seeds that are done, or None."""
    against = next((other for other in STUDIES[size] if other.name == args.against), None)
    if against is None:
        return None
    gaps = []
    losses = []
    references = []
    for seed in args.seeds:
        path = folder_of(args, size, recipe, seed) / RESULTS
        path_against = folder_of(args, size, against, seed) / RESULTS
        if path.is_file() and path_against.is_file():
            loss = np.load(path)[kind]
            reference = np.load(path_against)["losses"]
            gaps.append(loss - reference)
            losses.append(loss.mean())
            references.append(reference.mean())
    if not gaps:
        return None
    of_seeds = [gap.mean() for gap in gaps]
    values = of_seeds if len(of_seeds) > 1 else gaps[0]
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return Gap(np.mean(of_seeds), error, of_seeds, np.mean(losses), 100 * np.mean(of_seeds) / np.mean(references))


def row_of(args, size, recipe, kind="losses"):
    """A line of the table, or None: the recipe is not trained yet."""
    gap = gap_of(args, size, recipe, kind)
    if gap is None:
        return None
    title = recipe.title
    fids = ""
    if kind == "losses":
        paths = [folder_of(args, size, recipe, seed) / RESULTS for seed in args.seeds]
        fids = ", ".join(f"{toy_fid(path):.2f}" for path in paths if path.is_file())
    else:
        title += ": raw weights, not their average"
    by_seed = ", ".join(f"{g:+.4f}" for g in gap.of_seeds)
    steps = recipe.steps // args.divisor
    all_steps = total_steps(recipe, size) / args.divisor
    return [size, title, f"{steps:,}", f"{all_steps:,.0f}", f"{gap.loss:.4f}", str(gap), by_seed, fids]


def draw_plot(args):
    """The gap against the student's steps and against the steps of all models."""
    by_student = {}
    by_total = {}
    for recipe in (*SCRATCH, *FROM_FULL, *LONGER):
        gap = gap_of(args, "tiny", recipe)
        if gap:
            by_student.setdefault(recipe.title, []).append((recipe.steps / args.divisor, gap.mean))
            by_total.setdefault(recipe.title, []).append((total_steps(recipe, "tiny") / args.divisor, gap.mean))
    if not by_student:
        return
    panels = []
    for label, points in (("steps of the student", by_student), ("steps of all models", by_total)):
        lines = {name: tuple(zip(*sorted(line))) for name, line in points.items()}
        panels.append(Panel("held-out loss above full precision's", label, lines, log=False))
    save_png(plot(panels), args.out / "recipes.png")


def report(args):
    """Print the table of what is trained, and leave it with the plot in --out."""
    rows = []
    for size in args.sizes:
        for recipe in STUDIES[size]:
            rows.append(row_of(args, size, recipe))
            if recipe.name in RAW_TOO:
                rows.append(row_of(args, size, recipe, "raw_losses"))
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError(f"{args.out} holds no results that can be compared with {args.against}")
    name = "recipes" if args.against == FULL else f"recipes-against-{args.against}"
    columns = ["size", "recipe", "steps", "steps of all models", "held-out loss", f"above {args.against}", "by seed",
               "toy FID by seed"]  # fmt: skip
    publish(args, name, "Training recipes", columns, rows, rows)
    if args.against == FULL and "tiny" in args.sizes:
        draw_plot(args)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--quick", action="store_true", help="seed 0, size tiny, the main recipes, a fifth of the steps")
    flag("--table", action="store_true", help="train nothing")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flag("--sizes", nargs="+", choices=STUDIES, default=list(STUDIES))
    names = sorted({recipe.name for study in STUDIES.values() for recipe in study})
    flag("--only", nargs="+", metavar="NAME", choices=names, help="recipes by name, for example both-1500")
    flag("--against", metavar="NAME", choices=names, default=FULL, help="the recipe that all are compared with")
    flag("--jobs", type=positive, default=os.cpu_count(), help="trainings at a time, each on one thread")
    flag("--out", type=Path, help="default runs/recipes, with --quick runs/recipes-quick")
    flag("--divisor", type=positive, default=1, help=argparse.SUPPRESS)
    flag("--one", nargs=3, metavar=("SIZE", "NAME", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is None:
        args.out = Path("runs/recipes-quick" if args.quick else "runs/recipes")
    if args.quick:
        args.seeds = [0]
        args.sizes = ["tiny"]
        args.divisor = 5
        args.only = [FULL, *(recipe.name for recipe in (*SCRATCH, *FROM_FULL))]
    return args


def main():
    args = parse_args()
    if args.one:
        size, name, seed = args.one
        train_one(args, size, name, int(seed))
        return
    if not args.table:
        run_study(args)
    report(args)


if __name__ == "__main__":
    run_main(main)
