"""How fast one CPU core feeds a training: images/s read from JPEG files, and samples/s from the two kinds of cache.

    python tests/bench_data.py

The JPEGs are made here, 500x375 pixels of smooth noise at quality 90 (about what ImageNet's are), and read once from a
warm disk cache. Files are read once in a run's life, caches at every step.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from terdit import Config, GaussianDiffusion  # noqa: E402

NEEDED = 500  # images/s, the order of what a 600M model on one H200 takes in; an estimate, not a measurement


def make_photos(folder, n):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


def read_rate(files, size):
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        assert all(image.shape == (3, size, size) for image in pool.map(lambda f: train.load_image(f, size), files))
    return len(files) / (time.perf_counter() - start)


def make_cache(folder, n, row, dtype):
    """A cache of random rows on the disk, in make_cache's format."""
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", dtype, (n, *row))
    for part in np.array_split(np.arange(n), max(1, n // 1000)):
        x[part] = np.random.default_rng(0).integers(0, 9, (len(part), *row))
    np.save(folder / "labels.npy", np.arange(n) % 10)
    (folder / "header.json").write_text(json.dumps({"format": train.CACHE}))
    return train.open_cache(folder)


def cache_rate(images, batch, steps):
    """Samples/s of [index, flip] alone, and of draw_batch with its noise, timesteps and labels."""
    rng, n = torch.Generator().manual_seed(0), len(images.labels)
    data, args = (images, True, torch.arange(n), None), SimpleNamespace(batch=batch, seed=0)
    read = lambda step: images[torch.randint(n, (batch,), generator=rng), torch.rand(batch, generator=rng) < 0.5]
    draw = lambda step: train.draw_batch(data, Config(), args, GaussianDiffusion(), step)
    rates = []
    for work in (read, draw):
        work(0)
        start = time.perf_counter()
        for step in range(steps):
            work(step)
        rates.append(batch * steps / (time.perf_counter() - start))
    return rates


def main():
    parser = argparse.ArgumentParser(description="images/s and latents/s of one core")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--latents", type=int, default=20000)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []

    def row(what, rate):
        print(f"{what:<58} {rate:>9,.0f}/s  {rate / NEEDED:>6.1f} x", flush=True)
        results.append(dict(what=what, per_second=rate))

    print(f"one core; the last column is the rate over {NEEDED}/s, about what 600M takes on an H200 (estimate)")
    with tempfile.TemporaryDirectory() as folder:
        files = make_photos(Path(folder) / "photos/a", args.images)
        for size in (64, 256):
            row(f"JPEG files of 500x375 -> {size}x{size}", read_rate(files, size))
        for name, shape, dtype in (("latents 4x32x32", (2, 4, 32, 32), np.float16),
                                   ("latents 4x64x64", (2, 4, 64, 64), np.float16),
                                   ("images 3x64x64", (1, 3, 64, 64), np.uint8)):  # fmt: skip
            cache = Path(folder) / name.replace(" ", "-")
            cache.mkdir()
            images = make_cache(cache, args.latents, shape, dtype)
            read, draw = cache_rate(images, 256, 20)
            row(f"{name} from the cache", read)
            row(f"{name} as training batches, with noise", draw)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
