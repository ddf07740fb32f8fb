"""The paper's figures and tables at the scale of the demo, under runs/paper/, and a picture of any training run.

    python tests/paper.py fig1         figures 1 and 5: full precision and ternary from the same noise
    python tests/paper.py fig2         figure 2: quantization after training against training with it
    python tests/paper.py fig4         figure 4: what goes through the blocks, with and without the RMS Norm
    python tests/paper.py table1       table 1: quality, two sizes, with and without guidance
    python tests/paper.py table2       table 2: bytes, memory and seconds of the real sizes
    python tests/paper.py all          all of it
    python tests/paper.py compare A B  any two checkpoints side by side: ours, released folders, Meta's DiT .pt
    python tests/paper.py run DIR      a training run, DIR/run.png: its curves, and the samples that it drew on its way

Each figure and table writes NAME.json, a table NAME.md and, where there is one, a picture NAME.png, and joins all
tables in results.md. Models that are missing are trained first: runs/demo, runs/demo-full, runs/paper-small and
runs/paper-small-full; for a seed other than 0, runs/demo-seed1 and so on. Samples that are compared start from the same
noise. The judge of bench_quality.py rates them.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sample import PAPER_STEPS, Progress, load_decoder, pick_classes, positive  # noqa: E402
from sample import run_main, sample_images, to_uint8  # noqa: E402
from terdit import SIZES, Config, GaussianDiffusion, atomic_write, load_model  # noqa: E402
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, quantize_model  # noqa: E402
from tests.bench_model import in_its_own_process  # noqa: E402
from tests.bench_quality import Exam  # noqa: E402
from train import DEMO, bf16_is_fast, build_model, draw_batch, load_data, make_optimizer, states  # noqa: E402

DDPM_STEPS = 25  # the paper's sampler, in fewer steps
STEPS_OF = {"tiny": DEMO.steps, "small": 1500}  # a step of small takes more than twice as long

# ----------------------------------------------------------------------------------------------------------------------
# Models and their samples


def start_training(path, size, seed, quiet):
    """Start train.py, which will write the checkpoint `path`."""
    flags = ["--compile", "--size", size, "--seed", str(seed), "--steps", str(STEPS_OF[size]), "--out", path.parent]
    if path.name == "full.pt":
        flags.append("--full-precision")
    # Two trainings share the cores. Threads that wait should sleep, not spin: the other training can use their core.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    stdout = subprocess.DEVNULL if quiet else None
    return subprocess.Popen([sys.executable, ROOT / "train.py", *flags], env=env, stdout=stdout)


def train_missing(paths, size, seed):
    """Train the checkpoints that do not exist yet, all at once. Only the first one shows its progress."""
    trainings = {}
    try:
        for path in paths:
            if not path.is_file():
                trainings[path] = start_training(path, size, seed, quiet=len(trainings) > 0)
        for training in trainings.values():
            training.wait()
    finally:
        # After Ctrl-C the trainings save their state: wait for that, too.
        failed = [str(path.parent) for path, training in trainings.items() if training.wait() != 0]
    if failed:
        raise ValueError(f"the training of {' and '.join(failed)} did not end well: see above")


def check_recipe(folder, size, seed):
    """Refuse a model that this script would not have trained like that. Without a saved state, nothing is known."""
    saved = states(folder)
    if not saved:
        return
    metadata = json.loads((saved[-1] / "run.json").read_text())
    for field, wanted in dict(steps=STEPS_OF[size], seed=seed, decay=DEMO.decay).items():
        found = metadata.get(field)
        if found != wanted:
            raise ValueError(f"{folder} was trained with {field}={found}, not {wanted}: move it away")


def trained(size, seed):
    """-> paths of the full-precision and of the ternary checkpoint. Those that are missing are trained first."""
    name = "demo" if size == "tiny" else "paper-small"
    ending = f"-seed{seed}" if seed > 0 else ""
    full = Path("runs") / f"{name}-full{ending}" / "full.pt"
    ternary = Path("runs") / f"{name}{ending}" / "packed.pt"
    train_missing([full, ternary], size, seed)
    check_recipe(full.parent, size, seed)
    check_recipe(ternary.parent, size, seed)
    return [full, ternary]


@lru_cache(maxsize=None)
def exam_of(size):
    return Exam(size)


def quality(model, n, seed, cfg=1.5):
    """-> samples (n, 3, H, W) of the classes in turn; their accuracy and toy FID."""
    y = torch.arange(n) % 10
    x = sample_images(model, y, seed, cfg, DDPM_STEPS, "ddpm")
    found = exam_of(model.config.input_size).quality(x, y)
    return x, dict(**found, n=n, seed=seed, cfg=cfg)


@lru_cache(maxsize=None)
def quality_of(path, n, seed, cfg=1.5):
    return quality(load_model(path), n, seed, cfg)


def spread(values, form):
    """The median of the values of some seeds, and their range if there is more than one."""
    median = form.format(np.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({form.format(min(values))} to {form.format(max(values))})"


def quality_columns(results):
    """Accuracy and toy FID of some seeds, as two columns of a table."""
    accuracy = spread([100 * result["accuracy"] for result in results], "{:.1f}")
    return [accuracy, spread([result["fid"] for result in results], "{:.2f}")]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and tables


def font(size=15):
    return ImageFont.load_default(size=size)


def save_png(image, path):
    atomic_write(path, lambda file: image.save(file, "PNG"))


class Row(NamedTuple):
    title: str
    note: str  # the line below the title
    images: torch.Tensor  # (n, 3, H, W) in [-1, 1]


def sheet(rows, path, zoom=3):
    """Draw rows of images, each with its text on the left."""
    left = 290
    gap = 4
    images = [to_uint8(row.images).repeat(zoom, 1).repeat(zoom, 2) for row in rows]
    n, height, width, _ = images[0].shape
    page = Image.new("RGB", (left + n * width, len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        top = i * (height + gap)
        text = f"{row.title}\n{row.note}"
        draw.text((8, top + height // 2 - 22), text, fill="black", font=font(), spacing=6)
        strip = np.concatenate(list(images[i]), axis=1)
        page.paste(Image.fromarray(strip), (left, top))
    save_png(page, path)


COLOURS = ["#222222", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#999999"]  # Okabe and Ito's


class Panel(NamedTuple):
    title: str
    x_label: str
    lines: dict  # name: (x values, y values)
    log: bool = True  # a logarithmic y axis, which leaves out values of 0; otherwise linear, and 0 is on it


class Axis(NamedTuple):
    """Where values lie: `low` at one pixel, `high` at another."""

    low: float
    high: float
    low_pixel: float
    high_pixel: float
    log: bool = False

    def pixel(self, value):
        if self.log:
            share = np.log(value / self.low) / np.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return float(self.low_pixel + share * (self.high_pixel - self.low_pixel))


def can_be_shown(values, log):
    values = np.asarray(values)
    return np.isfinite(values) & ((values > 0) | (not log))


def linear_ticks(low, high):
    """About five round numbers, the first at or below low, the last at or above high."""
    least_step = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(least_step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least_step)
    return step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)


def log_ticks(low, high):
    """The powers of ten from below low to above high; over a short range 1, 2, 5, 10, 20, 50 and so on instead."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    if len(powers) > 3:
        return powers
    ticks = np.concatenate([[power, 2 * power, 5 * power] for power in powers])
    first = np.flatnonzero(ticks <= low)[-1]
    last = np.flatnonzero(ticks >= high)[0]
    return ticks[first : max(last, first + 1) + 1]


def draw_panel(draw, panel, frame, x_range, colours):
    """Draw the axes and lines of a panel. frame: pixels of its left, top, right and bottom."""
    left, top, right, bottom = frame
    middle = (left + right) / 2
    xs = np.concatenate([x for x, _ in panel.lines.values()])
    ys = np.concatenate([y for _, y in panel.lines.values()])
    ys = ys[can_be_shown(ys, panel.log)]
    if panel.log:
        y_ticks = log_ticks(ys.min(), ys.max())
    else:
        y_ticks = linear_ticks(min(0, ys.min()), ys.max() or 1)
    x_axis = Axis(*x_range, left, right)
    y_axis = Axis(y_ticks[0], y_ticks[-1], bottom, top, panel.log)

    draw.text((middle, top - 8), panel.title, fill="black", font=font(16), anchor="ms")
    draw.text((middle, bottom + 40), panel.x_label, fill="black", font=font(), anchor="ms")
    for value in y_ticks:
        y = y_axis.pixel(value)
        draw.line([(left, y), (right, y)], fill="#cccccc")
        draw.text((left - 6, y), f"{value:g}", fill="black", font=font(13), anchor="rm")
    x_ticks = np.unique(xs)
    if len(x_ticks) > 12:
        x_ticks = linear_ticks(*x_range)
    last_label = -np.inf
    for value in x_ticks:
        x = x_axis.pixel(value)
        if left <= x <= right and x > last_label + 40:  # there is room for its number
            draw.text((x, bottom + 6), f"{value:,.0f}", fill="black", font=font(13), anchor="mt")
            last_label = x
    for name, (xs, ys) in panel.lines.items():
        shown = can_be_shown(ys, panel.log)
        points = [(x_axis.pixel(x), y_axis.pixel(y)) for x, y, show in zip(xs, ys, shown) if show]
        draw.line(points, fill=colours[name], width=3, joint="curve")
        if len(points) <= 20:
            for x, y in points:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[name])
    draw.rectangle(frame, outline="black")


def plot(panels, columns=2, width=470, height=330):
    """-> a page of panels, each width x height pixels, below one legend. Equal x labels share one range of x."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = dict(zip(names, COLOURS))
    x_values = {}
    for panel in panels:
        for x, _ in panel.lines.values():
            x_values.setdefault(panel.x_label, []).extend(x)
    left = 62  # room for the numbers of the y axis
    legend = 24 * len(names) + 20
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (columns * width, legend + rows * height), "white")
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        y = 20 + 24 * i
        draw.line([(left, y), (left + 36, y)], fill=colours[name], width=3)
        draw.text((left + 46, y), name, fill="black", font=font(), anchor="lm")
    for i, panel in enumerate(panels):
        panel_left = i % columns * width
        panel_top = legend + i // columns * height
        frame = (panel_left + left, panel_top + 34, panel_left + width - 26, panel_top + height - 50)
        low = min(x_values[panel.x_label])
        high = max(x_values[panel.x_label])
        draw_panel(draw, panel, frame, (low, max(high, low + 1)), colours)
    return page


def publish(args, name, title, columns, rows, results):
    """Print the table, and write it and the figures behind it."""
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    text = f"## {title}\n\n" + "\n".join(lines) + "\n"
    print(text, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(text)
    (args.out / f"{name}.json").write_text(json.dumps(results, indent=1))
    tables = [path.read_text() for path in sorted(args.out.glob("*.md")) if path.name != "results.md"]
    (args.out / "results.md").write_text("\n".join(tables))


# ----------------------------------------------------------------------------------------------------------------------
# Figures 1 and 5, and any two checkpoints


def sample_twice(path, args):
    """-> the config of a checkpoint, and two samples of each class, as two rows of all classes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # kernel.cu needs bf16
    model = load_model(path, device, dtype)
    config = model.config
    decode = None
    cfg = 1.5
    steps = DDPM_STEPS
    if config.vae:  # a model of latents
        decode = load_decoder(config.vae, config.latent_scale, device)
        cfg = 4.0
        steps = PAPER_STEPS
    if args.cfg is not None:
        cfg = args.cfg
    if args.steps is not None:
        steps = args.steps
    classes = pick_classes(args.classes, config)
    y = torch.tensor(classes).repeat(2)
    progress = Progress(len(y) * steps)
    x = sample_images(model, y, args.seeds[0], cfg, steps, "ddpm", decode=decode, progress=progress)
    first, second = x.split(len(classes))
    return config, first, second


def compare(args, paths, name="compare"):
    """A row of samples of each checkpoint, then another. All rows have the same classes, each pair the same noise."""
    first_rows = []
    second_rows = []
    args.out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        config, first, second = sample_twice(path, args)
        weights = "ternary" if config.ternary else "full precision"
        title = f"{weights}, {config.dim} wide"
        file = "/".join(Path(path).parts[-2:])
        first_rows.append(Row(title, file, first))
        second_rows.append(Row(title, file, second))
    shapes = {tuple(row.images.shape) for row in first_rows}
    if len(shapes) > 1:
        both = " and ".join(map(str, sorted(shapes)))
        raise ValueError(f"the two draw {both} (classes, channels, height, width): expected the same")
    pixels = first_rows[0].images.shape[-1]
    sheet(first_rows + second_rows, args.out / f"{name}.png", zoom=max(1, 96 // pixels))
    print(f"wrote {args.out / name}.png")


def fig1(args):
    compare(args, trained("tiny", args.seeds[0]), "fig1")


# ----------------------------------------------------------------------------------------------------------------------
# Figure 2: quantization after training


class Rated(NamedTuple):
    name: str
    bits: float  # a weight
    samples: torch.Tensor
    quality: dict


def rate_quantizers(n, seed):
    """Full precision, ternary from the start, and all ways to quantize the full-precision model after its training."""
    full, ternary = trained("tiny", seed)
    rated = [Rated("full precision", 32.0, *quality_of(full, n, seed))]
    rated.append(Rated("ternary from the start (TerDiT)", 2.0, *quality_of(ternary, n, seed)))

    def calibration(model):
        sample_images(model, torch.arange(20) % 10, seed + 1000, steps=DDPM_STEPS, sampler="ddpm")

    for method in (*RECONSTRUCTIONS, *reversed(QUANTIZERS)):
        model = quantize_model(load_model(full), method, calibration)
        rated.append(Rated(method, model.bits_per_weight, *quality(model, n, seed)))
        print(f"seed {seed}: {method}, FID {rated[-1].quality['fid']:.2f}", flush=True)
    return rated


def fig2(args):
    rated_by_seed = [rate_quantizers(args.n, seed) for seed in args.seeds]
    results = [dict(name=r.name, bits=r.bits, **r.quality) for rated in rated_by_seed for r in rated]
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        same = [result for result in results if result["name"] == name]
        rows.append([name, f"{same[0]['bits']:.2f}", *quality_columns(same)])
    columns = ["", "bits a weight", "accuracy, %", "toy FID"]
    publish(args, "fig2", f"Figure 2: {args.n} samples a row, seeds {args.seeds}", columns, rows, results)
    notes = [f"{r.bits:.2f} bits, FID {r.quality['fid']:.1f}" for r in rated_by_seed[0]]
    sheet([Row(r.name, note, r.samples[:20]) for r, note in zip(rated_by_seed[0], notes)], args.out / "fig2.png")


# ----------------------------------------------------------------------------------------------------------------------
# Figure 4: what goes through the blocks


MARKS = [0, 10, 20, 50, 100, 150, 200, 250, 300]  # steps at which figure 4 looks


class Variant(NamedTuple):
    fields: dict  # of Config
    alpha: float | None = None  # where the alphas of the adaLN projections start, if not at absmean
    gain: float | None = None  # where the gains of their norms start, if not at 0
    upstream: bool = False  # upstream's start: every alpha drawn from N(0, 1), adaLN weights 0, gains 1


VARIANTS = {
    "full precision": Variant(dict(ternary=False, adaln_norm=False)),
    "ternary, RMS Norm, alpha = absmean": Variant({}),
    "ternary, RMS Norm, alpha = 1": Variant({}, alpha=1.0),
    # With a gain of 1 a block does not start as the identity, just as without a norm.
    "ternary, RMS Norm with gain 1, alpha = 1": Variant({}, alpha=1.0, gain=1.0),
    "ternary, no norm, alpha = absmean": Variant(dict(adaln_norm=False)),
    "ternary, no norm, alpha = 1": Variant(dict(adaln_norm=False), alpha=1.0),
    "upstream's start, RMS Norm": Variant({}, upstream=True),
    "upstream's start, no norm": Variant(dict(adaln_norm=False), upstream=True),
}


def start_as_upstream(model):
    """As its model code and its fork of fairscale have it. About half of the alphas are negative."""
    rng = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("alphas"):
            p.data.copy_(torch.randn(1, generator=rng))
        elif name.endswith("adaLN_modulation.1.weight"):
            p.data.zero_()
        elif name.endswith("adaLN_modulation.2.weight"):
            p.data.fill_(1.0)


class Magnitude(NamedTuple):
    rms: float
    greatest: float  # absolute value


class Recorder:
    """Notes the magnitude of what each block's adaLN (behind its norm) and each block put out, while `on` is True."""

    def __init__(self, model):
        self.on = False
        self.outputs = {"adaln": [None] * len(model.layers), "residual": [None] * len(model.layers)}
        for i, layer in enumerate(model.layers):
            layer.adaLN_modulation.register_forward_hook(partial(self.note, "adaln", i))
            layer.register_forward_hook(partial(self.note, "residual", i))

    def note(self, kind, i, module, inputs, out):
        if self.on:
            out = out.detach().float()
            self.outputs[kind][i] = Magnitude(out.square().mean().sqrt().item(), out.abs().max().item())


def activations(variant, marks, data, cfg):
    """Train a tiny model for max(marks) steps -> a dict for each mark.

    It holds the magnitudes by block of the adaLN's outputs and of the residual stream, on that step's batch, and the
    loss and the gradient norm. The training stops early if the gradient is not finite.
    """
    torch.manual_seed(cfg.seed)
    config = Config(**SIZES["tiny"] | variant.fields)
    model = build_model(config)
    if variant.upstream:
        start_as_upstream(model)
    for layer in model.layers:
        if variant.alpha is not None:
            layer.adaLN_modulation[1].alphas.data.fill_(variant.alpha)
        if variant.gain is not None:
            layer.adaLN_modulation[2].weight.data.fill_(variant.gain)
    diffusion = GaussianDiffusion(prediction=config.prediction)
    optimizer = make_optimizer(model, cfg)
    recorder = Recorder(model)
    looks = []
    for step in range(max(marks) + 1):
        recorder.on = step in marks
        batch = draw_batch(data, config, cfg, diffusion, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast("cpu")):
            loss = diffusion.training_losses(model, *batch)["loss"].mean()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if recorder.on:
            outputs = {kind: list(blocks) for kind, blocks in recorder.outputs.items()}
            looks.append(dict(step=step, **outputs, loss=loss.item(), grad_norm=grad_norm))
        if not np.isfinite(grad_norm):
            break
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * group["lr_scale"] * min(1, (step + 1) / cfg.warmup)
        optimizer.step()
        optimizer.zero_grad()
    return looks


def total_rms(blocks):
    return np.sqrt(np.mean([block.rms**2 for block in blocks]))


def greatest(blocks):
    return max(block.greatest for block in blocks)


def lines_over_steps(found, value):
    """A line for each variant: value(look) over the steps."""
    return {name: ([look["step"] for look in looks], [value(look) for look in looks]) for name, looks in found.items()}


def lines_over_blocks(found, kind):
    """A line for each variant: the RMS of each block's output at the last look."""
    lines = {}
    for name, looks in found.items():
        blocks = looks[-1][kind]
        lines[name] = (list(range(len(blocks))), [block.rms for block in blocks])
    return lines


def fig4(args):
    cfg = replace(DEMO, seed=args.seeds[0])
    data = load_data(cfg)
    found = {name: activations(variant, MARKS, data, cfg) for name, variant in VARIANTS.items()}
    rows = []
    for name, looks in found.items():
        for look in (looks[0], looks[len(looks) // 2], looks[-1]):
            values = [total_rms(look["adaln"]), greatest(look["adaln"]), total_rms(look["residual"]),
                      greatest(look["residual"]), look["grad_norm"], look["loss"]]
            rows.append([name, str(look["step"]), *[f"{value:.3g}" for value in values]])
    columns = ["", "step", "adaLN RMS", "adaLN greatest", "residual RMS", "residual greatest", "gradient norm", "loss"]
    title = "Figure 4: size tiny, outputs of the adaLN projections and of the blocks"
    publish(args, "fig4", title, columns, rows, found)

    over_steps = partial(lines_over_steps, found)
    panels = [
        Panel("adaLN output: RMS", "step", over_steps(lambda look: total_rms(look["adaln"]))),
        Panel("adaLN output: greatest", "step", over_steps(lambda look: greatest(look["adaln"]))),
        Panel("residual stream: RMS", "step", over_steps(lambda look: total_rms(look["residual"]))),
        Panel("gradient norm before clipping", "step", over_steps(lambda look: look["grad_norm"])),
        Panel("adaLN output: RMS, last step", "block", lines_over_blocks(found, "adaln")),
        Panel("residual stream: RMS, last step", "block", lines_over_blocks(found, "residual")),
    ]
    save_png(plot(panels), args.out / "fig4.png")


# ----------------------------------------------------------------------------------------------------------------------
# Table 1: quality


def table1(args):
    results = []
    for seed in args.seeds:
        for size in ("tiny", "small"):
            images = DEMO.batch * STEPS_OF[size]
            for kind, path in zip(("full precision", "ternary"), trained(size, seed)):
                for cfg in (1.0, 1.5):
                    _, found = quality_of(path, args.n, seed, cfg)
                    results.append(dict(size=size, kind=kind, images=images, bytes=path.stat().st_size, **found))
                    print(f"seed {seed}: {size}, {kind}, guidance {cfg}: FID {found['fid']:.2f}", flush=True)
    by_row = {}
    for result in results:
        row = (result["size"], result["kind"], result["cfg"])
        by_row.setdefault(row, []).append(result)
    rows = []
    for (size, kind, cfg), same in by_row.items():
        file = f"{same[0]['bytes'] / 1e6:.2f} MB"
        rows.append([size, kind, f"{same[0]['images']:,}", file, f"{cfg:g}", *quality_columns(same)])
    columns = ["size", "weights", "images seen", "file", "guidance", "accuracy, %", "toy FID"]
    publish(args, "table1", f"Table 1: {args.n} samples a row, seeds {args.seeds}", columns, rows, results)


# ----------------------------------------------------------------------------------------------------------------------
# Table 2: the real sizes


MODELS = [  # name, size, mode, and the memory that the paper's table 2 reports for it on a GPU
    ("DiT-XL/2", "DiT-XL/2", "dense", "3 GB"),
    ("Large-DiT-4.2B", "4.2B", "dense", "17 GB"),
    ("TerDiT-600M", "600M", "packed", ""),
    ("TerDiT-4.2B", "4.2B", "packed", "2 GB"),
]


def table2(args):
    """Random weights at the real sizes. Steps are timed for ten seconds; the paper's 250 steps are 250 times one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    results = []
    rows = []
    for name, size, mode, paper_memory in MODELS:
        for image_size in (256, 512):
            try:
                found = in_its_own_process(size, image_size, mode, device, 0)
            except RuntimeError as e:  # dense 4.2B needs more memory than many a laptop has
                row = [name, str(image_size), f"failed: {e}", "", "", "", "", ""]
            else:
                results.append(dict(name=name, image_size=image_size, device=device, **found))
                sizes = [f"{found[key] / 1e9:.2f} GB" for key in ("file_bytes", "weight_bytes", "peak_bytes")]
                paper = paper_memory if image_size == 256 else ""
                step = found["step_s"]
                row = [name, str(image_size), *sizes, paper, f"{step:.2f}", f"{250 * step:,.0f}"]
            rows.append(row)
            print(" | ".join(row), flush=True)
    columns = ["", "pixels", "file", "weights in memory", "peak memory", "paper's GPU memory", "s a step",
               "s for 250 steps"]
    publish(args, "table2", f"Table 2: one image, bf16, {where}", columns, rows, results)


# ----------------------------------------------------------------------------------------------------------------------
# A training run


def read_log(folder):
    """log.csv of a run -> its rows, dicts of text."""
    path = folder / "log.csv"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected the --out of a training")
    if not path.is_file():
        raise ValueError(f"{folder}: no log.csv in it, expected the --out of a training")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for column in ("step", "loss"):
        if not rows or not rows[-1].get(column):
            raise ValueError(f"{path}: no {column} in it, expected a row for each 10 steps of a training")
    return rows


def read_column(rows, name):
    """-> steps and values of the rows in which this column is filled."""
    filled = [row for row in rows if row.get(name)]
    return [int(row["step"]) for row in filled], [float(row[name]) for row in filled]


def running_mean(values, window):
    """The mean of `window` values around each value. Near the two ends it is of fewer, as many before as after."""
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        means.append(np.mean(values[i - reach : i + reach + 1]))
    return means


def run_panels(rows):
    """Curves of a run: the loss, and how many ternary codes flip. What the log lacks is left out."""
    window = 9
    steps, loss = read_column(rows, "loss")
    lines = {f"loss, each point the mean of {window} rows of the log": (steps, running_mean(loss, window))}
    steps, val_loss = read_column(rows, "val_loss")
    if val_loss:
        lines["val_loss, of the averaged model on held-out images"] = (steps, val_loss)
    panels = [Panel("loss", "step", lines)]
    steps, flipped = read_column(rows, "flipped")
    if flipped:
        lines = {"flipped, the ternary codes that changed in 100 steps": (steps, [100 * share for share in flipped])}
        panels.append(Panel("flipped codes, %", "step", lines, log=False))
    return panels


def run_grids(folder, last_step, most=6):
    """The sample grids of a run -> titles and paths, `most` of them, evenly chosen, the first and the last included."""
    grids = []
    for path in sorted(folder.glob("grid-*.png")):
        step = path.stem.removeprefix("grid-")
        if step.isdigit():
            grids.append((f"step {int(step):,}", path))
    if (folder / "grid.png").is_file():
        grids.append((f"step {last_step:,}, the exported model", folder / "grid.png"))
    if len(grids) > most:
        chosen = np.linspace(0, len(grids) - 1, most).round().astype(int)
        grids = [grids[i] for i in chosen]
    return grids


def draw_strip(grids, width=560, height=230):
    """-> the grids below each other, each below its title and at most width x height pixels."""
    images = []
    for _, path in grids:
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.thumbnail((width, height))
        images.append(image)
    title_height = 34
    gap = 10
    page_width = max(280, *[image.width for image in images])  # 280 holds a title
    page = Image.new("RGB", (page_width, sum(title_height + image.height + gap for image in images)), "white")
    draw = ImageDraw.Draw(page)
    top = 0
    for (title, _), image in zip(grids, images):
        draw.text((0, top + title_height - 8), title, fill="black", font=font(16), anchor="ls")
        page.paste(image, (0, top + title_height))
        top += title_height + image.height + gap
    return page


def plot_run(folder, path):
    """Draw a training run: its curves on the left, its sample grids on the right."""
    rows = read_log(folder)
    panels = run_panels(rows)
    grids = run_grids(folder, int(rows[-1]["step"]))
    if grids:
        strip = draw_strip(grids)
        height = min(480, max(330, strip.height // len(panels) - 46))  # as high as the strip, where that looks well
        curves = plot(panels, columns=1, width=600, height=height)
        page = Image.new("RGB", (curves.width + 16 + strip.width + 16, max(curves.height, strip.height)), "white")
        page.paste(curves, (0, 0))
        page.paste(strip, (curves.width + 16, 0))
    else:
        page = plot(panels, columns=1, width=600)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(page, path)
    print(f"wrote {path}")
    missing = [name for name in ("val_loss", "flipped") if not read_column(rows, name)[0]]
    if not grids:
        missing.append("sample grids")
    if missing:
        print(f"not in this run, so not in the picture: {', '.join(missing)}")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


FIGURES = {"fig1": fig1, "fig2": fig2, "fig4": fig4, "table1": table1, "table2": table2}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=[*FIGURES, "all", "compare", "run"])
    p.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="compare: two checkpoints; run: a run's folder")
    p.add_argument("--out", type=Path, help="folder to write to, default runs/paper; run: the PNG, default DIR/run.png")
    p.add_argument("--n", type=positive, default=300, help="samples a row of fig2 and table1")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="fig2, table1: of training and sampling")
    p.add_argument("--classes", nargs="+", help="compare: names or indices")
    p.add_argument("--cfg", type=float, help="compare: guidance; default 1.5, of latents 4")
    p.add_argument("--steps", type=positive, help="compare: default as in sample.py")
    args = p.parse_args()
    n_paths = {"compare": 2, "run": 1}
    if len(args.paths) != n_paths.get(args.part, 0):
        p.error("compare takes two checkpoints, run takes one folder, nothing else takes any")
    if args.part == "run":
        folder = args.paths[0]
        plot_run(folder, args.out or folder / "run.png")
        return
    args.out = args.out or Path("runs/paper")
    start = time.time()
    for name in FIGURES if args.part == "all" else [args.part]:
        if name == "compare":
            compare(args, args.paths)
        else:
            FIGURES[name](args)
        print(f"{name}: {time.time() - start:.0f} s so far", flush=True)


if __name__ == "__main__":
    run_main(main)
