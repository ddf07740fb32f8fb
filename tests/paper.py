"""The paper's figures and tables, at the scale of the demo: pictures and tables under runs/paper/.

    python tests/paper.py fig1         figures 1 and 5: full precision and ternary from the same noise
    python tests/paper.py fig2         figure 2: quantization after training against training with it
    python tests/paper.py fig4         figure 4: what goes through the blocks, with and without the RMS Norm
    python tests/paper.py table1       table 1: quality, two sizes, with and without guidance
    python tests/paper.py table2       table 2: bytes, memory and seconds of the real sizes
    python tests/paper.py all          all of it
    python tests/paper.py compare A B  any two checkpoints side by side: ours, released folders, Meta's DiT .pt

Each writes NAME.json, a table NAME.md, a picture NAME.png where there is one, and joins all tables in results.md.
Models that are missing are trained first: runs/demo, runs/demo-full, runs/paper-small, runs/paper-small-full; for --seeds
other than 0, runs/demo-seed1 and so on. Samples that are compared start from the same noise; bench_quality.py's judge looks at them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sample import STEPS, Progress, load_decoder, pick_classes, positive, run, sample_images, to_uint8  # noqa: E402
from terdit import SIZES, Config, GaussianDiffusion, atomic_write, load_model, read_checkpoint  # noqa: E402
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, load_dit, quantize_model  # noqa: E402
from tests.bench_model import in_its_own_process  # noqa: E402
from tests.bench_quality import fid, look, train_judge  # noqa: E402
from train import DEMO, bf16_is_fast, build_model, digits, draw_batch, load_data, make_optimizer, states  # noqa: E402

STEPS_OF = {"tiny": DEMO["steps"], "small": 1500}  # a step of small takes more than twice as long
PAPERS_MEMORY = {"DiT-XL/2": "3 GB", "Large-DiT-4.2B": "17 GB", "TerDiT-4.2B": "2 GB"}  # table 2, on a GPU

# ----------------------------------------------------------------------------------------------------------------------
# Models and their samples


def trained(size, seed):
    """Paths of the full-precision and the ternary checkpoint; those that are missing are trained first, side by side."""
    steps, running = STEPS_OF[size], {}
    name, end = "demo" if size == "tiny" else "paper-small", f"-seed{seed}" * (seed > 0)
    paths = [Path("runs") / f"{name}-full{end}" / "full.pt", Path("runs") / f"{name}{end}" / "packed.pt"]
    # Neither keeps two cores busy alone: threads that wait asleep leave theirs to the other. The bits are the same.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    try:
        for path, kind in zip(paths, (["--full-precision"], [])):
            if not path.is_file():
                flags = ["--compile", "--size", size, "--seed", seed, "--steps", steps, "--out", path.parent, *kind]
                quiet = subprocess.DEVNULL if running else None  # one progress line
                command = [sys.executable, ROOT / "train.py", *map(str, flags)]
                running[path] = subprocess.Popen(command, env=env, stdout=quiet)
        for training in running.values():
            training.wait()
    finally:
        failed = [path.parent for path, training in running.items() if training.wait()]  # Ctrl-C: they are saving
    if failed:
        raise ValueError(f"the training of {' and '.join(map(str, failed))} did not end well: see above")
    for path in paths:
        for state in states(path.parent)[-1:]:  # where there is one, it says what the checkpoint is
            about = json.loads((state / "run.json").read_text())
            for field, here in dict(steps=steps, seed=seed, decay=DEMO["decay"]).items():
                if about.get(field) != here:
                    raise ValueError(f"{path.parent} was trained with {field}={about.get(field)}, not {here}: move it away")
    return paths


@lru_cache(maxsize=None)
def judge_and_real(size):
    judge = train_judge(size)
    return judge, look(judge, *digits(5000, size, 2000))[0]


def quality(model, n, seed, cfg=1.5):
    """-> samples (n, 3, H, W) of the classes in turn, their accuracy and toy FID."""
    y = torch.arange(n) % 10
    x = sample_images(model, y, seed, cfg)
    judge, real = judge_and_real(model.config.input_size)
    features, accuracy = look(judge, x, y)
    return x, dict(accuracy=accuracy, fid=fid(features, real), n=n, seed=seed, cfg=cfg)


@lru_cache(maxsize=None)
def quality_of(path, n, seed, cfg=1.5):
    return quality(load_model(path), n, seed, cfg)


def spread(values, form):
    """The median of some seeds' values, and their range if they are more than one."""
    middle, low, high = (form.format(v) for v in (np.median(values), min(values), max(values)))
    return middle + f" ({low} to {high})" * (len(values) > 1)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and tables


def font(size=15):
    return ImageFont.load_default(size=size)


def sheet(rows, path, zoom=3):
    """rows: (title, line below it, images (n, 3, H, W)) -> PNG with a row each, the text on the left."""
    left = 290
    images = [to_uint8(x).repeat(zoom, 1).repeat(zoom, 2) for _, _, x in rows]
    n, height, width, _ = images[0].shape
    page = Image.new("RGB", (left + n * width, len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(page)
    for i, (title, below, _) in enumerate(rows):
        top = i * (height + 4)
        draw.text((8, top + height // 2 - 22), f"{title}\n{below}", fill="black", font=font(), spacing=6)
        page.paste(Image.fromarray(np.concatenate(list(images[i]), axis=1)), (left, top))
    atomic_write(path, lambda file: page.save(file, "PNG"))


COLOURS = ["#222222", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00"]  # told apart by the colour-blind too


def plot(panels, path, width=470, height=330):
    """panels: (title, label of x, {name: (x values, y values)}) -> PNG, two panels a row, logarithmic y, one legend.

    Values of 0, which a logarithm cannot show, are left out.
    """
    names = list(panels[0][2])
    head, left, low, gap = 24 * len(names) + 20, 62, 50, 34  # the legend; room for an axis's numbers; between panels
    page = Image.new("RGB", (2 * width, head + -(-len(panels) // 2) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        y = 20 + 24 * i
        draw.line([(left, y), (left + 36, y)], fill=COLOURS[i], width=3)
        draw.text((left + 46, y), name, fill="black", font=font(), anchor="lm")
    for i, (title, label, lines) in enumerate(panels):
        x0, y0 = i % 2 * width + left, head + i // 2 * height + gap
        w, h = width - left - 16, height - gap - low
        xs = np.concatenate([x for x, _ in lines.values()])
        ys = np.concatenate([y for _, y in lines.values()])
        ys = np.log10(ys[ys > 0])
        bottom, top = np.floor(ys.min()), max(np.ceil(ys.max()), np.floor(ys.min()) + 1)
        at = lambda x, y: (x0 + w * (x - xs.min()) / np.ptp(xs), y0 + h * (top - np.log10(y)) / (top - bottom))
        draw.text((x0 + w / 2, y0 - 8), title, fill="black", font=font(16), anchor="ms")
        draw.text((x0 + w / 2, y0 + h + 40), label, fill="black", font=font(), anchor="ms")
        for power in range(int(bottom), int(top) + 1):
            y = at(0, 10.0**power)[1]
            draw.line([(x0, y), (x0 + w, y)], fill="#cccccc")
            number = f"{10.0**power:g}" if abs(power) < 4 else f"1e{power}"
            draw.text((x0 - 6, y), number, fill="black", font=font(13), anchor="rm")
        end = -np.inf
        for x in np.unique(xs):
            if (across := at(x, 1)[0]) > end + 40:  # room for its number
                draw.text((across, y0 + h + 6), f"{x:g}", fill="black", font=font(13), anchor="mt")
                end = across
        for colour, (x, y) in zip(COLOURS, lines.values()):
            points = [at(a, b) for a, b in zip(x, y) if b > 0]
            draw.line(points, fill=colour, width=3, joint="curve")
            for a, b in points:
                draw.ellipse([a - 3, b - 3, a + 3, b + 3], fill=colour)
        draw.rectangle([x0, y0, x0 + w, y0 + h], outline="black")
    atomic_write(path, lambda file: page.save(file, "PNG"))


def publish(args, name, title, columns, rows, results):
    """Print the table, and write it and the figures behind it."""
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    text = f"## {title}\n\n" + "\n".join(lines) + "\n"
    print(text, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(text)
    (args.out / f"{name}.json").write_text(json.dumps(results, indent=1))
    tables = [p.read_text() for p in sorted(args.out.glob("*.md")) if p.name != "results.md"]
    (args.out / "results.md").write_text("\n".join(tables))


# ----------------------------------------------------------------------------------------------------------------------
# The figures and tables


def load_any(path, device):
    """A checkpoint of ours, a released folder, or one of Meta's DiT files; on a GPU in bf16, which kernel.cu needs."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if Path(path).is_file():
        with torch.serialization.safe_globals([argparse.Namespace]):  # as in load_dit
            state = read_checkpoint(path, "a checkpoint of this project, or one of DiT")
        if isinstance(state, dict) and "format" not in state:
            return load_dit(path).to(device, dtype)
    return load_model(path, device, dtype)


def compare(args, name="compare"):
    """Figures 1 and 5: a row of samples of each checkpoint, and another, of the same classes from the same noise."""
    rows, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.ckpt:
        model = load_any(path, device)
        config = model.config
        classes = pick_classes(args.classes, config)
        y = torch.tensor(classes).repeat(2)
        decode = load_decoder(config.vae, config.latent_scale, device) if config.vae else None
        cfg = (4.0 if config.vae else 1.5) if args.cfg is None else args.cfg
        steps = args.steps or (250 if config.vae else STEPS)
        x = sample_images(model, y, args.seeds[0], cfg, steps, decode=decode, progress=Progress(len(y) * steps))
        kind = "ternary" if config.ternary else "full precision"
        file = "/".join(Path(path).parts[-2:])
        rows += [(f"{kind}, {config.dim} wide", file, part) for part in x.split(len(classes))]
    sizes = {tuple(x.shape) for _, _, x in rows}
    if len(sizes) > 1:
        raise ValueError(f"the two draw {' and '.join(map(str, sorted(sizes)))} (classes, channels, height, width): "
                         f"expected the same")  # fmt: skip
    rows = rows[::2] + rows[1::2]  # first the one draw of both, then the other
    sheet(rows, args.out / f"{name}.png", max(1, 96 // rows[0][2].shape[-1]))
    print(f"wrote {args.out / name}.png")


def fig1(args):
    args.ckpt = trained("tiny", args.seeds[0])
    compare(args, "fig1")


def fig2(args):
    results, pictures = [], []
    for seed in args.seeds:
        full, ternary = trained("tiny", seed)
        seen = [("full precision", 32.0, *quality_of(full, args.n, seed))]
        seen += [("ternary from the start (TerDiT)", 2.0, *quality_of(ternary, args.n, seed))]
        calibration = lambda m: sample_images(m, torch.arange(20) % 10, seed=seed + 1000)
        for method in (*RECONSTRUCTIONS, *reversed(QUANTIZERS)):
            model = quantize_model(load_model(full), method, calibration)
            seen.append((method, model.bits_per_weight, *quality(model, args.n, seed)))
            print(f"seed {seed}: {method}, FID {seen[-1][-1]['fid']:.2f}", flush=True)
        results += [dict(name=name, bits=bits, **found) for name, bits, _, found in seen]
        pictures = pictures or [(name, f"{bits:.2f} bits, FID {q['fid']:.1f}", x[:20]) for name, bits, x, q in seen]
    rows = []
    for name in dict.fromkeys(r["name"] for r in results):
        same = [r for r in results if r["name"] == name]
        accuracy = spread([100 * r["accuracy"] for r in same], "{:.1f}")
        rows.append([name, f"{same[0]['bits']:.2f}", accuracy, spread([r["fid"] for r in same], "{:.2f}")])
    publish(args, "fig2", f"Figure 2: {args.n} samples a row, seeds {args.seeds}",
            ["", "bits a weight", "accuracy, %", "toy FID"], rows, results)  # fmt: skip
    sheet(pictures, args.out / "fig2.png")


MARKS = [0, 10, 20, 50, 100, 150, 200, 250, 300]  # steps at which figure 4 looks
VARIANTS = {  # Config fields, and what the adaLN projections' alphas and the norms' gains start at, if not as usual
    "full precision": (dict(ternary=False, adaln_norm=False), None, None),
    "ternary, RMS Norm, alpha = absmean": (dict(), None, None),
    "ternary, RMS Norm, alpha = 1": (dict(), 1.0, None),
    "ternary, RMS Norm with gain 1, alpha = 1": (dict(), 1.0, 1.0),  # no more the identity at first than without a norm
    "ternary, no norm, alpha = absmean": (dict(adaln_norm=False), None, None),
    "ternary, no norm, alpha = 1": (dict(adaln_norm=False), 1.0, None),
}


def activations(fields, alpha, gain, marks, data, args):
    """Train a tiny model for a while -> a dict for each mark: what its adaLN and its residual stream put out.

    RMS and greatest absolute value, block by block, of the outputs for that step's batch; adaLN's behind its norm.
    """
    torch.manual_seed(args.seed)
    config = Config(**SIZES["tiny"] | fields)
    model, diffusion = build_model(args, config), GaussianDiffusion(prediction=config.prediction)
    for layer in model.layers:
        if alpha:
            layer.adaLN_modulation[1].alphas.data.fill_(alpha)
        if gain:
            layer.adaLN_modulation[2].weight.data.fill_(gain)
    optimizer, seen, look_now = make_optimizer(model, DEMO["lr"], DEMO["betas"], DEMO["decay"]), [], [False]

    def hook(kind, i):
        def note(module, inputs, out):
            if look_now[0]:
                out = out.detach().float()
                seen[-1][kind][i] = [out.square().mean().sqrt().item(), out.abs().max().item()]

        return note

    for i, layer in enumerate(model.layers):
        layer.adaLN_modulation.register_forward_hook(hook("adaln", i))
        layer.register_forward_hook(hook("residual", i))
    for step in range(max(marks) + 1):
        look_now[0] = step in marks
        if look_now[0]:
            seen.append(dict(step=step, adaln=[None] * config.n_layers, residual=[None] * config.n_layers))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast("cpu")):
            loss = diffusion.training_losses(model, *draw_batch(data, config, args, diffusion, step))["loss"].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if look_now[0]:
            seen[-1] |= dict(loss=loss.item(), grad_norm=norm)
        if not np.isfinite(norm):
            break
        for group in optimizer.param_groups:
            group["lr"] = DEMO["lr"] * group["scale"] * min(1, (step + 1) / DEMO["warmup"])
        optimizer.step()
        optimizer.zero_grad()
    return seen


def fig4(args):
    recipe = SimpleNamespace(data=None, image_size=DEMO["image_size"], batch=DEMO["batch"], seed=args.seeds[0])
    data = load_data(recipe)
    found = {name: activations(*variant, MARKS, data, recipe) for name, variant in VARIANTS.items()}
    lines = lambda value: {n: ([r["step"] for r in seen], [value(r) for r in seen]) for n, seen in found.items()}
    rms = lambda kind: lambda r: np.sqrt(np.mean([rms**2 for rms, _ in r[kind]]))
    greatest = lambda kind: lambda r: max(top for _, top in r[kind])
    by_layer = lambda kind: {
        n: (list(range(len(seen[-1][kind]))), [rms for rms, _ in seen[-1][kind]]) for n, seen in found.items()
    }
    panels = [
        ("adaLN output: RMS", "step", lines(rms("adaln"))),
        ("adaLN output: greatest", "step", lines(greatest("adaln"))),
        ("residual stream: RMS", "step", lines(rms("residual"))),
        ("gradient norm before clipping", "step", lines(lambda r: r["grad_norm"])),
        ("adaLN output: RMS, last step", "block", by_layer("adaln")),
        ("residual stream: RMS, last step", "block", by_layer("residual")),
    ]
    rows = []
    for name, seen in found.items():
        for r in (seen[0], seen[len(seen) // 2], seen[-1]):
            values = [f(r) for kind in ("adaln", "residual") for f in (rms(kind), greatest(kind))]
            rows.append([name, str(r["step"]), *(f"{v:.3g}" for v in (*values, r["grad_norm"], r["loss"]))])
    columns = ["", "step", "adaLN RMS", "adaLN greatest", "residual RMS", "residual greatest", "gradient norm", "loss"]
    publish(
        args, "fig4", "Figure 4: size tiny, outputs of the adaLN projections and of the blocks", columns, rows, found
    )
    plot(panels, args.out / "fig4.png")


def table1(args):
    results = []
    for seed in args.seeds:
        for size in ("tiny", "small"):
            for kind, path in zip(("full precision", "ternary"), trained(size, seed)):
                images = DEMO["batch"] * STEPS_OF[size]
                for cfg in (1.0, 1.5):
                    found = quality_of(path, args.n, seed, cfg)[1]
                    results.append(dict(size=size, kind=kind, images=images, bytes=path.stat().st_size, **found))
                    print(f"seed {seed}: {size}, {kind}, guidance {cfg}: FID {found['fid']:.2f}", flush=True)
    rows, key = [], lambda r: [r["size"], r["kind"], f"{r['images']:,}", f"{r['bytes'] / 1e6:.2f} MB", f"{r['cfg']:g}"]
    for first in results[: len(results) // len(args.seeds)]:
        same = [r for r in results if key(r)[:3] == key(first)[:3] and r["cfg"] == first["cfg"]]
        accuracy = spread([100 * r["accuracy"] for r in same], "{:.1f}")
        rows.append([*key(first), accuracy, spread([r["fid"] for r in same], "{:.2f}")])
    publish(args, "table1", f"Table 1: {args.n} samples a row, seeds {args.seeds}",
            ["size", "weights", "images seen", "file", "guidance", "accuracy, %", "toy FID"], rows, results)  # fmt: skip


def table2(args):
    """Random weights at the real sizes; steps are timed for ten seconds, and the paper's 250 are 250 of them."""
    device, results, rows = "cuda" if torch.cuda.is_available() else "cpu", [], []
    for name, size, mode in (("DiT-XL/2", "DiT-XL/2", "dense"), ("Large-DiT-4.2B", "4.2B", "dense"),
                             ("TerDiT-600M", "600M", "packed"), ("TerDiT-4.2B", "4.2B", "packed")):  # fmt: skip
        for image_size in (256, 512):
            try:
                r = in_its_own_process(size, image_size, mode, device, 0)
            except RuntimeError as e:  # dense 4.2B is more than many a laptop holds
                rows.append([name, str(image_size), f"failed: {e}", *[""] * 5])
                print(" | ".join(rows[-1]), flush=True)
                continue
            results.append(dict(name=name, image_size=image_size, device=device, **r))
            gb = [f"{r[k] / 1e9:.2f} GB" for k in ("file_bytes", "weight_bytes", "peak_bytes")]
            paper = PAPERS_MEMORY.get(name, "") if image_size == 256 else ""
            rows.append([name, str(image_size), *gb, paper, f"{r['step_s']:.2f}", f"{250 * r['step_s']:,.0f}"])
            print(" | ".join(rows[-1]), flush=True)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    publish(args, "table2", f"Table 2: one image, bf16, {where}",
            ["", "pixels", "file", "weights in memory", "peak memory", "paper's GPU memory", "s a step",
             "s for 250 steps"], rows, results)  # fmt: skip


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = dict(fig1=fig1, fig2=fig2, fig4=fig4, table1=table1, table2=table2)
    p.add_argument("part", choices=[*parts, "all", "compare"])
    p.add_argument("ckpt", nargs="*", metavar="CKPT", help="compare: the two checkpoints")
    p.add_argument("--out", type=Path, default=Path("runs/paper"))
    p.add_argument("--n", type=positive, default=300, help="samples a row of fig2 and table1")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="fig2, table1: of training and sampling")
    p.add_argument("--classes", nargs="+", help="compare: names or indices")
    p.add_argument("--cfg", type=float, help="compare: guidance; default 1.5, of latents 4")
    p.add_argument("--steps", type=positive, help="compare: default as in sample.py")
    args = p.parse_args()
    if (args.part == "compare") != (len(args.ckpt) == 2):
        p.error("compare takes two checkpoints, nothing else takes any")
    start = time.time()
    for part in parts.values() if args.part == "all" else [parts.get(args.part, compare)]:
        part(args)
        print(f"{part.__name__}: {time.time() - start:.0f} s so far", flush=True)


if __name__ == "__main__":
    run(main)
