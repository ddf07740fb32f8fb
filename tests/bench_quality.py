"""Class accuracy and a toy FID of a checkpoint trained on the embedded digits.

    python tests/bench_quality.py runs/demo/packed.pt [OTHER_CKPT ...]

The judge is a small CNN, trained here on freshly drawn digits (8,000; 500 steps). The toy FID is the Frechet distance
between 1,000 samples and 5,000 fresh digits, in the space of the judge's 64 features before its last ReLU. It is not
the FID of papers, but a number of the same kind: 0 is perfect, and the line "real against real" shows what a sample of
this size gives at best. sample.py's own code draws the samples of each checkpoint, by its own defaults.
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
from sample import DTYPES, SAMPLER, STEPS, sample_images  # noqa: E402
from terdit import load_model  # noqa: E402
from train import digits  # noqa: E402


def conv_block(inputs, outputs):
    """Halves height and width."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(conv_block(3, 32), conv_block(32, 64), conv_block(64, 128))
        self.features = nn.Linear(128 * 4, 64)
        self.classes = nn.Linear(64, 10)

    def forward(self, x):
        pooled = F.adaptive_avg_pool2d(self.blocks(x), 2)  # (N, 128, 2, 2)
        features = self.features(pooled.flatten(1))  # (N, 64)
        return features, self.classes(features.relu())


def train_judge(size, seed=1000):
    torch.manual_seed(seed)
    x, y = digits(8000, size, seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=500)
    for _ in range(500):
        i = torch.randint(len(x), (128,))
        _, logits = judge(x[i])
        loss = F.cross_entropy(logits, y[i], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def features_and_accuracy(judge, x, y):
    """-> features (n, 64) float64, and the share of the images x (n, 3, H, W) in which the judge sees the class y."""
    features = []
    right = 0
    for images, labels in zip(x.split(500), y.split(500)):
        part, logits = judge(images)
        features.append(part.double().numpy())
        right += (logits.argmax(1) == labels).sum().item()
    return np.concatenate(features), right / len(x)


def fid(a, b):
    """Frechet distance between Gaussians fitted to the features a and b (n, 64).

    |mean_a - mean_b|^2 + trace(cov_a) + trace(cov_b) - 2 trace((cov_a cov_b)^(1/2))
    """
    mean_a = a.mean(0)
    mean_b = b.mean(0)
    cov_a = np.cov(a, rowvar=False)
    cov_b = np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # cov_a^(1/2)
    # cov_a cov_b has the eigenvalues of the symmetric root cov_b root.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def nearest(x, data):
    """Median distance from the images x to their nearest neighbours in data."""
    data = data.flatten(1)
    distances = [torch.cdist(part.flatten(1), data).amin(1) for part in x.split(250)]
    return torch.cat(distances).median().item()


class Exam:
    """The judge of one image size, and the features of the real digits that samples are compared with."""

    def __init__(self, size):
        self.judge = train_judge(size)
        self.real, _ = features_and_accuracy(self.judge, *digits(5000, size, 2000))

    def quality(self, x, y):
        """What the judge says of images x (n, 3, H, W), drawn as the classes y (n,)."""
        features, accuracy = features_and_accuracy(self.judge, x, y)
        return dict(accuracy=accuracy, fid=fid(features, self.real))


def parse_args():
    parser = argparse.ArgumentParser(description="class accuracy and toy FID of checkpoints trained on the digits")
    parser.add_argument("ckpt", nargs="+")
    parser.add_argument("-n", type=int, default=1000, help="samples of each checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-seed", type=int, default=0,
                        help="the training's seed, which gives the images among which the nearest is looked for")
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance scale")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpm"], default=SAMPLER)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", help="also write the figures here")
    return parser.parse_args()


def main():
    args = parse_args()
    results = []
    exams = {}
    for path in args.ckpt:
        model = load_model(path, dtype=DTYPES[args.dtype])
        size = model.config.input_size
        if size not in exams:
            exams[size] = Exam(size)
            real = exams[size].quality(*digits(args.n, size, 3000))
            print(f"real {size}x{size} digits: n={args.n}, accuracy {real['accuracy']:.2%}, "
                  f"FID {real['fid']:.2f} (real against real)")
            results.append(dict(ckpt="real", n=args.n, **real))
        y = torch.arange(args.n) % model.config.num_classes
        x = sample_images(model, y, args.seed, args.cfg, args.steps, args.sampler)
        quality = exams[size].quality(x, y)
        training_images, _ = digits(12000, size, args.data_seed)
        held_out, _ = digits(500, size, 4000)
        near = nearest(x[:500], training_images)
        near_real = nearest(held_out, training_images)
        results.append(dict(ckpt=path, n=args.n, seed=args.seed, **quality, nearest=near, nearest_real=near_real,
                            cfg=args.cfg, steps=args.steps, sampler=args.sampler, dtype=args.dtype))
        print(f"{path}: n={args.n}, seed {args.seed}, accuracy {quality['accuracy']:.2%}, FID {quality['fid']:.2f}, "
              f"nearest training image {near:.2f} (held-out digits: {near_real:.2f})")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
