"""Three small pictures of a demo run: is my own run healthy, and how does a digit appear?

    python tests/pictures.py RUN    draws run.png, steps.png and appears.png in the run's folder

RUN comes from `python train.py --compile --save-every 500 --out RUN`. What is read of it: log.csv,
the grids after 500 and 1,500 steps and at the end, and packed.pt.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sample import find_checkpoint, generator, run_main  # noqa: E402
from terdit import diffusion_of, load_model  # noqa: E402
from tests.paper import Panel, plot, sheet  # noqa: E402

STEPS = 16  # of sampling, as sample.py
CFG_SCALE = 1.5


def read_column(path, name):
    """A .csv file -> the steps of the rows in which this column is filled, and its values."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def draw_curves(folder):
    """The loss of a run, and the share of its codes that flip."""
    log = folder / "log.csv"
    steps, loss = read_column(log, "loss")
    smooth = np.convolve(loss, np.ones(9) / 9, "valid")
    lines = {"loss, means of nine rows of log.csv": (steps[4:-4], smooth)}
    lines["val_loss, on images held out, at all timesteps alike"] = read_column(log, "val_loss")
    steps, flipped = read_column(log, "flipped")
    flips = {"flipped, % of the codes in 100 steps": (steps, [100 * share for share in flipped])}
    panels = [Panel("loss", "step", lines), Panel("flipped codes, %", "step", flips, log=False)]
    plot(panels).save(folder / "run.png")


def first_row(path, size, columns=10):
    """The first images of a grid.png -> (columns, 3, size, size) in [-1, 1]."""
    picture = Image.open(path)
    zoom = picture.width // (columns * size)
    pixels = torch.from_numpy(np.array(picture)[::zoom, ::zoom][:size])  # (size, columns * size, 3)
    return pixels.unflatten(1, (columns, size)).permute(1, 3, 0, 2) / 127.5 - 1


def draw_steps(folder, size):
    """Samples of one run while it trains: all start from the same noise."""
    last = read_column(folder / "log.csv", "loss")[0][-1]
    rows = []
    for step in (500, 1500, last):
        name = "grid.png" if step == last else f"grid-{step:07d}.png"
        rows.append((f"after {step:,} steps", f"of {last:,}", first_row(folder / name, size)))
    sheet(rows, folder / "steps.png")


@torch.no_grad()
def watch(model, digit, seed=0):
    """Sample one digit as sample.py does -> the model's input x_t at each step, and the x_0 that it
    predicts from it, each (STEPS, C, H, W)."""
    config = model.config
    diffusion = diffusion_of(config, STEPS)
    shape = (1, config.in_channels, config.input_size, config.input_size)
    labels = torch.tensor([digit, config.num_classes])  # the second is the null label
    noisy = []
    clean = []

    def model_fn(x, t):
        out = model.forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), labels, CFG_SCALE)[:1]
        i = torch.tensor([STEPS - 1 - len(clean)])  # the sampler counts down
        noisy.append(x)
        clean.append(diffusion.predict_x0(out[:, : config.in_channels], x, i))
        return out

    noise = torch.randn(shape, generator=generator(seed, digit))
    diffusion.dpm_sample_loop(model_fn, noise, clip_denoised=True)
    return torch.cat(noisy), torch.cat(clean)


def main():
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="folder of a demo run with --save-every 500")
    folder = parser.parse_args().run
    model = load_model(find_checkpoint(folder))
    draw_curves(folder)
    draw_steps(folder, model.config.input_size)
    noisy, clean = watch(model, 3)
    _, clean_7 = watch(model, 7)
    rows = [
        ("what the model gets", f"x_t of {STEPS} steps, from noise", noisy),
        ("what it predicts", "x_0, class 3", clean),
        ("the same for another", "x_0, class 7", clean_7),
    ]
    sheet(rows, folder / "appears.png", zoom=2)


if __name__ == "__main__":
    run_main(main)
