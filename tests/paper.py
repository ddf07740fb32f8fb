"""The paper's figures and tables at the scale of the demo, under runs/paper/, and a picture of any training run.

    python tests/paper.py fig1         figures 1 and 5: full precision and ternary from the same noise
    python tests/paper.py fig2         figure 2: quantization after training against training with it
    python tests/paper.py fig4         figure 4: what goes through the blocks, with and without the RMS Norm
    python tests/paper.py table1       table 1: quality, two sizes, with and without guidance
    python tests/paper.py table2       table 2: bytes, memory and seconds of the real sizes
    python tests/paper.py all          all of it
    python tests/paper.py compare A B  any two checkpoints side by side: ours, released folders, Meta's DiT .pt
    python tests/paper.py run DIR      the curves of a training run, DIR/run.png

Each figure and table writes NAME.json, a table NAME.md and, where there is one, a picture NAME.png, and joins all
tables in results.md. Models that are missing are trained first: runs/demo, runs/demo-full, runs/paper-small and
runs/paper-small-full; for a seed other than 0, runs/demo-seed1 and so on. Samples that are compared start from the same
noise. The judge of bench_quality.py rates them.
"""

import argparse
import csv
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from sample import DEVICES, Progress, find_checkpoint, pick_classes, run_main, to_uint8  # noqa: E402
from terdit import SIZES, Config, DiT, load_model  # noqa: E402
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, load_any, quantize_model  # noqa: E402
from tests.bench_quality import draw, exam_of  # noqa: E402
from tests.bench_speed import make_model_work, start  # noqa: E402

STEPS_OF = {"tiny": train.DEMO["steps"], "small": 1500}  # a step of small takes more than twice as long
DDPM = dict(sampler="ddpm", steps=25)  # the paper's sampler, in fewer steps


def read_log(folder):
    """log.csv of a run -> its rows, dicts of text."""
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def trained(size, seed):
    """-> paths of the full-precision and of the ternary checkpoint. Trainings that are missing come first, and those
    that were stopped go on."""
    paths = []
    steps = STEPS_OF[size]
    for ending, file in (("-full", "full.pt"), ("", "packed.pt")):
        name = "demo" if size == "tiny" else "paper-small"
        path = Path("runs") / f"{name}{ending}{f'-seed{seed}' if seed else ''}" / file
        log = read_log(path.parent) if (path.parent / "log.csv").is_file() else []
        if not path.is_file() or (log and int(log[-1]["step"]) < steps):
            command = [sys.executable, ROOT / "train.py", "--compile", "--size", size, "--seed", str(seed),
                       "--steps", str(steps), "--out", path.parent]  # fmt: skip
            if file == "full.pt":
                command.append("--full-precision")
            if subprocess.run(command).returncode:
                raise ValueError(f"the training of {path.parent} did not end well: see above")
        paths.append(path)
    return paths


def quality(model, n, seed, cfg=1.5):
    """-> samples (n, 3, H, W) of the classes in turn; their accuracy and toy FID."""
    y = torch.arange(n) % 10
    x = draw(model, y, seed=seed, cfg_scale=cfg, **DDPM)
    return x, exam_of(x.shape[-1]).quality(x, y)


def spread(values, digits):
    """The median of the values of some seeds, and their range if there is more than one."""
    text = f"{np.median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def quality_columns(results):
    """Accuracy and toy FID of some seeds, as two columns of a table."""
    return [spread([100 * r["accuracy"] for r in results], 1), spread([r["fid"] for r in results], 2)]


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def publish(out, name, title, columns, rows, results):
    """Print the table, and write it and the figures behind it."""
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    text = f"## {title}\n\n" + "\n".join(lines) + "\n"
    print(text, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    tables = [path.read_text() for path in sorted(out.glob("*.md")) if path.name != "results.md"]
    (out / "results.md").write_text("\n".join(tables))


FONT = ImageFont.load_default(size=15)


def sheet(rows, path, zoom=3):
    """Draw rows of images: title, the line below it, images (n, 3, H, W) in [-1, 1]."""
    left = 290  # room for the text
    gap = 4
    strips = [to_uint8(images).repeat(zoom, 1).repeat(zoom, 2) for _, _, images in rows]
    n, height, width, _ = strips[0].shape
    page = Image.new("RGB", (left + n * width, len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(page)
    for i, (title, note, _) in enumerate(rows):
        top = i * (height + gap)
        pen.text((8, top + height // 2 - 22), f"{title}\n{note}", fill="black", font=FONT, spacing=6)
        page.paste(Image.fromarray(np.concatenate(list(strips[i]), axis=1)), (left, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    print(f"wrote {path}")


COLOURS = ["#222222", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#999999"]  # Okabe and Ito's


class Panel(NamedTuple):
    title: str
    x_label: str
    lines: dict  # name: (x values, y values)
    log: bool = True  # a logarithmic y axis, which leaves out values of 0; otherwise linear, and 0 is on it


def ticks(low, high, log=False):
    """Round numbers, the first at or below low, the last at or above high."""
    if log:
        powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 2)
        factors = [1, 2, 5] if len(powers) <= 4 else [1]
        found = np.concatenate([power * np.array(factors) for power in powers])
    else:
        least_step = (high - low) / 5
        power = 10.0 ** np.floor(np.log10(least_step))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least_step)
        found = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)
    first = np.flatnonzero(found <= low)[-1]
    last = np.flatnonzero(found >= high)[0]
    return found[first : max(last, first + 1) + 1]


def draw_panel(pen, panel, frame, colours):
    """Draw the axes and lines of a panel. frame: pixels of its left, top, right and bottom."""
    left, top, right, bottom = frame
    points = {}  # of each line, without what a logarithm cannot show
    for name, (xs, ys) in panel.lines.items():
        points[name] = [(x, y) for x, y in zip(xs, ys) if np.isfinite(y) and (y > 0 or not panel.log)]
    ys = [y for line in points.values() for _, y in line]
    x_ticks = ticks(0, max(x for line in points.values() for x, _ in line) or 1)
    y_ticks = ticks(min(ys), max(ys), log=True) if panel.log else ticks(min(0, *ys), max(ys) or 1)

    def place(x, y):
        """The pixel of a point."""
        low = y_ticks[0]
        high = y_ticks[-1]
        share = np.log(y / low) / np.log(high / low) if panel.log else (y - low) / (high - low)
        return left + x / x_ticks[-1] * (right - left), bottom - share * (bottom - top)

    middle = (left + right) / 2
    pen.text((middle, top - 8), panel.title, fill="black", font=FONT, anchor="ms")
    pen.text((middle, bottom + 40), panel.x_label, fill="black", font=FONT, anchor="ms")
    for value in y_ticks:
        _, y = place(0, value)
        pen.line([(left, y), (right, y)], fill="#cccccc")
        pen.text((left - 6, y), f"{value:g}", fill="black", font=FONT, anchor="rm")
    for value in x_ticks:
        x, _ = place(value, y_ticks[0])
        pen.text((x, bottom + 6), f"{value:,.0f}", fill="black", font=FONT, anchor="mt")
    for name, line in points.items():
        pixels = [place(x, y) for x, y in line]
        pen.line(pixels, fill=colours[name], width=3, joint="curve")
        if len(pixels) <= 20:
            for x, y in pixels:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[name])
    pen.rectangle(frame, outline="black")


def plot(panels, columns=2, width=470, height=330):
    """-> a page of panels, each width x height pixels, below one legend."""
    names = dict.fromkeys(name for panel in panels for name in panel.lines)
    colours = dict(zip(names, COLOURS))
    left = 62  # room for the numbers of the y axis
    legend = 24 * len(names) + 20
    page = Image.new("RGB", (columns * width, legend + -(-len(panels) // columns) * height), "white")
    pen = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        y = 20 + 24 * i
        pen.line([(left, y), (left + 36, y)], fill=colours[name], width=3)
        pen.text((left + 46, y), name, fill="black", font=FONT, anchor="lm")
    for i, panel in enumerate(panels):
        x = i % columns * width
        y = legend + i // columns * height
        draw_panel(pen, panel, (x + left, y + 34, x + width - 26, y + height - 50), colours)
    return page


def sample_twice(path, args):
    """-> two samples of each class of a checkpoint, as two rows of all classes."""
    dtype = torch.bfloat16 if DEVICES[0] == "cuda" else torch.float32  # kernel.cu needs bf16
    model = load_any(find_checkpoint(path), DEVICES[0], dtype)
    config = model.config
    cfg = args.cfg
    if cfg is None:
        cfg = 4.0 if config.vae else 1.5
    steps = args.steps or (250 if config.vae else DDPM["steps"])
    classes = pick_classes(args.classes, config)
    y = torch.tensor(classes).repeat(2)
    x = draw(model, y, seed=args.seeds[0], cfg_scale=cfg, steps=steps, sampler="ddpm", progress=Progress(len(y)))
    title = f"{'ternary' if config.ternary else 'full precision'}, {config.dim} wide"
    return [(title, "/".join(path.parts[-2:]), images) for images in x.split(len(classes))]


def compare(args, paths, name="compare"):
    """A row of samples of each checkpoint, then another. All rows have the same classes, each pair the same noise."""
    pairs = [sample_twice(path, args) for path in paths]
    rows = [rows[i] for i in (0, 1) for rows in pairs]
    shapes = {tuple(images.shape) for _, _, images in rows}
    if len(shapes) > 1:
        raise ValueError(f"the two draw {shapes} (classes, channels, height, width): expected the same")
    sheet(rows, args.out / f"{name}.png", zoom=max(1, 96 // rows[0][2].shape[-1]))


def fig1(args):
    compare(args, trained("tiny", args.seeds[0]), "fig1")


def rate_quantizers(n, seed):
    """Full precision, ternary, and all ways to quantize full precision -> rows for sheet, dicts of what was found."""
    full, ternary = trained("tiny", seed)
    found = [("full precision", 32.0, *quality(load_model(full), n, seed)),
             ("ternary from the start (TerDiT)", 2.0, *quality(load_model(ternary), n, seed))]  # fmt: skip

    def calibration(model):
        draw(model, torch.arange(20) % 10, seed=seed + 1000, **DDPM)

    for method in (*RECONSTRUCTIONS, *reversed(QUANTIZERS)):
        model = quantize_model(load_model(full), method, calibration)
        found.append((method, model.bits_per_weight, *quality(model, n, seed)))
        print(f"seed {seed}: {method}, FID {found[-1][-1]['fid']:.2f}", flush=True)
    rows = [(name, f"{bits:.2f} bits, FID {rated['fid']:.1f}", x[:20]) for name, bits, x, rated in found]
    return rows, [dict(name=name, bits=bits, seed=seed, **rated) for name, bits, _, rated in found]


def fig2(args):
    rated = [rate_quantizers(args.n, seed) for seed in args.seeds]
    results = [result for _, results in rated for result in results]
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        same = [result for result in results if result["name"] == name]
        rows.append([name, f"{same[0]['bits']:.2f}", *quality_columns(same)])
    title = f"Figure 2: {args.n} samples a row, seeds {args.seeds}"
    publish(args.out, "fig2", title, ["", "bits a weight", "accuracy, %", "toy FID"], rows, results)
    sheet(rated[0][0], args.out / "fig2.png")


# ----------------------------------------------------------------------------------------------------------------------
# Figure 4: what goes through the blocks

MARKS = [0, 10, 20, 50, 100, 150, 200, 250, 300]  # steps at which figure 4 looks

# Name: fields of Config, and what starts elsewhere than in train.py, by the end of its name. The gains of the RMS Norm
# start at 0; with a gain of 1 a block does not start as the identity, just as without a norm.
UPSTREAM = {"alphas": "N(0, 1)", "adaLN_modulation.1.weight": 0.0, "adaLN_modulation.2.weight": 1.0}
ALPHA_1 = {"adaLN_modulation.1.alphas": 1.0}
NO_NORM = dict(adaln_norm=False)
VARIANTS = {
    "full precision": (dict(ternary=False, adaln_norm=False), {}),
    "ternary, RMS Norm, alpha = absmean": ({}, {}),
    "ternary, RMS Norm, alpha = 1": ({}, ALPHA_1),
    "ternary, RMS Norm with gain 1, alpha = 1": ({}, ALPHA_1 | {"adaLN_modulation.2.weight": 1.0}),
    "ternary, no norm, alpha = absmean": (NO_NORM, {}),
    "ternary, no norm, alpha = 1": (NO_NORM, ALPHA_1),
    "upstream's start, RMS Norm": ({}, UPSTREAM),
    "upstream's start, no norm": (NO_NORM, UPSTREAM),
}


@torch.no_grad()
def change_start(model, changes):
    rng = torch.Generator().manual_seed(0)
    for name, p in model.layers.named_parameters():
        for ending, value in changes.items():
            if name.endswith(ending):
                p.fill_(torch.randn((), generator=rng) if value == "N(0, 1)" else value)


def activations(fields, changes, data, settings):
    """Train a tiny model at a constant rate -> a dict for each of MARKS: loss, gradient norm, and of the adaLN outputs
    and of the residual stream the RMS, also by block, and the greatest value."""
    torch.manual_seed(settings.seed)
    model = DiT(Config(**SIZES["tiny"] | fields))
    change_start(model, changes)
    seen = {}

    def note(name, module, inputs, out):
        out = out.detach().float()
        seen[name] = (out.square().mean().sqrt().item(), out.abs().max().item())

    for i, layer in enumerate(model.layers):
        layer.adaLN_modulation.register_forward_hook(partial(note, f"adaln {i}"))
        layer.register_forward_hook(partial(note, f"residual {i}"))
    run = train.Run(settings, None, data, model, deepcopy(model), None)
    progress = Progress((max(MARKS) + 1) * settings.batch)
    looks = []
    for step in range(max(MARKS) + 1):
        train.set_learning_rate(run.optimizer, replace(settings, steps=10**9), step)
        stats = train.train_step(run, train.draw_batch(run, step), progress)
        if step in MARKS:
            look = dict(step=step, loss=stats.loss, grad_norm=stats.grad_norm)
            for kind in ("adaln", "residual"):
                blocks = [seen[f"{kind} {i}"] for i in range(len(model.layers))]
                look[f"{kind}_blocks"] = [rms for rms, _ in blocks]
                look[f"{kind}_rms"] = np.mean([rms**2 for rms, _ in blocks]) ** 0.5
                look[f"{kind}_greatest"] = max(greatest for _, greatest in blocks)
            looks.append(look)
    return looks


def fig4(args):
    given = dict(seed=args.seeds[0], micro_batch=16, device="cpu", out="")
    settings = train.make_settings(given, Config(**SIZES["tiny"]), {})
    data = train.load_digits(settings)
    found = {name: activations(*variant, data, settings) for name, variant in VARIANTS.items()}
    shown = {"adaln_rms": "adaLN RMS", "adaln_greatest": "adaLN greatest", "residual_rms": "residual RMS",
             "residual_greatest": "residual greatest", "grad_norm": "gradient norm", "loss": "loss"}  # fmt: skip
    rows = []
    for name, looks in found.items():
        for look in (looks[0], looks[len(looks) // 2], looks[-1]):
            rows.append([name, str(look["step"]), *[f"{look[field]:.3g}" for field in shown]])
    title = "Figure 4: size tiny, outputs of the adaLN projections and of the blocks"
    publish(args.out, "fig4", title, ["", "step", *shown.values()], rows, found)
    panels = []
    for field in ("adaln_rms", "adaln_greatest", "residual_rms", "grad_norm"):
        lines = {name: (MARKS, [look[field] for look in looks]) for name, looks in found.items()}
        panels.append(Panel(shown[field], "step", lines))
    for kind in ("adaln", "residual"):
        lines = {name: (range(4), looks[-1][f"{kind}_blocks"]) for name, looks in found.items()}
        panels.append(Panel(f"{shown[f'{kind}_rms']}, last step", "block", lines))
    plot(panels).save(args.out / "fig4.png")


def table1(args):
    results = []
    for seed in args.seeds:
        for size in ("tiny", "small"):
            for kind, path in zip(("full precision", "ternary"), trained(size, seed)):
                for cfg in (1.0, 1.5):
                    _, rated = quality(load_model(path), args.n, seed, cfg)
                    results.append(dict(size=size, kind=kind, cfg=cfg, seed=seed, bytes=path.stat().st_size, **rated))
                    print(f"seed {seed}: {size}, {kind}, guidance {cfg}: FID {rated['fid']:.2f}", flush=True)
    by_row = {}
    for result in results:
        by_row.setdefault((result["size"], result["kind"], result["cfg"]), []).append(result)
    rows = []
    for (size, kind, cfg), same in by_row.items():
        images = train.DEMO["batch"] * STEPS_OF[size]
        megabytes = f"{same[0]['bytes'] / 1e6:.2f} MB"
        rows.append([size, kind, f"{images:,}", megabytes, f"{cfg:g}", *quality_columns(same)])
    columns = ["size", "weights", "images seen", "file", "guidance", "accuracy, %", "toy FID"]
    publish(args.out, "table1", f"Table 1: {args.n} samples a row, seeds {args.seeds}", columns, rows, results)


MODELS = [  # name, size, mode, and the memory that the paper's table 2 reports for it on a GPU
    ("DiT-XL/2", "DiT-XL/2", "dense", "3 GB"),
    ("Large-DiT-4.2B", "4.2B", "dense", "17 GB"),
    ("TerDiT-600M", "600M", "bf16", ""),
    ("TerDiT-4.2B", "4.2B", "bf16", "2 GB"),
]


def table2(args):
    """Random weights at the real sizes. Steps are timed for ten seconds; the paper's 250 steps are 250 times one."""
    results = []
    rows = []
    for name, size, mode, paper_memory in MODELS:
        for image_size in (256, 512):
            ask = start(make_model_work, size, image_size, mode, DEVICES[0], 0)
            try:
                warm_up = ask("step")
                step = np.median([ask("step") for _ in range(max(1, min(10, int(10 / warm_up))))])
                n_bytes = ask("bytes")
            except (EOFError, OSError):  # its process died: dense 4.2B needs more memory than many a laptop has
                row = [name, str(image_size), "failed: out of memory?", "", "", "", "", ""]
            else:
                results.append(dict(name=name, image_size=image_size, device=DEVICES[0], step_s=step, **n_bytes))
                sizes = [f"{n_bytes[key] / 1e9:.2f} GB" for key in ("file", "weights", "peak")]
                paper = paper_memory if image_size == 256 else ""
                row = [name, str(image_size), *sizes, paper, f"{step:.2f}", f"{250 * step:,.0f}"]
            rows.append(row)
            print(" | ".join(row), flush=True)
    columns = ["", "pixels", "file", "weights in memory", "peak memory", "paper's GPU memory", "s a step", "s for 250"]
    title = f"Table 2: one image, bf16, {DEVICES[0]}, {torch.get_num_threads()} threads"
    publish(args.out, "table2", title, columns, rows, results)


def read_column(rows, name):
    """-> steps and values of the rows in which this column is filled."""
    filled = [row for row in rows if row.get(name)]
    return [int(row["step"]) for row in filled], [float(row[name]) for row in filled]


def run_panels(rows):
    """Curves of a run: the loss, and how many ternary codes flip. What the log lacks is left out."""
    steps, loss = read_column(rows, "loss")
    window = min(9, len(loss))
    smooth = np.convolve(loss, np.ones(window) / window, "valid")
    lines = {f"loss, each point the mean of {window} rows of the log": (steps[window // 2 :], smooth)}
    steps, val_loss = read_column(rows, "val_loss")
    if val_loss:
        lines["val_loss, of the averaged model on held-out images"] = (steps, val_loss)
    panels = [Panel("loss", "step", lines)]
    steps, flipped = read_column(rows, "flipped")
    if flipped:
        lines = {"flipped, the ternary codes that changed in 100 steps": (steps, [100 * share for share in flipped])}
        panels.append(Panel("flipped codes, %", "step", lines, log=False))
    return panels


def plot_run(folder, path):
    """Draw the curves of a training run."""
    plot(run_panels(read_log(folder)), columns=1, width=600, height=440).save(path)
    print(f"wrote {path}")


FIGURES = {"fig1": fig1, "fig2": fig2, "fig4": fig4, "table1": table1, "table2": table2}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("part", choices=[*FIGURES, "all", "compare", "run"])
    flag("paths", nargs="*", type=Path, metavar="PATH", help="compare: two checkpoints; run: a run's folder")
    flag("--out", type=Path, help="folder to write to, default runs/paper; run: the picture, default DIR/run.png")
    flag("--n", type=int, default=300, help="samples a row of fig2 and table1")
    flag("--seeds", type=int, nargs="+", default=[0], help="fig2, table1: of training and sampling")
    flag("--classes", nargs="+", help="compare: names of classes")
    flag("--cfg", type=float, help="compare: guidance; default 1.5, of latents 4")
    flag("--steps", type=int, help="compare: default 25, of latents 250")
    args = parser.parse_args()
    if len(args.paths) != {"compare": 2, "run": 1}.get(args.part, 0):
        parser.error("compare takes two checkpoints, run takes one folder, nothing else takes any")
    if args.part == "run":
        plot_run(args.paths[0], args.out or args.paths[0] / "run.png")
        return
    args.out = args.out or Path("runs/paper")
    for name in FIGURES if args.part == "all" else [args.part]:
        if name == "compare":
            compare(args, args.paths)
        else:
            FIGURES[name](args)


if __name__ == "__main__":
    run_main(main)
