"""Train a ternary diffusion transformer.

    python train.py                                        the CPU demo: digits in minutes
    python train.py --data DIR --image-size 64             your images, one subfolder a class
    python train.py --size 600M --data DIR --vae VAE       the paper's model, on latents that are made once
    torchrun --nproc-per-node=8 train.py --size 4.2B ...   many GPUs
    python train.py --init FULL.pt --teacher FULL.pt       ternary from a full-precision model, in far fewer steps
    python train.py --export --out RUN                     write packed.pt of a run that has not ended

The same command resumes a run that was stopped, on any number of processes. Random numbers depend only on --seed, the
step and a sample's place in the batch, so no random state is saved: a resumed run equals an uninterrupted one, on one
CPU process bit for bit. More processes, or other micro-batches, change the order of additions and nothing else.

The order of this file: settings, data, batches, optimizer, memory, many processes, saved states, a step, the log, and
last `main`, with `train`, the loop. Read `train` first if you like.
"""

import argparse
import colorsys
import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import timedelta
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from sample import STEPS, Progress, barrier, check_common, cpu_has, find_checkpoint, fingerprint, from_rank_0, generator
from sample import init_distributed, is_state, launcher_has_ended, leave_distributed, load_decoder, load_vae, locked
from sample import number_of, peak_memory, positive, printable, ranks, run_main, sample_images, save_grid, say
from terdit import SIZES, TERNARY_EPS, Config, DiT, MetaDiT, GaussianDiffusion, PackedTernaryLinear, TernaryLinear
from terdit import atomic_write, first_line, load_model, model_from_state, pack_model, save_checkpoint, unpack_ternary

# ----------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class TrainConfig:
    """What a run is trained with; the values here are those of the paper's sizes. Flags of the same name replace them
    (teacher_weight, warmup, betas, decay_until and ema have none: they are the recipe's)."""

    size: str | None = None  # a name in terdit.SIZES; None with init
    init: str | None = None  # start from this checkpoint
    teacher: str | None = None  # learn the outputs of this checkpoint, too
    teacher_weight: float = 1.0  # factor of the teacher's term in the loss
    data: str | None = None  # folder with a subfolder of images for each class, or a cache; None: the embedded digits
    vae: str | None = None  # train on the latents of this VAE
    image_size: int = 32  # pixels; 256 with a VAE
    no_flip: bool = False  # mirror none of the images
    full_precision: bool = False  # no ternary weights: the paper's baseline
    no_adaln_norm: bool = False  # the paper's ablation

    qk_norm: bool | None = None  # LayerNorm on q and k; None: on for the paper's sizes, trained from scratch

    batch: int = 256  # images a step, of all processes together
    micro_batch: int | None = None  # images a forward and backward pass, whose gradients add up; None: what fits
    steps: int = 1_750_000
    lr: float = 1e-4  # Large-DiT's; nobody has verified it for ternary weights at these sizes
    warmup: int = 1000  # steps
    betas: tuple = (0.9, 0.999)
    decay: float = 0.0  # weight decay of the blocks' matrices
    decay_until: float = 0.5  # share of the steps after which there is none (two stages, as in BitNet b1.58's notes)
    ema: float = 0.9999  # what is exported is an average of the weights; reached slowly, see warmed_up_average
    seed: int = 0

    out: Path | None = None  # run folder
    fresh: bool = False  # start over where the run folder holds a state
    save_every: int = 1000  # steps; the last two states are kept
    sample_every: int | None = None  # steps; None: a quarter of the run
    grid: int | None = None  # images in a sample grid
    checkpointing: bool = False  # compute a block's activations twice instead of keeping them
    compile: bool = False
    device: str = "cpu"
    dtype: str | None = None  # of matmuls; None: bf16 where the hardware has it


PAPER = TrainConfig()  # 600M: 448M images. A batch of 256 is our reading; 875,000 steps of 512 fit as well
PAPER_LARGE = TrainConfig(batch=512, steps=1_180_000)  # 4.2B: 604M images, the steps of upstream's 3B_1180000
PAPER_LARGE_512 = TrainConfig(batch=512, steps=1_360_000)  # 4.2B at 512 pixels: 696M images; steps inferred from them
DEMO = TrainConfig(  # tiny and small, tuned for minutes on two cores
    image_size=24,
    batch=16,
    steps=4500,
    lr=4e-3,
    warmup=50,
    betas=(0.9, 0.99),
    decay=0.3,  # keeps latent weights small, so that codes go on flipping: see make_optimizer
    decay_until=1.0,
    ema=0.995,
)


# tiny and small from full-precision weights. The rate is chosen by held-out loss (tests/recipes.py); the steps take two
# minutes on two cores.
FINE_TUNE = replace(DEMO, steps=2500, lr=2e-3)


def recipe_of(model_config, image_size, becomes_ternary=False):
    """What a model of this size is trained with where the command does not say.

    becomes_ternary: it starts from full-precision weights (--init). Nobody has tried which rate then suits large sizes.
    """
    if model_config.prediction == "v":  # tiny, small, and what was trained like them
        return FINE_TUNE if becomes_ternary else DEMO
    if model_config.dim < SIZES["4.2B"]["dim"]:
        return PAPER
    return PAPER_LARGE_512 if image_size == 512 else PAPER_LARGE


# ----------------------------------------------------------------------------------------------------------------------
# Data: the embedded digits in memory, or a memory-mapped cache of images or latents

CACHE = "terdit-cache-2"
UNREAD = -2  # label of an image that is not in the cache yet
BROKEN = -1  # label of an image that cannot be read
JUNK = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}  # what systems leave in folders, besides hidden files


@lru_cache(maxsize=None)
def glyph(digit, stroke):
    """One digit of Pillow's own font, 96 pixels high, white on black, its bounding box in the middle of 192 x 192."""
    image = Image.new("L", (192, 192))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=96)
    left, top, right, bottom = draw.textbbox((0, 0), digit, font=font, stroke_width=stroke)
    centre = ((192 - left - right) / 2, (192 - top - bottom) / 2)
    draw.text(centre, digit, fill=255, font=font, stroke_width=stroke)
    return image


def draw_digit(digit, size, rng):
    """One bright digit on a dark colour gradient, its shape and colours from rng -> (size, size, 3) in [0, 1]."""
    large = 4 * size  # drawn at four times the size, then averaged down
    turn = rng.uniform(-0.12, 0.12)  # radians
    slant = rng.uniform(-0.2, 0.2)
    stretch = rng.uniform(0.9, 1.15)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    to_source = rotation @ [[stretch, slant], [0, 1]] * rng.uniform(0.43, 0.53) * 192 / large  # pixel -> glyph pixel
    offset = 96 - to_source @ (large / 2 + rng.uniform(-0.05, 0.05, 2) * large)
    source = glyph(str(digit), int(rng.integers(1, 5)))
    affine = (*to_source[0], offset[0], *to_source[1], offset[1])
    ink = source.transform((large, large), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(4)
    ink = np.asarray(ink, np.float32)[..., None] / 255  # (H, W, 1)

    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1), 1))
    dark1 = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(), rng.uniform(0.05, 0.35)))
    dark2 = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(), rng.uniform(0.05, 0.35)))
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, size)
    xy = np.stack(np.meshgrid(line, line), axis=-1)  # (H, W, 2)
    mix = 0.5 + xy @ [math.cos(angle), math.sin(angle)] / math.sqrt(8)
    background = dark1 * mix[..., None] + dark2 * (1 - mix[..., None])
    return background * (1 - ink) + colour * ink


def digits(n, size=24, seed=0):
    """The embedded data set: n bright digits on dark gradients, the same for the same seed.

    -> images (n, 3, size, size) float32 in [-1, 1], labels (n,) int64. Turn, slant, size, weight, place and colours
    vary, but all are centred and bright on dark: a small model learns them in minutes.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    images = np.empty((n, size, size, 3), np.float32)
    for i in range(n):
        images[i] = draw_digit(labels[i], size, rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul_(2).sub_(1), torch.from_numpy(labels)


def to_rgb(image):
    """A picture of any mode -> RGB. Each mode has one rule, so that a dark picture stays dark among bright ones.

    Transparency shows white. White is 65535 of 16 bits, 4095 of 12 bits, 1.0 of floats. ValueError: there is no rule.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if not 0 <= values.min() <= values.max() <= 1:
            raise ValueError("its floats are not all in 0..1, black to white")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    elif image.mode.startswith("I"):
        if image.mode == "I" and image.format not in ("PNG", "PPM"):  # whose "I" has 16 bits
            raise ValueError("its grey has 32 bits or a sign, and nothing says which number is white")
        values = np.asarray(image)
        has_12_bits = getattr(image, "tag_v2", {}).get(258) == (12,)  # a TIFF's BitsPerSample
        grey = (values // (16 if has_12_bits else 257)).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        drawing = image.convert("RGBA")
        image = Image.new("RGB", drawing.size, "white")
        image.paste(drawing, mask=drawing)
    return image.convert("RGB")


def load_image(path, size):
    """Any picture that Pillow reads -> uint8 (3, size, size): upright, RGB, centre-cropped.

    As ADM does it, except that ADM rounds the place of the crop to whole pixels.
    """
    with Image.open(path) as image:
        if image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))  # decode no larger than needed
        image.load()
        with suppress(Exception):  # Pillow raises whatever it likes on broken EXIF data. The pixels are fine.
            ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.reduce(2)
    # fit() crops before it resizes: 1 x 100,000 pixels would take gigabytes if all of them were enlarged.
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def read_image(path, size):
    """load_image, or None for a file that is no picture, which is named. OSError: it cannot be opened."""
    try:
        return load_image(path, size)
    except Exception as e:  # Pillow's decoders raise whatever they like on damaged files
        # Only the system's errors have a number. A disk that is gone must not make all its pictures BROKEN for good.
        # EINVAL alone may be the picture's fault: a damaged one sends the decoder to a place before the file's start.
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise OSError(f"{e}. What was read before is kept: the same command goes on when this file can be read. "
                          "If it is gone for good, delete the cache in --out") from None  # fmt: skip
        line = printable(f"{path}: left out, cannot be read ({type(e).__name__}: {first_line(e)})")
        sys.stderr.write(f"{line}\n")  # in one piece, because other threads write too
        return None


def load_encoder(name, device):
    """-> function of images (n, 3, H, W) uint8 to rows of the cache, and the latents' scale.

    Rows are the images themselves, (n, 1, 3, H, W), or with a VAE scaled latents, plain and mirrored, (n, 2, C, h, w)
    fp16: the mean of the VAE's posterior, not a draw from it as in DiT. How much that matters is printed.
    """
    if not name:

        def keep(images):
            return images[:, None]

        return keep, 1.0
    vae = load_vae(name, device)
    scale = vae.config.scaling_factor
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(f"--vae {name} shifts its latents (shift_factor), which our Config does not store")

    told = False

    def encode(images):
        nonlocal told
        both = np.stack([images, images[..., ::-1]], axis=1)  # (n, 2, 3, H, W): as they are, and mirrored
        x = torch.from_numpy(both).to(device).float() / 127.5 - 1
        posterior = vae.encode(x.flatten(0, 1)).latent_dist
        z = posterior.mode()
        if not told and images.any():
            told = True
            spread = posterior.std.mean() / z.std()
            print(f"latents are means of the VAE's posteriors, whose spread is {spread:.1%} of the latents' own")
        return (z * scale).unflatten(0, (len(images), 2)).half().cpu().numpy()

    return encode, scale


class Images:
    """x (n, 1, 3, H, W) uint8 or latents (n, 2, C, h, w) fp16, labels (n,), in memory or mapped; header: what they are.

    images[index (m,), flip (m,) bool] -> x0 (m, C, H, W) fp32, images in [-1, 1] or latents; labels (m,) int64.
    """

    def __init__(self, x, labels, header):
        self.x = x
        self.labels = labels
        self.header = header
        self.shape = x.shape[2:]  # (C, H, W)

    def __getitem__(self, index_and_flip):
        index, flip = index_and_flip
        labels = torch.from_numpy(self.labels[index.numpy()])
        if self.x.dtype != np.uint8:  # latents are stored mirrored too: to mirror a latent is not to mirror its image
            return torch.from_numpy(self.x[index.numpy(), flip.long().numpy()]).float(), labels
        x0 = torch.from_numpy(self.x[index.numpy(), 0]).float() / 127.5 - 1
        return torch.where(flip[:, None, None, None], x0.flip(-1), x0), labels


def is_cache(folder):
    return (folder / "header.json").is_file()


def open_cache(cache, mode="r", **wanted):
    """The folder that make_cache made -> Images. ValueError names what is damaged or not as `wanted` (None: any)."""
    try:
        header = json.loads((cache / "header.json").read_text())
        x = np.load(cache / "x.npy", mmap_mode=mode)
        labels = np.load(cache / "labels.npy", mmap_mode=mode)
        images = Images(x, labels, header)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{cache}: cut short or damaged ({e}); delete it to read the images again") from None
    for field, here in (wanted | {"format": CACHE}).items():
        if here is not None and header.get(field) != here:
            raise ValueError(f"{cache} was made with {field}={header.get(field)!r}, this command says {here!r}: "
                             "say the same, or delete that folder to read the images again")  # fmt: skip
    return images


def list_files(folder, above):
    """Paths of the files in a folder and below it, in order. Links are followed, but not up to a folder of `above`."""
    above = above | {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name in JUNK:
            continue
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # no error for a broken link
        if not is_folder:
            yield entry.path
        elif os.path.realpath(entry.path) not in above:
            yield from list_files(entry.path, above)


def list_images(folder, out):
    """-> names of the classes, and [[path within the folder, label], ...]. Files of other kinds are counted and named.

    A subfolder with images is a class, unless --out lies in it. Two ways to write a name (é or e + accent) are one
    class: names are in Unicode's form NFC, which keyboards type.
    """
    endings = Image.registered_extensions()
    out = out.resolve()
    class_of = {}  # path within the folder: name of its class
    others = Counter()
    for path in list_files(folder, {str(out), *map(str, out.parents)}):
        path = path.removeprefix(f"{folder}{os.sep}")
        name, is_inside, _ = path.partition(os.sep)
        ending = os.path.splitext(path)[1].lower()
        if ending not in endings:
            others[ending or "without an ending"] += 1
        elif not is_inside:
            others["outside the class folders"] += 1
        else:
            class_of[path] = unicodedata.normalize("NFC", name)
    if others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        print(printable(f"not used in {folder}: {kinds}. Pillow cannot read such files here: convert pictures among "
                        "them to PNG or JPEG, and put each into a class folder"))  # fmt: skip
    names = sorted(set(class_of.values()))
    labels = {name: label for label, name in enumerate(names)}
    return names, [[path, labels[name]] for path, name in class_of.items()]


def create_cache(cache, folder, header, row):
    """An empty cache with the listing of `folder`: header.json, x.npy for rows like `row`, labels.npy of UNREAD."""
    class_names, files = list_images(folder, cache.parent)
    if not files:
        raise ValueError(f"--data {folder}: expected one subfolder of images a class; found no subfolder, or they hold "
                         "no images")  # fmt: skip
    labels = np.full(len(files), UNREAD)
    for i, (path, _) in enumerate(files):
        if os.path.lexists(folder / path) and not (folder / path).is_file():
            print(printable(f"{folder / path}: left out, it is a pipe or a link to nowhere"), file=sys.stderr)
            labels[i] = BROKEN
    try:
        cache.mkdir(exist_ok=True)
        np.lib.format.open_memmap(cache / "x.npy", "w+", row.dtype, (len(files), *row.shape)).flush()
        if hasattr(os, "posix_fallocate"):
            # Reserve the disk space now: a full disk would otherwise kill the process when a mapped page is written.
            with open(cache / "x.npy", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        np.save(cache / "labels.npy", labels)
        text = json.dumps(header | dict(source=str(folder), class_names=class_names, files=files)).encode()
        atomic_write(cache / "header.json", lambda file: file.write(text))
    except OSError as e:
        (cache / "x.npy").unlink(missing_ok=True)  # others may need the space that it has taken
        raise OSError(f"{cache}: cannot be made ({first_line(e)}); it takes {len(files) * row.nbytes / 1e6:,.0f} MB, "
                      f"{shutil.disk_usage(cache.parent).free / 1e6:,.0f} MB are free") from None  # fmt: skip


def make_cache(cfg, cache):
    """Put each image of --data through load_encoder, once, into the folder `cache`. A stopped run goes on where it was.

    labels.npy says what is done: UNREAD marks what is yet to do, BROKEN a file that cannot be read. Processes share
    the work, and threads read (Pillow decodes outside Python's lock).
    """
    folder = Path(cfg.data).resolve()
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    rank, world = ranks()
    wanted = dict(format=CACHE, vae=cfg.vae, image_size=cfg.image_size)
    encode, scale = load_encoder(cfg.vae, cfg.device)
    blank = np.zeros((3, cfg.image_size, cfg.image_size), np.uint8)
    if rank == 0 and not is_cache(cache):
        create_cache(cache, folder, wanted | dict(latent_scale=scale), row=encode(blank[None])[0])
    barrier()
    images = open_cache(cache, "r+", **wanted)
    files = images.header["files"]
    todo = np.flatnonzero(images.labels == UNREAD)[rank::world]
    parts = [todo[i : i + 16] for i in range(0, len(todo), 16)]
    progress = Progress(len(todo), "reading images")
    n_threads = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(n_threads) as pool:

        def start_reading(part):
            return [pool.submit(read_image, folder / files[i][0], cfg.image_size) for i in part]

        next_part = start_reading(parts[0]) if parts else []
        for number, part in enumerate(parts):
            read = [future.result() for future in next_part]
            if number + 1 < len(parts):
                next_part = start_reading(parts[number + 1])  # while these are encoded
            images.x[part] = encode(np.stack([blank if image is None else image for image in read]))
            images.x.flush()  # the images are on the disk before the labels say that they are
            images.labels[part] = [BROKEN if image is None else files[i][1] for i, image in zip(part, read)]
            progress(len(part))
    barrier()


class Data(NamedTuple):
    images: Images
    mirror: bool  # flip half of the images
    train_index: torch.Tensor  # the images that are learned from
    held_out: tuple | None  # x0 (m, C, H, W) and labels (m,) for validation: one image in 100, at most 256


def embedded_data(cfg):
    """The digits: 12,000 to learn from, 256 others held out."""
    x, labels = digits(N_DIGITS, cfg.image_size, cfg.seed)
    held_out = digits(256, cfg.image_size, cfg.seed + 1)
    x = x.add_(1).mul_(127.5).round_().byte()[:, None].numpy()  # in place, to spare memory
    images = Images(x, labels.numpy(), dict(class_names=[str(i) for i in range(10)]))
    return Data(images, mirror=False, train_index=torch.arange(len(x)), held_out=held_out)


def find_cache(cfg):
    """The cache of --data: itself, or the one in the run folder, which is made or finished first."""
    if is_cache(Path(cfg.data)):
        return Path(cfg.data)
    cache = cfg.out / f"{'latents' if cfg.vae else 'images'}-{cfg.image_size}"
    if is_cache(cache):
        header = open_cache(cache).header
        folder = Path(cfg.data).resolve()
        if header["source"] != str(folder):
            raise ValueError(f"{cache} holds the images of {header['source']}, not of --data {cfg.data}: take another "
                             f"--out, delete that folder, or say --data {cache}")  # fmt: skip
        if ranks()[0] == 0 and folder.is_dir() and list_images(folder, cfg.out)[1] != header["files"]:
            print(printable(f"note: the images in {folder} are not those that {cache} was made of. It is used as it "
                            "is: delete it to read the folder again"))  # fmt: skip
    if not is_cache(cache) or (open_cache(cache).labels == UNREAD).any():
        make_cache(cfg, cache)
    return cache


def load_data(cfg):
    """-> Data, of the embedded digits or of --data."""
    if tuple(int(part) for part in PIL.__version__.split(".")[:2]) < (10, 1):
        raise ValueError(f"Pillow is {PIL.__version__}, expected 10.1 or newer: pip install -U pillow")
    if not cfg.data:
        return embedded_data(cfg)
    cache = find_cache(cfg)
    images = open_cache(cache, vae=cfg.vae, image_size=cfg.image_size)
    names = images.header["class_names"]
    n = len(images.labels)
    n_unread = int((images.labels == UNREAD).sum())
    if n_unread:
        raise ValueError(f"{cache}: {n_unread} of {n} images are not in it yet: run the command that made it again")
    good = torch.from_numpy(np.flatnonzero(images.labels != BROKEN))
    if not len(good):
        raise ValueError(f"--data {cfg.data}: none of its {n} images can be read")
    for label in sorted(set(range(len(names))) - set(images.labels.tolist())):
        print(f"class {names[label]!r} has no image that can be read: it will not be learned")
    print(f"{len(good)} images of {len(names)} classes of {printable(images.header['source'])}, {n - len(good)} left "
          f"out, from {cache}: delete it to read them again")  # fmt: skip
    good = good[torch.randperm(len(good), generator=generator(cfg.seed, 2))]
    n_held_out = min(256, len(good) // 100)
    held_out = None
    if n_held_out:
        held_out = images[good[:n_held_out], torch.zeros(n_held_out, dtype=torch.bool)]
    return Data(images, mirror=not cfg.no_flip, train_index=good[n_held_out:].sort().values, held_out=held_out)


# ----------------------------------------------------------------------------------------------------------------------
# Batches: everything random, as a function of (seed, step)


class Batch(NamedTuple):
    x0: torch.Tensor  # (B, C, H, W) in [-1, 1], or latents
    t: torch.Tensor  # (B,) int64
    y: torch.Tensor  # (B,) int64; some are dropped: num_classes, the null label of guidance
    noise: torch.Tensor  # (B, C, H, W)

    def split(self, n, device):
        """Micro-batches of n images on the device."""
        return [Batch(*parts) for parts in zip(*(z.to(device).split(n) for z in self))]


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, 0, epoch))


def draw_batch(data, model_config, cfg, diffusion, step):
    """What step number `step` sees -> Batch. Every process draws the numbers of the whole batch and keeps its slice."""
    n = cfg.batch
    n_images = len(data.train_index)
    rng = generator(cfg.seed, 1, step)
    places = []
    for position in range(step * n, (step + 1) * n):
        epoch, place = divmod(position, n_images)
        places.append(int(epoch_order(cfg.seed, epoch, n_images)[place]))
    index = data.train_index[places]
    flip = torch.rand(n, generator=rng) < 0.5 if data.mirror else torch.zeros(n, dtype=torch.bool)
    drop = torch.rand(n, generator=rng) < model_config.class_dropout_prob
    t = draw_timesteps(n, diffusion, rng)
    noise = torch.randn((n, *data.images.shape), generator=rng)

    rank, world = ranks()
    index, flip, drop, t, noise = (z.chunk(world)[rank] for z in (index, flip, drop, t, noise))
    x0, labels = data.images[index, flip]
    return Batch(x0, t, torch.where(drop, model_config.num_classes, labels), noise)


def draw_timesteps(n, diffusion, rng):
    """t (n,). For eps: uniform, as in the paper. For v: logSNR ~ N(-2, 2.5), and one in twenty uniform.

    Most then fall between t = 200 and 800, where a picture's layout is decided; a nearly clean image, or one of nearly
    pure noise, teaches little. A short training has no time to spend on them.
    """
    if diffusion.prediction == "eps":
        return torch.randint(1000, (n,), generator=rng)
    quantile = (torch.arange(n) + torch.rand(n, generator=rng)) / n  # spread evenly over the batch
    wanted = -2 + 2.5 * torch.special.ndtri(quantile.double().clamp(1e-6, 1 - 1e-6))
    # log_snr falls as t grows, so flipped it rises. n_noisier timesteps have a lower logSNR than is wanted. They are
    # t = 999, 998, ..., so the wanted one is the next: 999 - n_noisier.
    log_snr = torch.from_numpy(np.log(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)))
    n_noisier = torch.searchsorted(log_snr.flip(0).contiguous(), wanted)
    t = 999 - n_noisier.clamp(max=999)
    is_uniform = torch.rand(n, generator=rng) < 0.05
    return torch.where(is_uniform, torch.randint(1000, (n,), generator=rng), t)


# ----------------------------------------------------------------------------------------------------------------------
# Model and optimizer


def read_init(path):
    """What --init names -> its Config, and its state dict with full-precision weights."""
    path = from_rank_0(find_checkpoint(path))  # a run that is still training may save a newer one meanwhile
    if is_state(path):
        return Config(**read_metadata(path)["config"]), read_average(path)
    model = load_model(path)
    if isinstance(model, MetaDiT):
        raise ValueError(f"--init {path}: Meta's DiT has other layers than ours, it can only be a --teacher")
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            # Latent weights of +-|alpha| and 0 round back to the same codes.
            state[f"{name}.weight"] = unpack_ternary(module.weight) * module.alphas.abs()
    return model.config, state


LABEL_TABLE = "y_embedder.embedding_table.weight"


def label_rows(their_names, our_names):
    """For each row of our label table the row of theirs, or None: the classes are not the same.

    They are the same if they have the same names, or if ours are ImageNet's 1,000 folders (n01440764, ...), which in
    sorted order have the indices 0 to 999 that name the classes of a released model.
    """
    ours = our_names
    if their_names != ours and len(ours) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in ours):
        ours = [str(i) for i in range(1000)]
    if not their_names or sorted(their_names) != sorted(ours):
        return None
    rows = [their_names.index(name) for name in ours]
    return [*rows, len(rows)]  # the last row is the null label


def match_labels(state, init, their_names, our_names):
    """The weights of --init with the rows of their label table in our order, or without it if the classes differ."""
    if their_names == our_names:
        return state
    rows = label_rows(their_names, our_names)
    if rows:
        print(f"label table: the {len(our_names)} classes of {init}, in the order of --data")
        return state | {LABEL_TABLE: state[LABEL_TABLE][rows]}
    print(f"new label table: {init} has {len(state[LABEL_TABLE]) - 1} classes, here are {len(our_names)}")
    return {name: value for name, value in state.items() if name != LABEL_TABLE}


def load_teacher(cfg, model_config):
    """-> the model of --teacher in eval mode, on the device, and its fingerprint.

    Each process has the whole of it, because it needs no gradients: of a 4.2B model 8.4 GB. ValueError: its outputs are
    of another kind than the student's.
    """
    path = from_rank_0(find_checkpoint(cfg.teacher))
    teacher = load_average(path) if is_state(path) else load_model(path)
    for field in ("prediction", "in_channels", "input_size", "learn_sigma"):
        theirs = getattr(teacher.config, field)
        ours = getattr(model_config, field)
        if theirs != ours:
            raise ValueError(f"--teacher {cfg.teacher} has {field}={theirs!r}, the student {ours!r}: not comparable")
    number = fingerprint(teacher.state_dict())
    teacher.to(cfg.device)
    if cfg.dtype == "bf16" and teacher.config.ternary:
        teacher.set_product_dtype(torch.bfloat16)
    elif cfg.dtype == "bf16":
        for p in teacher.layers.parameters():
            if p.ndim == 2:  # autocast would do so at every step; norms and the stream between blocks stay in fp32
                p.data = p.data.bfloat16()
    return teacher, number


def match_teacher(teacher, cfg, model_config):
    """Put the rows of the teacher's label table in our order. ValueError: its classes or latents are not ours."""
    if model_config.vae and teacher.config.latent_scale != model_config.latent_scale:
        raise ValueError(f"--teacher {cfg.teacher} has latent_scale={teacher.config.latent_scale}, the student "
                         f"{model_config.latent_scale}: their latents are of different VAEs")  # fmt: skip
    rows = label_rows(teacher.config.class_names, model_config.class_names)
    if rows is None:
        names = printable(", ".join((teacher.config.class_names or ["unnamed"])[:4]))
        raise ValueError(f"--teacher {cfg.teacher} has {teacher.config.num_classes} classes ({names}, ...), --data has "
                         f"{model_config.num_classes}: a teacher must know the same classes")  # fmt: skip
    table = teacher.y_embedder.embedding_table.weight
    table.copy_(table[rows])


@torch.no_grad()
def add_adaln_norm(model, state):
    """Give the weights of a model without the paper's RMS Norm one: its gain is the size of what it will divide by.

    The adaLN outputs of the full-precision model, at 50 timesteps, have a root mean square in each block; with that as
    the gain, the norm changes their sizes as little as it can.
    """
    c = model.t_embedder(torch.linspace(0, 999, 50)) + model.y_embedder.embedding_table.weight.mean(0)
    for i in range(model.config.n_layers):
        name = f"layers.{i}.adaLN_modulation"
        out = F.linear(F.silu(c), state[f"{name}.1.weight"], state[f"{name}.1.bias"])
        state[f"{name}.2.weight"] = out.square().mean().sqrt().expand(out.shape[1])


def build_model(model_config, state=None, init=None):
    """-> DiT to train: fresh, or with the weights `state` of the checkpoint `init`; a missing label table is new."""
    model = DiT(model_config)
    if state is None:
        return model
    ours = model.state_dict()
    theirs = {LABEL_TABLE: ours[LABEL_TABLE]} | state
    if model_config.adaln_norm and "layers.0.adaLN_modulation.2.weight" not in theirs:
        embedders = {name: value for name, value in theirs.items() if name.startswith(("t_embedder.", "y_embedder."))}
        model.load_state_dict(embedders, strict=False)
        add_adaln_norm(model, theirs)
    for name in ours.keys() - theirs.keys():
        if name.endswith("alphas"):  # from full precision: alpha starts at the quantizer's scale
            theirs[name] = theirs[name.replace("alphas", "weight")].abs().mean().view(1)
    for name in ours.keys() | theirs.keys():
        there = tuple(theirs[name].shape) if name in theirs else "none"
        here = tuple(ours[name].shape) if name in ours else "none"
        if there != here:
            raise ValueError(f"--init {init} does not fit: its {name} is {there}, this model's {here}")
        ours[name].copy_(theirs[name])
    return model


def make_optimizer(model, cfg):
    """AdamW. Alphas learn at a fifth of the rate: one of them scales a whole layer.

    Decay shrinks the blocks' matrices. To multiply all of W changes no code, so it changes no output at once. But the
    smaller the latent weights are, the fewer steps a code takes to flip: with decay, codes go on flipping until the
    learning rate falls.
    """
    alphas = []
    matrices = []
    others = []
    for name, p in model.named_parameters():
        if name.endswith("alphas"):
            alphas.append(p)
        elif name.startswith("layers.") and p.ndim == 2:
            matrices.append(p)
        else:
            others.append(p)
    groups = [
        dict(params=others, lr_scale=1.0, decayed=False, weight_decay=0.0),
        dict(params=matrices, lr_scale=1.0, decayed=True, weight_decay=cfg.decay),
        dict(params=alphas, lr_scale=0.2, decayed=False, weight_decay=0.0),
    ]
    groups = [group for group in groups if group["params"]]  # full precision has no alphas
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def warmed_up_average(decay):
    """An exponential moving average for AveragedModel. Its decay grows as n, the number of weights averaged so far.

    With the full decay from the start, a run shorter than some 1 / (1 - decay) steps would export mostly the random
    weights that it started from.
    """

    def update(averaged, current, n):
        n = n.item()
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, n)

    return update


def learning_rate(cfg, step):
    """The rate warms up, then falls along a cosine to 1%: ternary codes settle only when it is small."""
    warmup = min(1, (step + 1) / cfg.warmup)
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    return cfg.lr * warmup * cosine


def set_learning_rate(optimizer, cfg, step):
    """The rate of this step, and whether its matrices are decayed -> the rate"""
    lr = learning_rate(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decayed"]:
            group["weight_decay"] = cfg.decay if step < cfg.decay_until * cfg.steps else 0.0
    return lr


def training_flops(config):
    """FLOP of training on one image: forward 2 for each weight and token, backward twice that."""
    d, cond = config.dim, config.cond_dim
    patch_dim = config.patch_size**2 * config.in_channels
    out_dim = patch_dim * (2 if config.learn_sigma else 1)
    weights_of_tokens = config.n_layers * (4 * d**2 + 3 * d * config.ffn_dim) + (patch_dim + out_dim) * d
    weights_of_condition = config.n_layers * 6 * d * cond + 2 * d * cond + 256 * cond + cond**2
    attention = config.n_layers * 2 * config.n_tokens**2 * d  # q k^T, and its product with v
    return 3 * 2 * (config.n_tokens * weights_of_tokens + weights_of_condition + attention)


def bf16_is_fast(device):
    """Whether the hardware multiplies bf16 itself."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has("avx512_bf16", "amx_bf16")


def can_compile(device):
    """Try torch.compile on something small: it needs a C++ compiler and Python's headers, or Triton on a GPU."""

    def small(x):
        return (x * 2 + 1).relu()

    try:
        torch.compile(small)(torch.ones(1024, device=device))
        return True
    except Exception as e:
        print(f"--compile does not work here ({first_line(e)[:100]}): training without it, slower")
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Memory: what a run will need, and how many images at a time fit

N_DIGITS = 12000  # embedded images to learn from


def block_activation_bytes(config, dtype, device):
    """What a block keeps of one image for its backward pass, by formula: bytes a token, times tokens."""
    size = 2 if dtype == "bf16" else 4
    residuals = 4 * 4 * config.dim  # fp32: what goes into and comes out of the two norms
    copies_of_inputs = 5 if dtype == "bf16" else 2  # autocast casts for each of wq, wk, wv, w1 and w3 anew
    inputs = copies_of_inputs * size * config.dim
    attention = 6 * size * config.dim  # q, k, v, wo's input, both outputs before their gates
    ffn = 4 * size * config.ffn_dim  # w1's output, its silu, w3's output, w2's input
    softmax = 0
    if device == "cpu":  # softmax_attention keeps (heads, T, T) in fp32, and in bf16 for the product with v
        softmax = config.n_heads * config.n_tokens * (6 if dtype == "bf16" else 4)
    return config.n_tokens * (residuals + inputs + attention + ffn + softmax)


def memory_needed(config, cfg, world):
    """-> bytes that a process will hold whatever the micro-batch, and bytes more for each of its images.

    tests/bench_memory.py compares it with what runs take.
    """
    with torch.device("meta"):
        model = DiT(config)
    n_params = sum(p.numel() for p in model.parameters())
    block_params = sum(p.numel() for p in model.layers[0].parameters())
    kept_blocks = 1 if cfg.checkpointing else config.n_layers
    block_activations = block_activation_bytes(config, cfg.dtype, cfg.device)

    fixed = 20 * n_params / world  # fp32: weights, gradients, AdamW's two moments, averaged weights
    # Weights as the matmuls take them: they are kept for the backward pass, and are not sharded.
    fixed += kept_blocks * block_params * (2 if cfg.dtype == "bf16" else 4)
    if world > 1:
        fixed += 3 * 4 * block_params  # whole in fp32: the block that computes, the next one, a block's gradients
    if not cfg.data:
        fixed += N_DIGITS * 3 * cfg.image_size**2 * 4  # drawn in fp32, and freed again
    per_image = (kept_blocks + 1) * block_activations  # one more for what the backward pass of a block makes
    if cfg.checkpointing:
        per_image += config.n_layers * config.n_tokens * config.dim * 4  # what goes into each block
    return 1.05 * fixed, 1.05 * per_image  # the allocator loses some


def free_memory(device):
    """Bytes that this process can still take: of the GPU, or of the machine and its container."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # macOS: all that there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    container = Path("/sys/fs/cgroup")
    limit = container / "memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int((container / "memory.current").read_text())
        cache = int((container / "memory.stat").read_text().split("inactive_file")[1].split()[0])  # can be dropped
        free = min(free, int(limit.read_text()) - used + cache)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def choose_micro_batch(config, cfg, world):
    """cfg.micro_batch, or the most images at a time, up to 32, that fit in memory. ValueError if not even one does.

    It changes memory and speed, and of the numbers only the order of additions. On a CPU it is kept below 4 TFLOP, some
    seconds, so that the progress line moves.
    """
    fixed, per_image = memory_needed(config, cfg, world)
    free = free_memory(cfg.device)
    share = cfg.batch // world
    candidates = [n for n in (32, 16, 8, 4, 2, 1, share) if n <= min(32, share)]
    if cfg.device == "cpu":
        candidates = [n for n in candidates if n == 1 or n * training_flops(config) < 4e12]
    fitting = [n for n in candidates if fixed + n * per_image < free]
    micro_batch = cfg.micro_batch or max(fitting, default=1)
    needed = fixed + micro_batch * per_image
    sizes = f"{needed / 1e9:.1f} GB for {micro_batch} images at a time, {free / 1e9:.1f} GB are free"
    if not fitting and not cfg.micro_batch:
        cures = ["more GPUs (torchrun)", "a smaller --size"]
        if not cfg.checkpointing:
            cures.insert(0, "--checkpointing")
        raise ValueError(f"this run needs {sizes}. Try {', '.join(cures)}; --micro-batch 1 tries it all the same")
    print(f"memory: {sizes}{'' if needed < free else ': it may not fit'}", flush=True)
    return micro_batch


# ----------------------------------------------------------------------------------------------------------------------
# Many processes


def all_sum(x):
    """x, in place, summed over the processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def least_of_all(number):
    """The least of the processes' whole numbers."""
    least = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least.item()


def full_tensor(x):
    """A tensor whose parts lie on all processes -> the plain tensor, on each of them."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_model(model, device):
    """Move a model to its device. Of many processes each holds a part (FSDP2), and a whole block only to compute it.

    Weights are gathered in fp32 and ternarized whole: so mean|W| is that of the whole matrix, and the codes are those
    that packing will make. Of weights gathered in bf16 (MixedPrecisionPolicy), some would round to other codes.
    """
    if not dist.is_initialized():
        return model.to(device)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    state = model.state_dict()
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    model.to("meta")
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)  # only rank 0 has drawn weights
    set_model_state_dict(model, state if dist.get_rank() == 0 else {}, options=options)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The state of a run on disk: everything that an exact resume needs

STATE = "terdit-state-3"


def states(out):
    """Folders of whole states, the newest last. Unfinished and half-deleted ones end in .tmp."""
    numbered = [d for d in out.glob("state-*") if d.name.removeprefix("state-").isdigit()]
    return sorted(numbered, key=lambda d: int(d.name.removeprefix("state-")))


def remove_state(path):
    """Rename, then delete: half of a state must not look whole."""
    shutil.rmtree(path.rename(path.with_suffix(".tmp")))


def save_state(out, tensors, metadata):
    """Write tensors (each process its own parts) and run.json into a .tmp folder, then rename it; keep the last two."""
    path = out / f"state-{metadata['step']:07d}"
    tmp_path = path.with_suffix(".tmp")
    is_first = ranks()[0] == 0
    try:
        dcp.save(tensors, checkpoint_id=tmp_path)  # flushed to the disk
        checksums = file_checksums(tmp_path)
        if is_first:
            text = json.dumps(metadata | dict(checksums=checksums)).encode()
            atomic_write(tmp_path / "run.json", lambda file: file.write(text))
            os.rename(tmp_path, path)
    except (dcp.CheckpointException, OSError, KeyboardInterrupt) as e:
        # torch reports a full disk as "unexpected pos", so the free space is said too.
        free = shutil.disk_usage(out).free / 1e6
        shutil.rmtree(tmp_path, ignore_errors=True)
        kept = f"{states(out)[-1]} is whole" if states(out) else "nothing was saved before"
        if isinstance(cause(e), KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped while {path} was written, which is lost; {kept}") from None
        raise OSError(f"{path}: cannot be written ({first_line(cause(e))}; {free:,.0f} MB free); {kept}") from None
    if is_first:
        for old in states(out)[:-2]:
            remove_state(old)
    barrier()


def cause(e):
    """DCP collects an exception for each process: of these the first."""
    return next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e


def damaged_error(path, why):
    return ValueError(f"{path}: damaged ({why}); delete it to go on from the one before, or --fresh")


def file_checksums(path):
    """CRC-32 of each file of a state but run.json, by name. The processes share the work."""
    rank, world = ranks()
    names = sorted(file.name for file in path.iterdir() if file.name != "run.json")
    checksums = {}
    for name in names[rank::world]:
        checksums[name] = 0
        with open(path / name, "rb") as file:
            while block := file.read(1 << 24):
                checksums[name] = zlib.crc32(block, checksums[name])
    parts = [checksums for _ in range(world)]
    if world > 1:
        dist.all_gather_object(parts, checksums)
    return {name: checksum for part in parts for name, checksum in part.items()}


def read_metadata(path):
    """run.json of a state folder, or ValueError: what is wrong with it."""
    try:
        saved = json.loads((path / "run.json").read_text())
        if saved["format"] == STATE:
            Config(**saved["config"])
            wanted = dict(step=int, steps=int, micro_batch=int, torch=str, dtype=str, checksums=dict)
            for name, kind in wanted.items():
                if not isinstance(saved[name], kind):
                    raise ValueError(f"{name}={saved[name]!r:.99}")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
        raise damaged_error(path, f"run.json: {e!r:.200}") from None
    if saved["format"] != STATE:
        raise ValueError(f"{path} was trained with format={saved['format']!r}, this command says {STATE!r}: take the "
                         f"train.py that wrote it, another --out, or --fresh")  # fmt: skip
    return saved


def verify_state(path):
    """Raise ValueError if a file of a state is not what was written, or its index is hostile."""
    written = read_metadata(path)["checksums"]
    found = file_checksums(path)
    for name in sorted(written.keys() | found.keys()):
        if found.get(name) != written.get(name):
            change = "has changed since it was written" if name in found else "is missing"
            raise damaged_error(path, f"{name} {change}")
    try:
        with open(path / ".metadata", "rb") as file:
            IndexUnpickler(file).load()
    except Exception as e:  # a hostile pickle raises anything
        raise damaged_error(path, first_line(e)) from None


class IndexUnpickler(pickle.Unpickler):
    """Reads the index of a state and nothing else: pickles can run code, and the state may be from someone else."""

    def find_class(self, module, name):
        """Allow the dataclasses and enums of torch's checkpoints, dtypes, sizes and paths."""
        if module.split(".")[0] not in ("torch", "pathlib"):
            raise ValueError(f"its index speaks of {module}.{name}, and may be hostile")
        found = super().find_class(module, name)
        is_record = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
        is_of_checkpoints = module.startswith("torch.distributed.checkpoint.") and is_record
        is_plain = isinstance(found, torch.dtype) or name in ("Size", "PosixPath", "_get_layout")
        if "." in name or not (is_of_checkpoints or is_plain):
            raise ValueError(f"its index speaks of {module}.{name}, and may be hostile")
        return found


def load_tensors(path, tensors):
    """Fill tensors, in place, from a state folder that any number of processes wrote."""
    try:
        dcp.load(tensors, checkpoint_id=path)
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError) as e:
        raise damaged_error(path, first_line(cause(e))) from None


def read_state(path, prefix=""):
    """The tensors of a state folder whose names start with prefix, whole, on the CPU."""
    verify_state(path)
    try:
        index = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        index = {name: entry for name, entry in index.items() if name.startswith(prefix)}
        n_bytes = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in index.values())
        if n_bytes > sum(file.stat().st_size for file in path.iterdir()):
            raise ValueError(f"its index speaks of {n_bytes:,} bytes, more than it has")
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.items()}
    except Exception as e:  # an index that someone has made up raises anything
        raise damaged_error(path, first_line(e)) from None
    load_tensors(path, tensors)
    return tensors


def read_average(path):
    """The averaged weights of a state folder, by their names in the model."""
    return {name.removeprefix("ema."): value for name, value in read_state(path, "ema.").items()}


def load_average(path, device="cpu", **overrides):
    """The averaged model of a state folder, for inference, packed if it is ternary."""
    config_fields = read_metadata(path)["config"] | overrides
    model = model_from_state(path, config_fields, read_average(path))
    if model.config.ternary:
        model = pack_model(model)
    return model.to(device)


def export_newest_state(out):
    """Write packed.pt, or full.pt, of a run that has not ended."""
    if not states(out):
        raise ValueError(f"--export: {out} holds no state of a run")
    model = load_average(states(out)[-1])
    path = out / ("packed.pt" if model.config.ternary else "full.pt")
    save_checkpoint(path, model)
    print(f"{path}: the average of {states(out)[-1]}")


def saved_setting(out, name):
    """micro_batch or dtype of the newest state, or None."""
    try:
        return read_metadata(states(out)[-1])[name]
    except (ValueError, LookupError):  # no state; a damaged one is refused later, by name
        return None


def check_state(path, metadata):
    """The step of the state in `path` if its run is the one that metadata describes, or ValueError: what differs."""
    saved = read_metadata(path)
    theirs = saved["config"] | saved
    step = saved["step"]
    steps = saved["steps"]
    version = saved["torch"]
    for field, here in (metadata["config"] | metadata).items():
        if field in ("step", "steps", "torch", "micro_batch") or here == theirs.get(field):
            continue
        difference = f"{field}={theirs.get(field)!r}, this command says {here!r}"
        if field == "files":
            difference = "another list of images"
        elif field in ("init", "teacher"):  # fingerprints of weights say nothing to a person
            difference = f"other weights of --{field}, or none"
        raise ValueError(f"{path} was trained with {difference}: use the same, another --out, or --fresh")
    if step > metadata["steps"]:
        raise ValueError(f"{path} is at step {step} already, --steps says {metadata['steps']}: "
                         "--export writes the model as it is, --fresh starts over")  # fmt: skip
    if steps != metadata["steps"]:
        print(f"note: planned for {steps} steps before, now {metadata['steps']}: the learning rate follows")
    if version != metadata["torch"]:
        print(f"note: {path} was written by torch {version}, this is {metadata['torch']}: the last bits may differ")
    return step


# ----------------------------------------------------------------------------------------------------------------------
# A run and its step


class Run:
    """What a step of training reads and changes."""

    def __init__(self, cfg, data, model, ema, optimizer, teacher=None, decode=None, fingerprints=None):
        self.cfg = cfg
        self.data = data
        self.model = model
        self.ema = ema  # AveragedModel: ema.module is the averaged DiT, which is validated, drawn and exported
        self.optimizer = optimizer
        self.teacher = teacher  # a model in eval mode, or None
        self.diffusion = GaussianDiffusion(prediction=model.config.prediction)
        self.decode = decode  # latents -> images, or None
        self.fingerprints = fingerprints or {}  # of the weights of --init and --teacher
        self.step = 0  # steps that are done
        self.pool = ThreadPoolExecutor(1)
        self.upcoming: Future | None = None

    def next_batch(self):
        """The Batch of this step. A thread draws the one after it while this one is computed."""
        if self.upcoming is None:
            self.upcoming = self.start_drawing(self.step)
        batch = self.upcoming.result()
        self.upcoming = self.start_drawing(self.step + 1)
        return batch

    def start_drawing(self, step):
        return self.pool.submit(draw_batch, self.data, self.model.config, self.cfg, self.diffusion, step)

    def tensors(self):
        """name -> tensor of all that a state holds: weights, averaged weights, AdamW's moments and step counts."""
        tensors = {"n_averaged": self.ema.n_averaged}
        for (name, p), averaged in zip(self.model.named_parameters(), self.ema.module.parameters()):
            tensors[f"model.{name}"] = p.detach()
            tensors[f"ema.{name}"] = averaged.detach()
            for kind, value in self.optimizer.state[p].items():
                tensors[f"{kind}.{name}"] = value
        return tensors

    def metadata(self):
        """What run.json says. check_state refuses to resume under a command that means something else."""
        cfg = self.cfg
        files = json.dumps(self.data.images.header.get("files")).encode()
        return dict(
            format=STATE,
            torch=str(torch.__version__),
            step=self.step,
            steps=cfg.steps,
            config=asdict(self.model.config),
            images=len(self.data.images.labels),
            files=zlib.crc32(files),
            batch=cfg.batch,
            micro_batch=cfg.micro_batch,
            lr=cfg.lr,
            decay=cfg.decay,
            seed=cfg.seed,
            dtype=cfg.dtype,
            no_flip=cfg.no_flip or None,  # None as in states that are older than the flag
            init=self.fingerprints.get("init"),
            teacher=self.fingerprints.get("teacher"),
            teacher_weight=cfg.teacher_weight if cfg.teacher else None,
        )


@dataclass
class StepStats:
    """Statistics of one step, over all processes. Quartiles are of the timestep: 0-249, ... 750-999."""

    loss: float  # mean over the batch, without the teacher's term
    distill: float  # the teacher's term: mean square between its outputs and the model's; 0 without a teacher
    grad_norm: float  # before clipping
    mse_sum: np.ndarray  # (4,) squared error of the predicted noise, by quartile
    mse_count: np.ndarray  # (4,) images in each quartile


def autocast_losses(run, model, batch, teacher=None):
    """GaussianDiffusion.training_losses of a micro-batch, in the dtype of the run."""
    with torch.autocast(run.cfg.device, torch.bfloat16, enabled=run.cfg.dtype == "bf16"):
        return run.diffusion.training_losses(model, batch.x0, batch.t, batch.y, batch.noise, teacher)


def train_step(run, batch, show_part=None):
    """One update of the weights and of their average -> StepStats. show_part(images done) is called as they are."""
    cfg = run.cfg
    world = ranks()[1]
    loss = torch.zeros((), device=cfg.device, dtype=torch.float64)
    distill = torch.zeros((), device=cfg.device, dtype=torch.float64)
    mse_sum = torch.zeros(4, device=cfg.device, dtype=torch.float64)
    mse_count = torch.zeros(4, device=cfg.device, dtype=torch.float64)
    alphas_cumprod = torch.from_numpy(run.diffusion.alphas_cumprod).to(cfg.device)
    n_done = 0
    # Gradients add up over micro-batches, which bounds the memory of activations.
    for part in batch.split(cfg.micro_batch, cfg.device):
        terms = autocast_losses(run, run.model, part, run.teacher)
        part_loss = terms["loss"].sum() / cfg.batch
        loss += part_loss.detach()
        if run.teacher:
            part_distill = terms["distill"].sum() / cfg.batch
            distill += part_distill.detach()
            part_loss = part_loss + cfg.teacher_weight * part_distill
        (part_loss * world).backward()  # FSDP takes the mean over the processes
        mse = terms["mse"].detach().double()
        if run.diffusion.prediction == "v":
            mse = mse * alphas_cumprod[part.t]  # v's error -> the noise's
        mse_sum.index_add_(0, part.t // 250, mse)
        mse_count.index_add_(0, part.t // 250, torch.ones_like(mse))
        n_done += len(part.t)
        if show_part:
            show_part(n_done)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)).item()
    for sum_of_mine in (loss, distill, mse_sum, mse_count):
        all_sum(sum_of_mine)
    stats = StepStats(loss.item(), distill.item(), grad_norm, mse_sum.cpu().numpy(), mse_count.cpu().numpy())
    if not math.isfinite(stats.distill):
        raise ValueError(f"step {run.step}: the teacher's term is {stats.distill}: do the outputs of --teacher "
                         f"{cfg.teacher} make sense?")  # fmt: skip
    if not (math.isfinite(stats.loss) and math.isfinite(grad_norm)):
        kept = f"{states(cfg.out)[-1]} holds the last good state" if states(cfg.out) else "nothing was saved yet"
        raise ValueError(f"step {run.step}: loss {stats.loss}, gradient norm {grad_norm}, not finite: stopped; {kept}. "
                         f"Try a lower --lr")  # fmt: skip
    run.optimizer.step()
    run.optimizer.zero_grad()
    if world > 1:
        run.ema.module.reshard()  # FSDP keeps some of it whole after a validation
    run.ema.update_parameters(run.model)
    run.step += 1
    return stats


@torch.no_grad()
def validate(run):
    """Loss of the averaged model on the images held out, with the same timesteps and noise each time."""
    x0, y = (z[: 4 * run.cfg.batch] for z in run.data.held_out)
    n = len(y)
    t = torch.arange(n) * 1000 // n
    noise = torch.randn(x0.shape, generator=generator(run.cfg.seed, 3))
    total = 0.0
    for part in Batch(x0, t, y, noise).split(run.cfg.micro_batch, run.cfg.device):
        total += autocast_losses(run, run.ema.module, part)["loss"].sum().item()
    return total / n


def draw_grid(run, model, path):
    """A sheet of samples of `model`, the classes in turn (the first ten of more)."""
    n = run.cfg.grid
    n_classes = min(10, model.config.num_classes)
    y = torch.arange(n) % n_classes
    images = sample_images(model.eval(), y, run.cfg.seed, decode=run.decode, progress=Progress(n * STEPS))
    save_grid(images, min(n, n_classes), path)


def draw_curve(out):
    """log.csv as curve.png: above loss and val_loss, below the share of ternary codes that flipped in 100 steps."""
    points = {"loss": [], "val_loss": [], "flipped": []}
    for line in (out / "log.csv").read_text().splitlines()[1:]:
        row = dict(zip(Log.FIELDS, line.split(",")))
        for name in points:
            if row[name]:
                points[name].append((int(row["step"]), float(row[name])))
    last_step = max((step for step, _ in points["loss"]), default=1)  # no row before step 10
    page = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(page)
    for top, panel in (20, {"loss": "steelblue", "val_loss": "darkorange"}), (240, {"flipped": "seagreen"}):
        highest = max((value for name in panel for _, value in points[name]), default=0) or 1
        draw.rectangle((60, top, 620, top + 200), outline="gray")
        draw.text((10, top), f"{highest:.3g}", fill="black")
        draw.text((10, top + 190), "0", fill="black")
        for i, (name, colour) in enumerate(panel.items()):
            draw.text((550, top + 10 + 16 * i), name, fill=colour)
            line = [(60 + 560 * step / last_step, top + 200 * (1 - value / highest)) for step, value in points[name]]
            draw.line(line, fill=colour, width=2)
            for x, y in line[-1:]:  # a single value makes no line
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    draw.text((60, 455), f"steps 1 to {last_step}", fill="black")
    atomic_write(out / "curve.png", lambda file: page.save(file, "PNG"))


def sample_codes(model):
    """The codes of one ternary weight in 17 of this process's part of the model, int8."""
    codes = []
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            weight = module.weight.detach()
            gamma = full_tensor(weight.abs().mean()) + TERNARY_EPS  # of the whole matrix
            if isinstance(weight, DTensor):
                weight = weight.to_local()
            codes.append((weight.flatten()[::17] / gamma).round().clamp(-1, 1).to(torch.int8))
    return torch.cat(codes)


def duration(seconds):
    """0:03:31, 12 days, or 171 years."""
    days = seconds / 86400
    if days < 2:
        return str(timedelta(seconds=int(seconds)))
    return f"{days:,.0f} days" if days < 700 else f"{days / 365:,.0f} years"


class Log:
    """log.csv and the line on the terminal. A row every ten steps; rows past a resumed step are removed.

        loss            mean since the row before (after a resume, of fewer steps), without the teacher's term
        mse_q1..4       mean square error of the predicted noise at timesteps 0-249, ... 750-999
        grad_norm, lr   of the row's last step; the norm before clipping
        images_per_s    since the run started or resumed, its first step and sample grids left out
        zero, flipped   share of ternary codes that are 0, and that changed in the last 100 steps (or since the resume)
        val_loss        of the averaged model, on images held out
        tflops          of the model, 1e12 a second on each device (an H100's peak in bf16 is 989)
        distill         mean square between the teacher's outputs and the model's, since the row before
    """

    FIELDS = """step loss mse_q1 mse_q2 mse_q3 mse_q4 grad_norm lr images_per_s zero flipped val_loss tflops
                distill""".split()

    def __init__(self, run):
        self.run = run
        self.file = self.open_csv(run.cfg.out / "log.csv") if ranks()[0] == 0 else None
        self.tflop_per_image = training_flops(run.model.config) / 1e12
        self.codes = sample_codes(run.model) if run.model.config.ternary else None
        self.first_step = run.step
        self.start = time.time()  # of the first step; then of the second, for the first one compiles
        self.first_is_over = False
        self.step_start = self.start
        self.shown = self.start  # when the terminal was last written to
        self.stats = []  # of the steps since the last row

    def open_csv(self, path):
        rows = []
        if self.run.step and path.is_file():
            header, *lines = path.read_text(errors="replace").splitlines() or [""]
            n_fields = len(header.split(","))  # an older train.py had fewer
            new_fields = "".join("," for _ in self.FIELDS[n_fields:])
            for line in lines:
                step = line.split(",")[0]
                if not (line.isascii() and step.isdigit() and line.count(",") == n_fields - 1):
                    print(f"{path}: a damaged row is left out")
                elif int(step) <= self.run.step:
                    rows.append(line + new_fields)
        text = "\n".join([",".join(self.FIELDS), *rows]) + "\n"
        atomic_write(path, lambda file: file.write(text.encode()))
        return open(path, "a", buffering=1)

    def steps_per_second(self):
        return max(1, self.run.step - self.first_step) / max(1e-6, time.time() - self.start)

    @contextmanager
    def paused_clock(self):
        """What happens inside does not count in images_per_s."""
        before = time.time()
        yield
        self.start += time.time() - before

    def mean_loss(self):
        return sum(stats.loss for stats in self.stats) / len(self.stats)

    def show(self, line, at_once=False):
        """The terminal shows one line that changes, twice a second; a file gets a line every 15 seconds."""
        live = sys.stdout.isatty()
        if time.time() - self.shown < (0.5 if live else Progress.LINE_SECONDS) and not at_once:
            return
        self.shown = time.time()
        is_read = say(f"\r{line:<100}" if live else line, sys.stdout, end="" if live else "\n")
        if not is_read:  # `| head` has ended, or the terminal is closed
            signal.raise_signal(signal.SIGTERM)

    def show_part(self, n_done):
        """In the middle of a step, if it is a long one: it may take minutes."""
        run = self.run
        share = run.cfg.batch // ranks()[1]
        if n_done == share or time.time() - self.step_start < 5:
            return
        seconds_an_image = (time.time() - self.step_start) / n_done
        time_left = ((run.cfg.steps - run.step) * share - n_done) * seconds_an_image
        self.show(f"step {run.step + 1}/{run.cfg.steps}: {n_done} of {share} images, "
                  f"{seconds_an_image:.2f} s an image, ETA {duration(time_left)}")  # fmt: skip

    def add(self, stats, lr):
        """Note a step."""
        run = self.run
        self.stats.append(stats)
        rate = self.steps_per_second()
        time_left = (run.cfg.steps - run.step) / rate
        self.show(f"step {run.step}/{run.cfg.steps}  loss {self.mean_loss():.4f}  grad {stats.grad_norm:.2f}  "
                  f"lr {lr:.1e}  {rate * run.cfg.batch:.3g} images/s  ETA {duration(time_left)}",
                  at_once=run.step == run.cfg.steps)  # fmt: skip
        self.step_start = time.time()
        if not self.first_is_over and run.step < run.cfg.steps:
            self.first_is_over = True
            self.first_step = run.step
            self.start = self.step_start

    def write_row(self, lr, val_loss=None):
        run = self.run
        images_per_s = self.steps_per_second() * run.cfg.batch
        row = dict(step=run.step, loss=self.mean_loss(), grad_norm=self.stats[-1].grad_norm, lr=lr,
                   images_per_s=images_per_s, tflops=images_per_s / ranks()[1] * self.tflop_per_image)  # fmt: skip
        mse_sum = sum(stats.mse_sum for stats in self.stats)
        mse_count = sum(stats.mse_count for stats in self.stats)
        for quartile in range(4):
            if mse_count[quartile]:
                row[f"mse_q{quartile + 1}"] = mse_sum[quartile] / mse_count[quartile]
        if run.teacher:
            row["distill"] = sum(stats.distill for stats in self.stats) / len(self.stats)
        if val_loss is not None:
            row["val_loss"] = val_loss
        if run.model.config.ternary and run.step % 100 == 0:
            row["zero"], row["flipped"] = self.code_shares()
        self.stats = []
        if self.file:
            values = [row.get(field, "") for field in self.FIELDS]
            print(*(f"{v:.6g}" if isinstance(v, float) else v for v in values), sep=",", file=self.file)

    def code_shares(self):
        """Share of ternary codes that are 0, and that changed since the last call, over all processes."""
        before = self.codes
        self.codes = sample_codes(self.run.model)
        counts = [(self.codes == 0).sum(), (self.codes != before).sum(), len(self.codes)]
        n_zero, n_flipped, n = all_sum(torch.tensor(counts, device=self.run.cfg.device)).tolist()
        return n_zero / n, n_flipped / n


class StopSignal:
    """Ctrl-C, SIGTERM and a closed terminal: remembered when they come, and looked at once a step, by all processes
    together. A third Ctrl-C ends without saving."""

    def __init__(self):
        self.received = None  # the signal's number
        self.requested = False  # by any of the processes
        self.n_ctrl_c = 0
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self.usual_handlers = {number: signal.signal(number, self.on_signal) for number in numbers}

    def on_signal(self, number, frame):
        # torchrun sends on what the terminal has sent to all: so only a single process counts.
        if number == signal.SIGINT and ranks()[1] == 1:
            self.n_ctrl_c += 1
        if self.n_ctrl_c >= 3:
            raise KeyboardInterrupt("ended without saving")
        if ranks()[0] == 0 and (self.received is None or self.n_ctrl_c == 2):
            words = "once more ends without saving" if self.n_ctrl_c == 2 else "ends after this step, and saves"
            try:
                os.write(2, f"\n{signal.Signals(number).name}: {words}\n".encode())  # print is not safe in a handler
            except OSError:
                pass  # the terminal is closed
        if self.received is None:
            self.received = number

    def sync(self):
        if launcher_has_ended():
            self.received = self.received or signal.SIGTERM
        n_received = all_sum(torch.tensor(float(self.received is not None)))
        self.requested = n_received.item() > 0

    def restore(self):
        for number, handler in self.usual_handlers.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------------
# From a command to a run


def parse_args(argv=None):
    """-> Namespace of TrainConfig's fields; None where the command does not say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    # fmt: off
    flag("--size", choices=SIZES, help="default tiny")
    flag("--data", help="folder with a subfolder of images for each class, or a cache; default: the embedded digits")
    flag("--vae", help="train on the latents of this VAE, a diffusers model or folder; made once, in OUT/latents-*")
    flag("--image-size", type=positive, help="pixels; default 24 for tiny and small, 256 with --vae, else 32")
    flag("--no-flip", action="store_true", help="mirror no images: for letters, signs, left and right hands")
    flag("--batch", type=positive, help="images a step of all processes; default 16 for tiny, small; 512 for 4.2B; 256")
    flag("--micro-batch", type=positive, help="images at a time within a step; default up to 32, as many as fit")
    flag("--steps", type=positive, help=f"default {DEMO.steps:,} for tiny and small ({FINE_TUNE.steps:,} from "
         f"full precision), {PAPER.steps:,} up to 600M, "
         f"at 4.2B {PAPER_LARGE.steps:,} ({PAPER_LARGE_512.steps:,} at 512 pixels)")
    flag("--lr", type=number_of(1e-12, 100), help="default 4e-3 for tiny and small (2e-3 from full precision), "
         "else 1e-4")
    flag("--decay", type=number_of(0, 100), help="weight decay of the blocks' matrices; default 0.3 for tiny and "
         "small, else 0; above these sizes it ends with the first half of the steps")
    flag("--qk-norm", action=argparse.BooleanOptionalAction, help="LayerNorm on queries and keys, which makes bf16 "
         "stable; default on for S and larger, if trained from scratch")
    flag("--seed", type=int, default=0)
    flag("--out", type=Path, help="run folder; default runs/SIZE")
    flag("--init", metavar="CKPT", help="start from a packed.pt, a run folder or a released folder")
    flag("--teacher", metavar="CKPT", help="also learn to put out what this model does on the same noisy "
         "images; it has the student's classes, image size and kind of prediction")
    flag("--full-precision", action="store_true", help="no ternary weights (the paper's baseline)")
    flag("--no-adaln-norm", action="store_true", help="no RMS Norm after adaLN (the paper's ablation)")
    flag("--export", action="store_true", default=None, help="only write packed.pt of the newest state in --out")
    flag("--fresh", action="store_true", help="start over where the run folder holds a state")
    flag("--save-every", type=positive, metavar="STEPS", help="default 1000; the last two are kept")
    flag("--sample-every", type=positive, metavar="STEPS", help="default: a quarter of the run; on one process")
    flag("--grid", type=int, metavar="N", help="images in a sample grid, 0 for none; default 4 a class, up to 40; none "
         "of latents and for large models on a CPU")
    flag("--checkpointing", action="store_true", help="compute a block's activations twice instead of keeping them")
    flag("--compile", action="store_true", help="torch.compile the blocks: faster after half a minute")
    flag("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--dtype", choices=["fp32", "bf16"], help="of matmuls; default: the state's, or bf16 if the hardware has it")
    # fmt: on
    flags = parser.parse_args(argv)
    check_common(parser, flags)
    if flags.vae and not flags.data:
        parser.error("argument --vae: needs --data")
    if flags.vae and os.path.isdir(flags.vae):
        flags.vae = os.path.realpath(flags.vae)  # the checkpoint names it, and is sampled from other folders
    if flags.grid is not None and not 0 <= flags.grid <= 10000:
        parser.error(f"argument --grid: got {flags.grid}, expected 0 to 10,000")
    if flags.export and not flags.out:
        parser.error("argument --export: needs --out, the folder of a run")
    return flags


def make_config(flags):
    """-> TrainConfig, the model's Config (its classes come from the data later), and the weights of --init or None."""
    if flags.init and flags.size:
        raise ValueError("--init takes its size from the checkpoint: leave out --size")
    init_state = None
    if flags.init:
        base, init_state = read_init(flags.init)
    else:
        flags.size = flags.size or "tiny"
        base = Config(**SIZES[flags.size])
    cache = open_cache(Path(flags.data)) if flags.data and is_cache(Path(flags.data)) else None
    cached_size = cache.header["image_size"] if cache else None
    becomes_ternary = bool(flags.init) and not base.ternary and not flags.full_precision
    recipe = recipe_of(base, flags.image_size or cached_size, becomes_ternary)
    given = {name: value for name, value in vars(flags).items() if value is not None}
    cfg = replace(recipe, **given)
    if cfg.qk_norm is None:
        cfg.qk_norm = base.qk_norm if cfg.init or recipe is DEMO else True
    if cfg.out is None:
        cfg.out = Path("runs/fine-tuned") if cfg.init else Path("runs") / cfg.size
    if not cfg.fresh:
        cfg.dtype = cfg.dtype or saved_setting(cfg.out, "dtype")  # of another machine, perhaps
        cfg.micro_batch = cfg.micro_batch or saved_setting(cfg.out, "micro_batch")  # another one would round otherwise
    if cfg.dtype is None:
        cfg.dtype = "bf16" if bf16_is_fast(cfg.device) else "fp32"
    if cfg.sample_every is None:
        cfg.sample_every = max(1, cfg.steps // 4)

    if base.vae and not cfg.vae and not cache:
        raise ValueError(f"--init {cfg.init} works on {base.in_channels} channels, latents of {base.vae}: add --vae")
    if flags.image_size is None:
        if cache:
            cfg.image_size = cached_size
        elif cfg.vae:
            cfg.image_size = 256
        elif cfg.init:
            cfg.image_size = base.input_size
    if cache:
        in_channels, input_size = cache.shape[:2]
    elif cfg.vae:
        in_channels, input_size = 4, cfg.image_size // 8
    else:
        in_channels, input_size = base.in_channels, cfg.image_size
    adaln_norm = not (cfg.no_adaln_norm or cfg.full_precision)  # Large-DiT has none
    keeps_its_kind = base.ternary == (not cfg.full_precision)
    if cfg.init and keeps_its_kind:
        adaln_norm = base.adaln_norm and not cfg.no_adaln_norm
    # A size that does not split into patches is refused here, before images are read.
    model_config = replace(base, ternary=not cfg.full_precision, adaln_norm=adaln_norm, qk_norm=cfg.qk_norm,
                           in_channels=in_channels, input_size=input_size)  # fmt: skip
    if cfg.init:
        check_init(cfg.init, base, model_config)
    return cfg, model_config, init_state


def check_init(init, base, model_config):
    """Refuse, before any image is read, what the checkpoint of --init cannot become."""
    if base.ternary and not model_config.ternary:
        raise ValueError(f"--init {init} is ternary: it cannot be trained on with --full-precision")
    if base.adaln_norm and not model_config.adaln_norm:
        raise ValueError(f"--init {init} has an RMS Norm after adaLN: it cannot be trained on with --no-adaln-norm")
    if base.qk_norm != model_config.qk_norm:
        raise ValueError(f"--init {init} was trained with qk_norm={base.qk_norm}: leave out --qk-norm and --no-qk-norm")
    if base.pos_embed and base.input_size != model_config.input_size:
        raise ValueError(f"--init {init} has learned positions for images of {base.input_size}x{base.input_size}: "
                         f"--image-size must be the same, not {model_config.input_size}")  # fmt: skip


def setup(cfg, model_config, init_state):
    """Everything before the first step -> Run, filled from the newest state if there is one."""
    rank, world = ranks()
    if cfg.batch % world:
        raise ValueError(f"--batch {cfg.batch} does not split evenly over {world} processes")
    if rank == 0:
        for unfinished in cfg.out.glob("state-*.tmp"):
            shutil.rmtree(unfinished)
    barrier()
    teacher = None
    fingerprints = {}
    if cfg.teacher:
        teacher, fingerprints["teacher"] = load_teacher(cfg, model_config)
    # The same on all processes: FSDP waits for each of them at every block of every micro-batch.
    cfg.micro_batch = least_of_all(choose_micro_batch(model_config, cfg, world))
    torch.manual_seed(cfg.seed)

    data = load_data(cfg)
    header = data.images.header
    class_names = header["class_names"]
    if cfg.init:
        fingerprints["init"] = fingerprint(init_state)
        init_state = match_labels(init_state, cfg.init, model_config.class_names, class_names)
    model_config = replace(model_config, in_channels=data.images.shape[0], input_size=data.images.shape[1],
                           num_classes=len(class_names), class_names=class_names, vae=header.get("vae"),
                           latent_scale=header.get("latent_scale", model_config.latent_scale))  # fmt: skip
    if teacher:
        match_teacher(teacher, cfg, model_config)
    if rank == 0:
        model = build_model(model_config, init_state, cfg.init)
    else:
        with torch.device("meta"):
            model = DiT(model_config)  # its weights will come from rank 0
    n_params = sum(p.numel() for p in model.parameters())
    if cfg.grid is None:
        no_grid = model_config.vae or (cfg.device == "cpu" and n_params > 50e6)
        cfg.grid = 0 if no_grid else min(40, 4 * model_config.num_classes)

    ema = AveragedModel(model, multi_avg_fn=warmed_up_average(cfg.ema))
    shard_model(model, cfg.device)
    shard_model(ema.module, cfg.device)
    compiled = cfg.compile and can_compile(cfg.device)
    for block in model.layers:
        if cfg.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if compiled:
        to_compile = list(model.layers)
        if teacher and not teacher.config.ternary:  # packed layers call C++ that torch.compile cannot see into
            to_compile += teacher.layers
        for block in to_compile:
            block.compile(dynamic=False)
    decode = None
    if model_config.vae and cfg.grid:
        decode = load_decoder(model_config.vae, model_config.latent_scale, cfg.device)
    run = Run(cfg, data, model, ema, make_optimizer(model, cfg), teacher, decode, fingerprints)
    resume(run)
    print(f"{n_params / 1e6:.2f}M parameters{' in full precision' if cfg.full_precision else ''}, "
          f"{(data.images.labels >= 0).sum()} images of {cfg.image_size}x{cfg.image_size}, "
          f"steps {run.step}-{cfg.steps} of {cfg.batch} images, "
          f"{f'{world} x ' if world > 1 else ''}{cfg.device} {cfg.dtype}, in {cfg.out}")  # fmt: skip
    return run


def resume(run):
    """Fill the run from the newest state of its folder, if there is one."""
    for p in run.model.parameters():
        # AdamW's first state as it makes it itself, so that there are tensors to load into.
        step = torch.zeros((), device=p.device)
        zeros = torch.zeros_like(p.detach())
        run.optimizer.state[p] = dict(step=step, exp_avg=zeros, exp_avg_sq=zeros.clone())
    if run.cfg.fresh:  # only now, after all checks: a wrong command must not delete states
        if ranks()[0] == 0:
            for old in states(run.cfg.out):
                remove_state(old)
        barrier()
    found = states(run.cfg.out)
    if found:
        step = check_state(found[-1], run.metadata())
        verify_state(found[-1])
        load_tensors(found[-1], run.tensors())
        run.step = step


def export(run):
    """Write the averaged model of all processes, which leave their group. -> its path: packed.pt, or full.pt"""
    cfg = run.cfg
    path = cfg.out / ("full.pt" if cfg.full_precision else "packed.pt")
    is_first = ranks()[0] == 0
    weights = {}
    for name, value in run.ema.module.named_parameters():
        value = full_tensor(value.detach())  # one at a time
        if is_first:
            weights[name] = value.cpu()
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_first:
        with torch.device("meta"):
            model = DiT(run.model.config)
        model.load_state_dict(weights, assign=True)
        save_checkpoint(path, model if cfg.full_precision else pack_model(model))
    return path


def main(argv=None):
    warnings.filterwarnings("ignore", module="PIL")  # odd images that can be read
    warnings.filterwarnings("ignore", module=r"torch\._inductor")  # rotate's complex numbers, which it does not compile
    warnings.filterwarnings("ignore", module=r"torch\.distributed")  # checkpoints of a single process
    flags = parse_args(argv)
    if flags.export:
        export_newest_state(flags.out)
        return
    init_distributed(flags.device)
    cfg, model_config, init_state = make_config(flags)
    with locked(cfg.out):
        run = setup(cfg, model_config, init_state)
        del init_state  # gigabytes, of a large model
        train(run)
        finish(run)


def train(run):
    """All steps from the run's own to the last, or until a signal comes: then it ends the program."""
    cfg = run.cfg
    log = Log(run)
    stop = StopSignal()
    while run.step < cfg.steps and not stop.requested:
        stop.sync()  # before the step, so that all processes end after the same one
        batch = run.next_batch()  # a function of (seed, step)
        lr = set_learning_rate(run.optimizer, cfg, run.step)
        stats = train_step(run, batch, log.show_part)

        is_last = run.step == cfg.steps
        saving = run.step % cfg.save_every == 0 or is_last
        log.add(stats, lr)
        if run.step % 10 == 0 or saving:
            val_loss = validate(run) if saving and run.data.held_out else None
            log.write_row(lr, val_loss)
        if saving or stop.requested:
            save_state(cfg.out, run.tensors(), run.metadata())
        if cfg.grid and ranks()[1] == 1 and run.step % cfg.sample_every == 0 and not is_last:
            with log.paused_clock():
                draw_grid(run, run.ema.module, cfg.out / f"grid-{run.step:07d}.png")
                draw_curve(cfg.out)
    say("", sys.stdout)
    run.pool.shutdown(cancel_futures=True)
    stop.restore()
    if stop.requested:
        goes_on = "the same command without --fresh" if cfg.fresh else "the same command"
        say(f"stopped at step {run.step}, saved in {cfg.out}; {goes_on} goes on", sys.stdout)
        sys.exit(128 + (stop.received or signal.SIGTERM))


def finish(run):
    """Write packed.pt and the last sample grid."""
    cfg = run.cfg
    is_first = ranks()[0] == 0
    path = export(run)
    if is_first:
        fp32_mb = 4 * sum(p.numel() for p in run.model.parameters()) / 1e6
        print(f"peak memory {peak_memory(cfg.device) / 1e9:.1f} GB")
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; in fp32 the weights would take {fp32_mb:.2f} MB")
        if cfg.grid:
            draw_grid(run, load_model(path, cfg.device), cfg.out / "grid.png")  # the picture comes from the file
            print(f"{cfg.out / 'grid.png'}: samples of {path.name}")
            draw_curve(cfg.out)
    leave_distributed()


if __name__ == "__main__":
    run_main(main)
