"""The paper's claims on the demo's model: pictures and a table.

    python tests/paper.py fig2        figure 2: quantization after training against training with it

Needs runs/demo/packed.pt and runs/demo-full/full.pt (`make fig2` trains what is missing). Writes runs/paper/fig2.png, .md
and .json: the same noise and labels for every row; bench_quality.py's judge; bits count scales and zero points.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import sample_images, to_uint8  # noqa: E402
from terdit import atomic_write, load_model  # noqa: E402
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, quantize_model  # noqa: E402
from tests.bench_quality import fid, look, train_judge  # noqa: E402
from train import digits  # noqa: E402


def sheet(rows, path, zoom=3):
    """rows: (title, line below it, images (n, 3, H, W)) -> PNG with a row each, the text on the left."""
    font, left = ImageFont.load_default(size=15), 290
    images = [to_uint8(x).repeat(zoom, 1).repeat(zoom, 2) for _, _, x in rows]
    n, height, width, _ = images[0].shape
    page = Image.new("RGB", (left + n * width, len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(page)
    for i, (title, below, _) in enumerate(rows):
        top = i * (height + 4)
        draw.text((8, top + height // 2 - 22), f"{title}\n{below}", fill="black", font=font, spacing=6)
        page.paste(Image.fromarray(np.concatenate(list(images[i]), axis=1)), (left, top))
    atomic_write(path, lambda file: page.save(file, "PNG"))


def fig2(full, ternary, out, n, seed):
    full, y = load_model(full), torch.arange(n) % 10
    calibration = lambda m: sample_images(m, torch.arange(20) % 10, seed=seed + 1)
    models = {"full precision": (full, 32.0), "ternary from the start (TerDiT)": (load_model(ternary), 2.0)}
    for method in (*RECONSTRUCTIONS, *reversed(QUANTIZERS)):
        model = quantize_model(full, method, calibration)
        models[method] = model, model.bits_per_weight
    judge = train_judge(full.config.input_size)
    real, _ = look(judge, *digits(5000, full.config.input_size, 2000))
    rows, results = [], []
    for name, (model, bits) in models.items():
        x = sample_images(model, y, seed)
        features, accuracy = look(judge, x, y)
        results.append(
            dict(name=name, bits_per_weight=bits, accuracy=accuracy, fid=fid(features, real), n=n, seed=seed)
        )
        rows.append((name, f"{bits:.2f} bits, FID {results[-1]['fid']:.1f}", x[:20]))
        print(
            f"{name:<36} {bits:6.3f} bits a weight  accuracy {accuracy:6.1%}  FID {results[-1]['fid']:7.2f}", flush=True
        )
    out.mkdir(parents=True, exist_ok=True)
    sheet(rows, out / "fig2.png")
    lines = ["| | bits a weight | accuracy | toy FID |", "|---|---|---|---|"]
    lines += [f"| {r['name']} | {r['bits_per_weight']:.2f} | {r['accuracy']:.1%} | {r['fid']:.2f} |" for r in results]
    (out / "fig2.md").write_text("\n".join(lines) + "\n")
    (out / "fig2.json").write_text(json.dumps(results, indent=1))
    print(f"wrote {out / 'fig2.png'}, .md and .json")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("figure", choices=["fig2"])
    p.add_argument("--full", default="runs/demo-full/full.pt")
    p.add_argument("--ternary", default="runs/demo/packed.pt")
    p.add_argument("--out", type=Path, default=Path("runs/paper"))
    p.add_argument("-n", type=int, default=500, help="samples a row")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    fig2(args.full, args.ternary, args.out, args.n, args.seed)


if __name__ == "__main__":
    main()
