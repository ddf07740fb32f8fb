"""What the RMS Norm after adaLN is worth: a study by held-out loss, on the embedded digits.

    python tests/norm.py            train what is missing, then the table and the plot; hours
    python tests/norm.py --table    only the table and the plot, of what is there
    python tests/norm.py train ...  one training: train.py's flags, --shape and --start

A stopped study goes on where it was. A training leaves in runs/norm/NAME-seedN, beside train.py's
files, looks.csv (see `watch`) and results.npz: its losses on bench_quality.py's 2,048 digits, with
the same noise and timesteps for all.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from sample import run_main  # noqa: E402
from terdit import SIZES, DiT, load_model  # noqa: E402
from tests.bench_quality import held_out_losses, paired_difference  # noqa: E402
from tests.paper import Panel, plot, publish  # noqa: E402
from tests.pictures import read_column  # noqa: E402
from tests.recipes import run_on_one_thread  # noqa: E402

OUT = Path("runs/norm")
MARKS = [0, 1, 2, 5, 10, 20, 50, 100, 200, 300, 500, 700, 1000, 1499, 2000, 3000, 4499]
SHAPES = {
    "tiny": {},  # the demo: v-prediction, timesteps mostly in the middle
    "paper": dict(prediction="eps", learn_sigma=True),  # so timesteps are uniform; and q/k norm
    "deep": dict(dim=128, n_layers=16, n_heads=4),
}
STARTS = {  # of adaLN's projections, by the end of the name of what is filled
    "Xavier": [],
    "weights 0": ["--start", "adaLN_modulation.1.weight", "0"],  # as upstream
    "alphas 0": ["--start", "adaLN_modulation.1.alphas", "0"],  # gates closed without a norm
}
NORMS = {
    "gain 0": [],
    "gain 0.05": ["--start", "adaLN_modulation.2.weight", "0.05"],
    "gain 1": ["--start", "adaLN_modulation.2.weight", "1"],  # as upstream
    "none": ["--no-adaln-norm"],
}


@dataclass(frozen=True)
class Row:
    """One way to start and to train."""

    alphas: str  # "absmean", or "random": every scale from N(0, 1)
    norm: str
    lr: float = 4e-3
    adaln: str = "Xavier"
    shape: str = "tiny"
    steps: int = 1500

    def folder(self, seed):
        parts = [self.shape, self.alphas, self.norm, self.adaln, f"{self.lr:g}", str(self.steps)]
        return OUT / f"{'-'.join(parts).replace(' ', '')}-seed{seed}"

    def flags(self):
        """The flags of `norm.py train`."""
        common = ["--shape", self.shape, "--alpha-start", self.alphas, "--lr", str(self.lr)]
        flags = [*common, "--steps", str(self.steps), *NORMS[self.norm], *STARTS[self.adaln]]
        if self.shape == "paper":
            flags.append("--qk-norm")
        return flags


# --------------------------------------------------------------------------------------------------
# One training


def train_changed(argv):
    """train.py, with blocks that start elsewhere, and are watched."""
    parser = argparse.ArgumentParser(prog="norm.py train", allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    start = "fill the blocks' parameters whose names end so"
    names = ("NAME", "VALUE")
    parser.add_argument("--start", nargs=2, action="append", default=[], metavar=names, help=start)
    parser.add_argument("--out", required=True)
    args, flags = parser.parse_known_args(argv)
    SIZES["tiny"].update(SHAPES[args.shape])
    init_weights = DiT.init_weights

    @torch.no_grad()
    def changed_start(model):
        init_weights(model)
        for ending, value in args.start:
            for name, p in model.layers.named_parameters():
                if name.endswith(ending):
                    p.fill_(float(value))
        if not list(Path(args.out).glob("state-*.pt")):  # else a stopped run goes on
            watch(model, Path(args.out, "looks.csv"))

    DiT.init_weights = changed_start
    train.main(["--out", args.out, *flags])


def rms(x):
    return x.float().square().mean().sqrt().item()


def watch(model, path):
    """Write what goes through the model at the steps of MARKS, from the batch of that step: the RMS
    of all blocks' adaLN outputs, of the gates among them, of the residual stream behind the last
    block; and the median |alpha|."""
    file = open(path, "w", buffering=1)
    print("step,adaln,gate,residual,alpha", file=file)
    step = 0

    def look(final_layer, inputs):
        nonlocal step
        if not torch.is_grad_enabled():  # validation, of a copy of the model
            return
        if step in MARKS:
            with torch.no_grad():
                h, c = inputs
                modulation = torch.stack([block.adaLN_modulation(c) for block in model.layers])
                gates = modulation.unflatten(-1, (6, -1))[..., [2, 5], :]
                alphas = [p for name, p in model.named_parameters() if name.endswith("alphas")]
                median = torch.cat(alphas).abs().median().item()
            print(step, rms(modulation), rms(gates), rms(h), median, sep=",", file=file)
        step += 1

    model.final_layer.register_forward_pre_hook(look)  # the blocks are compiled, this is not


def train_and_judge(row, seed):
    """Train a row. Then leave its held-out losses in its folder."""
    out = row.folder(seed)
    if (out / "results.npz").is_file():
        return
    command = [sys.executable, __file__, "train", "--out", out, "--seed", str(seed)]
    command += ["--compile", "--save-every", "500", *row.flags()]
    if row != DEMO:  # pictures.py shows its grids
        command += ["--grid", "0"]
    if run_on_one_thread(command, out):
        print(f"{out}: the training failed, see log.txt there", flush=True)
        return
    model = load_model(out / "packed.pt")
    losses = held_out_losses(model, *train.digits(2048, model.config.input_size, 5000))
    np.savez(out / "results.npz", losses=losses)
    print(f"{out}: held-out loss {losses.mean():.4f}", flush=True)
    for state in out.glob("state-*.pt"):
        state.unlink()


# --------------------------------------------------------------------------------------------------
# The study

DEMO = Row("absmean", "gain 0", steps=4500)
RANDOM = [Row("random", norm) for norm in ("gain 0", "gain 1", "none")]
ABSMEAN = [Row("absmean", norm) for norm in ("gain 0", "gain 1", "none")]
CLOSED = Row("random", "none", adaln="alphas 0")


def make_queue():
    """-> (row, seed) of all trainings, the most important first."""
    upstream = [Row("random", norm, adaln="weights 0") for norm in ("gain 1", "none")]
    demo = [replace(row, steps=4500) for row in ABSMEAN]
    with_seeds = [DEMO, *RANDOM, *ABSMEAN, *upstream, CLOSED, *demo]
    others = [Row("random", "gain 0.05")]
    for rows in (RANDOM, ABSMEAN):
        others += [replace(row, lr=1e-3) for row in rows]
        others += [replace(row, shape="deep", lr=2e-3, steps=800) for row in rows]
        others += [replace(row, shape="paper", lr=1e-3) for row in rows]
    others += [replace(row, lr=1e-3) for row in upstream]
    others += [Row("random", "gain 0", 1e-3, adaln="weights 0")]
    others += [replace(row, adaln="weights 0") for row in ABSMEAN]
    others += [Row("random", norm, steps=4500) for norm in ("gain 0", "none")]
    deep = [row for row in others if row.shape == "deep" and row.alphas == "absmean"]
    queue = [(row, seed) for seed in range(3) for row in with_seeds]
    queue += [(row, 0) for row in others]
    queue += [(row, seed) for seed in (1, 2) for row in deep]
    return list(dict.fromkeys(queue))


def read_losses(row):
    """-> {seed: held-out losses of the digits, float64 (2048,)}"""
    found = {}
    for seed in range(3):
        path = row.folder(seed) / "results.npz"
        if path.is_file():
            found[seed] = np.load(path)["losses"]
    return found


def report():
    """Print and leave the table of what is trained, and the plot."""
    OUT.mkdir(parents=True, exist_ok=True)
    table = []
    for row in dict.fromkeys(row for row, _ in make_queue()):
        losses = read_losses(row)
        if not losses:
            continue
        against = ""
        others = read_losses(replace(row, norm="none"))
        seeds = losses.keys() & others.keys()
        if row.norm != "none" and seeds:
            without = [others[seed] for seed in seeds]
            gaps, error = paired_difference([losses[seed] for seed in seeds], without)
            percent = 100 * gaps.mean() / np.mean(without)
            against = f"{gaps.mean():+.4f} +- {error:.4f} ({percent:+.1f}%)"
        by_seed = ", ".join(f"{loss.mean():.4f}" for loss in losses.values())
        setting = [row.shape, f"{row.steps:,}", f"{row.lr:g}", row.alphas, row.adaln, row.norm]
        table.append([*setting, by_seed, against])
    table.sort(key=lambda line: line[:5])  # what differs in the norm alone lies side by side
    columns = ["shape", "steps", "rate", "alphas", "adaLN's start", "norm"]
    columns += ["held-out loss, by seed", "above no norm"]
    publish(OUT, "norm", "The RMS Norm", columns, table, table)
    panels = make_panels()
    if panels[0].lines:  # else no such row is trained yet
        plot(panels).save(OUT / "norm.png")


def make_panels():
    """What goes through the models of these rows while they train."""
    fields = ["gate", "residual", "grad_norm", "loss"]
    titles = ["gates, RMS", "residual stream, RMS", "gradient norm", "loss"]
    panels = [Panel(title, "step", {}) for title in titles]
    for row in [*RANDOM, *ABSMEAN, CLOSED]:
        folder = row.folder(0)
        if not (folder / "results.npz").is_file():
            continue
        name = f"alphas {row.alphas}, norm: {row.norm}"
        if row == CLOSED:
            name += ", adaLN's alphas start at 0"
        for field, panel in zip(fields, panels):
            if field in ("gate", "residual"):
                steps, values = read_column(folder / "looks.csv", field)
            else:
                steps, values = read_column(folder / "log.csv", field)
                values = np.convolve(values, np.ones(9) / 9, "valid")  # means of 90 steps
                steps = steps[4:-4]
            panel.lines[name] = (steps, values)
    return panels


def main():
    if sys.argv[1:2] == ["train"]:
        train_changed(sys.argv[2:])
        return
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(train_and_judge, *zip(*make_queue())))
    report()


if __name__ == "__main__":
    run_main(main)
