"""How fast one CPU core feeds a training: images/s read from JPEG files, and samples/s from the two kinds of cache.

    python tests/bench_data.py

The JPEG files are made here: 500x375 pixels of smooth noise at quality 90, about as large as ImageNet's files. They are
read once, while they are still in the system's disk cache. A training reads its files once and its cache at every step.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from terdit import Config, GaussianDiffusion  # noqa: E402

NEEDED = 500  # images/s, the order of what a 600M model on one H200 takes in; an estimate, not a measurement
CACHES = {  # name: shape of a row, dtype
    "latents 4x32x32": ((2, 4, 32, 32), np.float16),
    "latents 4x64x64": ((2, 4, 64, 64), np.float16),
    "images 3x64x64": ((1, 3, 64, 64), np.uint8),
}


def make_photos(folder, n):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        photo = small.resize((500, 375), Image.Resampling.BICUBIC)
        photo.save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


def images_per_second(files, size):
    """The rate of train.load_image in one thread."""
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        for image in pool.map(lambda file: train.load_image(file, size), files):
            assert image.shape == (3, size, size)
    return len(files) / (time.perf_counter() - start)


def make_cache(folder, n, shape, dtype):
    """A cache of n random rows on the disk, in the format of train.make_cache."""
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", dtype, (n, *shape))
    for part in np.array_split(np.arange(n), max(1, n // 1000)):
        x[part] = np.random.default_rng(0).integers(0, 9, (len(part), *shape))
    np.save(folder / "labels.npy", np.arange(n) % 10)
    (folder / "header.json").write_text(json.dumps({"format": train.CACHE}))
    return train.open_cache(folder)


def samples_per_second(work, batch, steps=20):
    """The rate of work(step), which makes one batch; the first call warms up."""
    work(0)
    start = time.perf_counter()
    for step in range(steps):
        work(step)
    return batch * steps / (time.perf_counter() - start)


def cache_rates(images, batch=256):
    """-> samples/s of reading rows alone, and of draw_batch, which adds noise, timesteps and labels."""
    n = len(images.labels)
    rng = torch.Generator().manual_seed(0)
    data = train.Data(images, mirror=True, train_index=torch.arange(n), held_out=None)
    cfg = train.TrainConfig(batch=batch)
    diffusion = GaussianDiffusion()

    def read(step):
        index = torch.randint(n, (batch,), generator=rng)
        flip = torch.rand(batch, generator=rng) < 0.5
        return images[index, flip]

    def draw(step):
        return train.draw_batch(data, Config(), cfg, diffusion, step)

    return samples_per_second(read, batch), samples_per_second(draw, batch)


def report(results, what, rate):
    print(f"{what:<58} {rate:>9,.0f}/s  {rate / NEEDED:>6.1f} x", flush=True)
    results.append(dict(what=what, per_second=rate))


def main():
    parser = argparse.ArgumentParser(description="images/s and latents/s of one core")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--latents", type=int, default=20000)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print(f"one core; the last column is the rate over {NEEDED}/s, about what 600M takes on an H200 (estimate)")
    with tempfile.TemporaryDirectory() as folder:
        files = make_photos(Path(folder) / "photos/a", args.images)
        for size in (64, 256):
            report(results, f"JPEG files of 500x375 -> {size}x{size}", images_per_second(files, size))
        for name, (shape, dtype) in CACHES.items():
            cache = Path(folder) / name.replace(" ", "-")
            cache.mkdir()
            read_rate, draw_rate = cache_rates(make_cache(cache, args.latents, shape, dtype))
            report(results, f"{name} from the cache", read_rate)
            report(results, f"{name} as training batches, with noise", draw_rate)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
