"""The paper's figures and tables at the scale of the demo, under runs/paper/.

    python tests/paper.py fig1         figures 1 and 5: both kinds of weights from the same noise
    python tests/paper.py fig2         figure 2: quantization after training, or training with it
    python tests/paper.py fig4         figure 4: what goes through the blocks, with and without norm
    python tests/paper.py table1       table 1: quality, two sizes, with and without guidance
    python tests/paper.py table2       table 2: bytes, memory and seconds of the real sizes
    python tests/paper.py all          all of it
    python tests/paper.py compare A B  any two: ours, released folders, Meta's DiT .pt

Each figure and table writes NAME.json, a table NAME.md and, where there is one, a picture NAME.png,
and joins all tables in results.md. Models that are missing are trained first: runs/demo,
runs/demo-full, runs/paper-small and runs/paper-small-full; for a seed other than 0,
runs/demo-seed1 and so on. Samples that are compared start from the same noise. The judge of
bench_quality.py rates them.
"""

import argparse
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
from sample import DEVICES, MAX_SEED, Progress, find_checkpoint, number, pick_classes  # noqa: E402
from sample import run_main, to_uint8  # noqa: E402
from terdit import SIZES, Config, DiT, load_model  # noqa: E402
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, load_any, quantize_model  # noqa: E402
from tests.bench_quality import draw, exam_of  # noqa: E402
from tests.bench_speed import make_model_work, start  # noqa: E402

STEPS_OF = {"tiny": train.DEMO["steps"], "small": 1500}  # a step of small takes twice as long
DDPM = dict(sampler="ddpm", steps=25)  # the paper's sampler, in fewer steps


def trained(size, seed):
    """-> paths of the full-precision and of the ternary checkpoint. Trainings that are missing come
    first, and those that were stopped go on."""
    paths = []
    steps = STEPS_OF[size]
    name = "demo" if size == "tiny" else "paper-small"
    ending = f"-seed{seed}" if seed else ""
    for kind, file in (("-full", "full.pt"), ("", "packed.pt")):
        path = Path("runs") / f"{name}{kind}{ending}" / file
        states = train.states(path.parent)
        is_whole = not states or states[-1].name >= f"state-{steps:07d}.pt"
        if not (path.is_file() and is_whole):
            flags = f"--compile --size {size} --seed {seed} --steps {steps}".split()
            if file == "full.pt":
                flags.append("--full-precision")
            command = [sys.executable, ROOT / "train.py", *flags, "--out", path.parent]
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
    accuracy = [100 * result["accuracy"] for result in results]
    return [spread(accuracy, 1), spread([result["fid"] for result in results], 2)]


# --------------------------------------------------------------------------------------------------
# Tables and pictures


def publish(out, name, title, columns, rows, results):
    """Print the table, and write it and the figures behind it."""
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    text = f"## {title}\n\n" + "\n".join(lines) + "\n"
    print(text, flush=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    tables = sorted(path for path in out.glob("*.md") if path.name != "results.md")
    (out / "results.md").write_text("\n".join(path.read_text() for path in tables))


FONT = ImageFont.load_default(size=15)


def sheet(rows, path, zoom=3):
    """Draw rows of images: title, the line below it, images (n, 3, H, W) in [-1, 1]."""
    left = 290  # room for the text
    gap = 4
    strips = []
    for _, _, images in rows:
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        strips.append(pixels.repeat(zoom, 1).repeat(zoom, 2))
    n, height, width, _ = strips[0].shape
    page = Image.new("RGB", (left + n * width, len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(page)
    for i, (title, note, _) in enumerate(rows):
        top = i * (height + gap)
        text = f"{title}\n{note}"
        pen.text((8, top + height // 2 - 22), text, fill="black", font=FONT, spacing=6)
        page.paste(Image.fromarray(np.concatenate(list(strips[i]), axis=1)), (left, top))
    page.save(path)
    print(f"wrote {path}")


COLOURS = "#222222 #0072b2 #56b4e9 #009e73 #d55e00 #e69f00 #cc79a7 #999999".split()  # Okabe, Ito


class Panel(NamedTuple):
    title: str
    x_label: str
    lines: dict  # name: (x values, y values)
    log: bool = True  # a logarithmic y axis, which leaves out values of 0; else linear, from 0


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
    for name, line in panel.lines.items():
        shown = [(x, y) for x, y in zip(*line) if y > 0 or not panel.log]
        points[name] = [(x, y) for x, y in shown if np.isfinite(y)]
    xs, ys = zip(*[point for line in points.values() for point in line])
    x_ticks = ticks(0, max(xs) or 1)
    if panel.log:
        y_ticks = ticks(min(ys), max(ys), log=True)
    else:
        y_ticks = ticks(min(0, *ys), max(0, *ys) if any(ys) else 1)

    def place(x, y):
        """The pixel of a point."""
        low, high = y_ticks[0], y_ticks[-1]
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


def plot(panels):
    """-> a page of panels, two in a row, below one legend."""
    width, height = 470, 330  # of a panel
    names = dict.fromkeys(name for panel in panels for name in panel.lines)
    colours = dict(zip(names, COLOURS))
    left = 62  # room for the numbers of the y axis
    legend = 24 * len(names) + 20
    page = Image.new("RGB", (2 * width, legend + (len(panels) + 1) // 2 * height), "white")
    pen = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        y = 20 + 24 * i
        pen.line([(left, y), (left + 36, y)], fill=colours[name], width=3)
        pen.text((left + 46, y), name, fill="black", font=FONT, anchor="lm")
    for i, panel in enumerate(panels):
        x = i % 2 * width
        y = legend + i // 2 * height
        draw_panel(pen, panel, (x + left, y + 34, x + width - 26, y + height - 50), colours)
    return page


def sample_twice(path, args):
    """-> two samples of each class of a checkpoint, as two rows of all classes."""
    dtype = torch.bfloat16 if DEVICES[0] == "cuda" else torch.float32  # kernel.cu needs bf16
    model = load_any(find_checkpoint(path), DEVICES[0], dtype)
    config = model.config
    options = DDPM | dict(seed=args.seeds[0], cfg_scale=1.5)
    if config.vae:
        options |= dict(steps=250, cfg_scale=4.0)
    classes = pick_classes(None, config)
    y = torch.tensor(classes).repeat(2)
    x = draw(model, y, progress=Progress(len(y)), **options)
    title = f"{'ternary' if config.ternary else 'full precision'}, {config.dim} wide"
    return [(title, "/".join(path.parts[-2:]), images) for images in x.split(len(classes))]


def compare(args, paths, name="compare"):
    """A row of samples of each checkpoint, then another. All rows have the same classes, each pair
    the same noise."""
    pairs = [sample_twice(path, args) for path in paths]
    rows = [rows[i] for i in (0, 1) for rows in pairs]
    shapes = {tuple(images.shape) for _, _, images in rows}
    if len(shapes) > 1:
        raise ValueError(f"they draw {shapes} (classes, channels, height, width), not the same")
    sheet(rows, args.out / f"{name}.png", zoom=max(1, 96 // rows[0][2].shape[-1]))


def fig1(args):
    compare(args, trained("tiny", args.seeds[0]), "fig1")


def rate_quantizers(n, seed):
    """Full precision, ternary, and all ways to quantize full precision -> rows for sheet, dicts of
    what was found."""
    full, ternary = trained("tiny", seed)
    found = [
        ("full precision", 32.0, *quality(load_model(full), n, seed)),
        ("ternary from the start (TerDiT)", 2.0, *quality(load_model(ternary), n, seed)),
    ]

    def calibration(model):
        draw(model, torch.arange(20) % 10, seed=seed + 1000, **DDPM)

    for method in (*RECONSTRUCTIONS, *reversed(QUANTIZERS)):
        model = quantize_model(load_model(full), method, calibration)
        found.append((method, model.bits_per_weight, *quality(model, n, seed)))
        print(f"seed {seed}: {method}, FID {found[-1][-1]['fid']:.2f}", flush=True)
    rows = []
    results = []
    for name, bits, x, rated in found:
        rows.append((name, f"{bits:.2f} bits, FID {rated['fid']:.1f}", x[:20]))
        results.append(dict(name=name, bits=bits, seed=seed, **rated))
    return rows, results


def fig2(args):
    rated = [rate_quantizers(args.n, seed) for seed in args.seeds]
    results = [result for _, results in rated for result in results]
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        same = [result for result in results if result["name"] == name]
        rows.append([name, f"{same[0]['bits']:.2f}", *quality_columns(same)])
    title = f"Figure 2: {args.n} samples a row, seeds {args.seeds}"
    columns = ["", "bits a weight", "accuracy, %", "toy FID"]
    publish(args.out, "fig2", title, columns, rows, results)
    sheet(rated[0][0], args.out / "fig2.png")


# --------------------------------------------------------------------------------------------------
# Figure 4: what goes through the blocks

MARKS = [0, 10, 20, 50, 100, 150, 200, 250, 300]  # steps at which figure 4 looks

# Name: fields of Config, and what starts elsewhere than in train.py, by the end of its name. The
# gains of the RMS Norm start at 0; with a gain of 1 a block does not start as the identity, just as
# without a norm.
GAIN_1 = {"adaLN_modulation.2.weight": 1.0}
UPSTREAM = {"alphas": "N(0, 1)", "adaLN_modulation.1.weight": 0.0} | GAIN_1
ALPHA_1 = {"adaLN_modulation.1.alphas": 1.0}
NO_NORM = dict(adaln_norm=False)
VARIANTS = {
    "full precision": (dict(ternary=False, adaln_norm=False), {}),
    "ternary, RMS Norm, alpha = absmean": ({}, {}),
    "ternary, RMS Norm, alpha = 1": ({}, ALPHA_1),
    "ternary, RMS Norm with gain 1, alpha = 1": ({}, ALPHA_1 | GAIN_1),
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
    """Train a tiny model at a constant rate -> a dict for each of MARKS: loss, gradient norm, and
    RMS, also by block, and greatest value of the adaLN outputs and of the residual stream."""
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
    run = train.Run(settings, data, model, deepcopy(model))
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
    given = dict(seed=args.seeds[0], device="cpu", out="")
    settings = train.new_settings(given, Config(size="tiny", **SIZES["tiny"]))
    data = train.load_digits(settings)
    found = {name: activations(*variant, data, settings) for name, variant in VARIANTS.items()}
    shown = dict(adaln_rms="adaLN RMS", adaln_greatest="adaLN greatest")
    shown |= dict(residual_rms="residual RMS", residual_greatest="residual greatest")
    shown |= dict(grad_norm="gradient norm", loss="loss")
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
                    row = dict(size=size, kind=kind, cfg=cfg, seed=seed)
                    results.append(dict(row, bytes=path.stat().st_size, **rated))
                    print(f"{row}: FID {rated['fid']:.2f}", flush=True)
    by_row = {}
    for result in results:
        by_row.setdefault((result["size"], result["kind"], result["cfg"]), []).append(result)
    rows = []
    for (size, kind, cfg), same in by_row.items():
        images = train.DEMO["batch"] * STEPS_OF[size]
        megabytes = f"{same[0]['bytes'] / 1e6:.2f} MB"
        rows.append([size, kind, f"{images:,}", megabytes, f"{cfg:g}", *quality_columns(same)])
    columns = ["size", "weights", "images seen", "file", "guidance", "accuracy, %", "toy FID"]
    title = f"Table 1: {args.n} samples a row, seeds {args.seeds}"
    publish(args.out, "table1", title, columns, rows, results)


MODELS = [  # name, size, mode, and the memory that the paper's table 2 reports for it on a GPU
    ("DiT-XL/2", "DiT-XL/2", "dense", "3 GB"),
    ("Large-DiT-4.2B", "4.2B", "dense", "17 GB"),
    ("TerDiT-600M", "600M", "bf16", ""),
    ("TerDiT-4.2B", "4.2B", "bf16", "2 GB"),
]


def table2(args):
    """Random weights at the real sizes. Steps are timed for ten seconds; the paper's 250 steps are
    250 times one."""
    results = []
    rows = []
    for name, size, mode, paper_memory in MODELS:
        for image_size in (256, 512):
            ask = start(make_model_work, size, image_size, mode, DEVICES[0], 0)
            row = [name, str(image_size)]
            try:
                n_steps = max(1, min(10, int(10 / ask("step"))))  # the first one warms up
                step = np.median([ask("step") for _ in range(n_steps)])
                n_bytes = ask("bytes")
            except OSError as e:  # dense 4.2B needs more memory than many a laptop has
                print(e)
                row += ["failed", "", "", "", "", ""]
            else:
                result = dict(name=name, image_size=image_size, device=DEVICES[0], step_s=step)
                results.append(result | n_bytes)
                row += [f"{n_bytes[key] / 1e9:.2f} GB" for key in ("file", "weights", "peak")]
                row.append(paper_memory if image_size == 256 else "")
                row += [f"{step:.2f}", f"{250 * step:,.0f}"]
            rows.append(row)
            print(" | ".join(row), flush=True)
    columns = ["", "pixels", "file", "weights in memory", "peak memory", "paper's GPU memory"]
    columns += ["s a step", "s for 250 steps"]
    title = f"Table 2: one image, bf16, {DEVICES[0]}, {torch.get_num_threads()} threads"
    publish(args.out, "table2", title, columns, rows, results)


FIGURES = {"fig1": fig1, "fig2": fig2, "fig4": fig4, "table1": table1, "table2": table2}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    seed = number(int, 0, MAX_SEED)
    flag("part", choices=[*FIGURES, "all", "compare"])
    flag("paths", nargs="*", type=Path, metavar="PATH", help="compare: two checkpoints")
    flag("--out", type=Path, default="runs/paper", help="folder to write to, default runs/paper")
    flag("--n", type=number(int, 2), default=300, help="samples a row of fig2 and table1")
    flag("--seeds", type=seed, nargs="+", default=[0], help="fig2, table1: of all that is random")
    args = parser.parse_args()
    if len(args.paths) != (2 if args.part == "compare" else 0):
        parser.error("compare takes two checkpoints, nothing else takes any")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "compare":
        compare(args, args.paths)
        return
    for name in FIGURES if args.part == "all" else [args.part]:
        FIGURES[name](args)


if __name__ == "__main__":
    run_main(main)
