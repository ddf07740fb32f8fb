"""How good checkpoints are: accuracy and toy FID on the digits, or held-out loss on any images.

    python tests/bench_quality.py runs/demo [CKPT ...]           models of the digits
    python tests/bench_quality.py --data FOLDER CKPT [CKPT ...]  models of your images

The judge is a small CNN, trained here on freshly drawn digits (8,000; 500 steps). The toy FID is
the Frechet distance between 1,000 samples and 5,000 fresh digits, in the space of the judge's 64
features before its last ReLU. It is not the FID of papers, but a number of the same kind: 0 is
perfect, and `fid_of_real` shows what as many fresh digits get.

--data answers "is my ternary model as good as my full-precision one?", which the toy FID cannot.
FOLDER holds images that no checkpoint has learned from, a subfolder a class. All checkpoints see
the same noise at the same timesteps. What the images and the noise do to the loss cancels in the
difference of two models, so its standard error is small.
"""

import argparse
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample  # noqa: E402
from sample import DEVICES, DTYPES, MAX_SEED, SAMPLERS, find_checkpoint, from_uint8  # noqa: E402
from sample import generator, load_vae, number, pick_classes, run_main  # noqa: E402
from terdit import NUM_TIMESTEPS, diffusion_of, load_model  # noqa: E402
from train import digits, encode, list_images, read_image  # noqa: E402
from tests.bench_speed import check_json, report, write_json  # noqa: E402

DIGITS = [str(digit) for digit in range(10)]  # classes of the models that the judge can rate


def conv_block(inputs, outputs):
    """Halves height and width."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


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
    """-> features (n, 64) float64 of the images x (n, 3, H, W), and the share judged as class y."""
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


class Exam:
    def __init__(self, size):
        self.judge = train_judge(size)
        self.real, _ = features_and_accuracy(self.judge, *digits(5000, size, 2000))

    def quality(self, x, y):
        """What the judge says of images x (n, 3, H, W), drawn as the classes y (n,)."""
        features, accuracy = features_and_accuracy(self.judge, x, y)
        return dict(accuracy=accuracy, fid=fid(features, self.real))


exam_of = lru_cache(Exam)  # one judge a size


def draw(model, y, **options):
    """-> images (n, 3, H, W) of the classes y (n,); options are those of sample_latents."""
    config = model.config
    vae = load_vae(config.vae, next(model.parameters()).device) if config.vae else None
    parts = torch.arange(len(y)).split(100)
    return torch.cat([sample.draw(model, vae, y[part], part, **options) for part in parts])


def load_models(args):
    return [load_model(find_checkpoint(path), dtype=DTYPES[args.dtype]) for path in args.ckpt]


def rate_samples(args):
    """What the judge says of the samples of each checkpoint."""
    models = load_models(args)
    for path, model in zip(args.ckpt, models):
        names = model.config.class_names
        if names != DIGITS:
            raise ValueError(f"{path} draws {names!r:.99}, the judge knows digits: --data FOLDER?")
    y = torch.arange(args.n) % 10
    options = dict(seed=args.seed, sampler=args.sampler, steps=args.steps)
    results = []
    for path, model in zip(args.ckpt, models):
        exam = exam_of(model.config.input_size)
        start = time.monotonic()
        x = draw(model, y, **options)
        figures = dict(ckpt=path, n=args.n, dtype=args.dtype, **options)
        figures["seconds"] = time.monotonic() - start
        figures |= exam.quality(x, y)
        figures["fid_of_real"] = exam.quality(*digits(args.n, x.shape[-1], 3000))["fid"]
        results.append(report(**figures))
    return results


@torch.no_grad()
def held_out_losses(model, x0, y):
    """-> the model's mean square error on each image x0 (n, C, H, W) of class y (n,), float64.

    Each image is seen at two timesteps, one in the lower half of 0..999 and one in the upper. All
    of them together are spread evenly. Timesteps and noise are the same for every model.
    """
    device = next(model.parameters()).device
    diffusion = diffusion_of(model.config)
    rng = generator(5000)
    n = len(x0)
    losses = torch.zeros(n, dtype=torch.float64)
    for half in (0, 500):
        t = torch.randperm(n, generator=rng) * 500 // n + half
        noise = torch.randn(x0.shape, generator=rng)
        for part in torch.arange(n).split(64):
            batch = [z[part].to(device) for z in (x0, t, y, noise)]
            losses[part] += diffusion.training_losses(model, *batch)["mse"].double().cpu() / 2
    return losses.numpy()


def paired_difference(losses, others):
    """Losses (seeds, images) of two kinds of models on the same images -> the difference of each
    seed, and the standard error of their mean: over the seeds, or of one seed over the images."""
    gaps = np.asarray(losses) - np.asarray(others)
    of_seeds = gaps.mean(1)
    values = of_seeds if len(gaps) > 1 else gaps[0]
    return of_seeds, np.std(values, ddof=1) / len(values) ** 0.5


def read_folder(folder, config, device):
    """A folder's images as a model of this config sees them -> x0 (n, C, H, W), names, labels (n,).
    """
    folder = Path(folder).resolve()
    names, files = list_images(folder)
    vae = load_vae(config.vae, device) if config.vae else None
    size = config.input_size
    if vae:
        size *= 2 ** (len(vae.config.block_out_channels) - 1)  # pixels of a latent's height
    rows = []
    labels = []
    for file, label in files:
        image = read_image(folder / file, size)
        if image is not None:  # else read_image has named the file
            rows.append(encode(vae, image[None])[0, 0])
            labels.append(label)
    if len(rows) < 2:
        read = f"{len(rows)} of {len(files)} images can be read"
        raise ValueError(f"--data {folder}: {read}; a standard error needs at least 2")
    x0 = torch.from_numpy(np.stack(rows))
    return x0.float() if vae else from_uint8(x0), names, torch.tensor(labels)


def compare_losses(args):
    """Each checkpoint's loss on the images of --data, and its difference to the first one's."""
    models = load_models(args)
    kinds = []
    for path, model in zip(args.ckpt, models):
        fields = ("input_size", "in_channels", "vae", "prediction")
        kinds.append({name: getattr(model.config, name) for name in fields})
        if kinds[-1] != kinds[0]:
            difference = f"{args.ckpt[0]} is of {kinds[0]}, {path} of {kinds[-1]}"
            raise ValueError(f"{difference}: their losses cannot be compared")
    x0, names, labels = read_folder(args.data, models[0].config, args.device)
    classes = [torch.tensor(pick_classes(names, model.config)) for model in models]
    losses = []
    results = []
    for path, model, rows in zip(args.ckpt, models, classes):
        losses.append(held_out_losses(model.to(args.device), x0, rows[labels]))
        (gap,), error = paired_difference(losses[-1:], losses[:1])
        figures = dict(ckpt=path, images=len(x0), loss=losses[-1].mean())
        figures["above_the_first"] = gap
        figures["standard_error"] = error
        figures["percent"] = 100 * gap / losses[0].mean()
        results.append(report(**figures))
    return results


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("ckpt", nargs="+")
    flag("--data", help="print the held-out loss on the images of this folder")
    flag("--dtype", choices=DTYPES, default="fp32", help="of products with ternary weights")
    flag("--device", choices=DEVICES, default=DEVICES[0], help="for --data")
    flag("-n", type=number(int, 2), default=1000, help="samples of each (default 1000)")
    flag("--sampler", choices=SAMPLERS, default="dpm")
    flag("--steps", type=number(int, 1, NUM_TIMESTEPS), default=16)
    flag("--seed", type=number(int, 0, MAX_SEED), default=0, help="of the samples")
    flag("--json", help="also write the figures to this file")
    args = parser.parse_args()
    check_json(args.json)
    results = compare_losses(args) if args.data else rate_samples(args)
    write_json(args.json, results)


if __name__ == "__main__":
    run_main(main)
