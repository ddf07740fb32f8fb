"""Class accuracy and a toy FID of a checkpoint trained on the embedded digits.

    python tests/bench_quality.py runs/demo/packed.pt [OTHER_CKPT ...]

The judge is a small CNN trained here on freshly drawn digits (8,000; 500 steps). Its 64 features before the last ReLU
are the FID's space: the Frechet distance between 1,000 samples and 5,000 fresh digits. It is not the FID of papers, but
it is the same kind of number: 0 is perfect, and real against real shows what the sample size alone gives.
Each checkpoint is sampled by sample.py's own code and defaults.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train import digits  # noqa: E402


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 128]
        self.blocks = nn.Sequential(*[
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in zip(widths, widths[1:])
        ])  # fmt: skip
        self.features = nn.Linear(128 * 4, 64)
        self.classes = nn.Linear(64, 10)

    def forward(self, x):
        features = self.features(F.adaptive_avg_pool2d(self.blocks(x), 2).flatten(1))  # (N, 64)
        return features, self.classes(features.relu())


def train_judge(size, seed=1000):
    torch.manual_seed(seed)
    x, y = digits(8000, size, seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=500)
    for _ in range(500):
        i = torch.randint(len(x), (128,))
        loss = F.cross_entropy(judge(x[i])[1], y[i], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def look(judge, x, y):
    """Features (n, 64) float64 and the share of x (n, 3, H, W) that the judge takes for y."""
    outs = [judge(part) for part in x.split(500)]
    features = torch.cat([f for f, _ in outs]).double().numpy()
    return features, (torch.cat([c for _, c in outs]).argmax(1) == y).double().mean().item()


def fid(a, b):
    """Frechet distance between Gaussians fitted to features a and b (n, 64)."""
    (ma, ca), (mb, cb) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (a, b))
    values, vectors = np.linalg.eigh(ca)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cb @ root).clip(0)).sum()  # trace of (ca cb)^1/2
    return float(((ma - mb) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * cross)


def nearest(x, data):
    """Median distance from images x to their nearest neighbour in data."""
    return torch.cat([torch.cdist(p.flatten(1), data.flatten(1)).amin(1) for p in x.split(250)]).median().item()


def main():
    from sample import sample_images
    from terdit import load_model

    parser = argparse.ArgumentParser(description="class accuracy and toy FID of checkpoints trained on the digits")
    parser.add_argument("ckpt", nargs="+")
    parser.add_argument("-n", type=int, default=1000, help="samples of each checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data-seed", type=int, default=0, help="of the training, in whose images the nearest is looked for"
    )
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler", choices=["ddpm", "ddim"])
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    settings = {k: getattr(args, k) for k in ("cfg", "steps", "sampler") if getattr(args, k) is not None}

    results, judges = [], {}
    for path in args.ckpt:
        model = load_model(path)
        size = model.config.input_size
        if size not in judges:
            judge = train_judge(size)
            real, _ = look(judge, *digits(5000, size, 2000))
            features, accuracy = look(judge, *digits(args.n, size, 3000))
            judges[size] = judge, real, digits(12000, size, args.data_seed)[0]  # the training's
            print(
                f"real {size}x{size} digits: n={args.n}, accuracy {accuracy:.2%}, FID {fid(features, real):.2f} (real against real)"
            )
            results.append(dict(ckpt="real", n=args.n, accuracy=accuracy, fid=fid(features, real)))
        judge, real, trained_on = judges[size]
        y = torch.arange(args.n) % model.config.num_classes
        x = sample_images(model, y, args.seed, **settings)
        features, accuracy = look(judge, x, y)
        near = nearest(x[:500], trained_on), nearest(digits(500, size, 4000)[0], trained_on)
        results.append(
            dict(
                ckpt=path,
                n=args.n,
                seed=args.seed,
                accuracy=accuracy,
                fid=fid(features, real),
                nearest=near[0],
                nearest_real=near[1],
                **settings,
            )
        )
        print(f"{path}: n={args.n}, seed {args.seed}, accuracy {accuracy:.2%}, FID {results[-1]['fid']:.2f}, "
              f"nearest training image {near[0]:.2f} (held-out digits: {near[1]:.2f})")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
