"""Train a ternary diffusion transformer.

    python train.py                                        the CPU demo: digits in minutes
    python train.py --data DIR --image-size 64             your images, one subfolder a class
    python train.py --size 600M --data DIR --vae VAE       the paper's model, on latents
    torchrun --nproc-per-node=8 train.py --size 4.2B ...   many GPUs
    python train.py --init FULL.pt                         ternary from full precision
    python train.py --out RUN                              go on with a run that was stopped

    1. train, train_step        the loop
    2. load_image, draw_batch   the way of a picture: folder -> list -> cache -> batch
    3. make_optimizer           weight decay, average, learning rate
                                Skip the rest on first reading:
    4. TrainConfig, setup       flags, the sizes' recipes; what a resumed run may change
    5. shard_model              many processes, and their memory (FSDP2)
    6. save_state               what a state holds; packing and export
    7. Log, validate            log.csv, images held out, grids, signals
    8. init_from                --init
    9. digits                   the embedded digits

Sections 1 to 3 use helpers: generator, Progress, load_vae and from_uint8 are in sample.py; ranks,
barrier, all_sum and full_tensor in section 5 do nothing where there is one process.
"""

import argparse
import colorsys
import errno
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sample import DEVICES, MAX_SEED, Progress, cpu_has, decode, draw, find_checkpoint, from_uint8
from sample import generator, load_vae, number, require_same, run_main, save_grid, to_uint8
from sample import torchrun
from terdit import NUM_TIMESTEPS, SIZES, TERNARY_EPS, Config, DiT
from terdit import PackedTernaryLinear, TernaryLinear, atomic_write, diffusion_of, error_line
from terdit import first_line, load_model, pack_model, read_checkpoint, save_checkpoint, ternarize
from terdit import unpack_ternary

# --------------------------------------------------------------------------------------------------
# 1. The loop: `train` is all steps, `train_step` one update


class Run:
    """What a step of training reads and changes."""

    def __init__(self, settings, data, model, ema):
        self.settings = settings  # TrainConfig
        self.data = data
        self.model = model
        self.ema = ema  # the averaged model: what is validated and exported
        self.optimizer = make_optimizer(model, settings)
        self.diffusion = diffusion_of(model.config)
        self.step = 0  # steps that are done
        self.stats = None  # StepStats of the last one
        self.old_states = []  # with --fresh: the first save removes them

    @property
    def model_path(self):
        name = "packed.pt" if self.model.config.ternary else "full.pt"
        return Path(self.settings.out) / name


def train(run):
    """All steps from run.step to settings.steps, or until a signal comes."""
    settings = run.settings
    log = Log(run)
    progress = Progress((settings.steps - run.step) * settings.batch)
    stop = StopSignal()
    stopped = False
    pool = ThreadPoolExecutor(1)
    upcoming = pool.submit(draw_batch, run, run.step)
    while run.step < settings.steps and not stopped:
        start = time.monotonic()
        batch = upcoming.result()  # a function of (seed, step)
        upcoming = pool.submit(draw_batch, run, run.step + 1)  # the next, during this step
        lr = set_learning_rate(run.optimizer, settings, run.step)
        run.stats = train_step(run, batch, progress)
        run.step += 1
        stopped = stop.requested()
        is_last = run.step == settings.steps
        saving = is_last or run.step % settings.save_every == 0
        log.add(run.stats, lr, time.monotonic() - start, saving)
        if saving or stopped:
            save_state(run)
        if saving and settings.grid and ranks()[0] == 0:
            draw_grid(run, "grid.png" if is_last else f"grid-{run.step:07d}.png")
    if stopped and run.step < settings.steps:
        print(f"stopped at step {run.step}; python train.py --out {settings.out} goes on")
        sys.exit(128 + (stop.received or signal.SIGTERM))
    if ranks()[0] == 0:  # other processes may not see the disk of the first
        print(f"{run.model_path}: {run.model_path.stat().st_size / 1e6:.2f} MB, step {run.step}")


@dataclass
class StepStats:
    """Statistics of one step, over all processes."""

    loss: float  # mean over the batch
    grad_norm: float  # before clipping


def train_step(run, batch, progress):
    """One update of the weights and of their average -> StepStats."""
    settings = run.settings
    world = ranks()[1]
    loss = torch.zeros((), device=settings.device, dtype=torch.float64)
    what = f"step {run.step + 1}/{settings.steps}"
    if run.stats:
        what += f", loss {run.stats.loss:.4f}"
    # Parts of the batch take less memory. backward() adds up their gradients.
    for part in batch.split(settings.micro_batch, settings.device):
        part_loss = batch_losses(run, run.model, part).sum() / settings.batch
        # Each loss is divided by the whole batch, so gradients must be summed over processes. FSDP
        # averages them; `world` undoes this.
        (part_loss * world).backward()
        loss += part_loss.detach()
        progress.add(len(part.t) * world, what)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)).item()
    stats = StepStats(all_sum(loss).item(), grad_norm)
    if not math.isfinite(stats.loss + grad_norm):
        raise ValueError(
            f"step {run.step + 1}: loss {stats.loss}, gradient norm {grad_norm}, not finite: "
            f"stopped; {settings.out} keeps what was saved. Start over (--fresh) with a lower --lr"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_average(run)
    return stats


def batch_losses(run, model, batch):
    """The loss of each image (B,). With bf16, matmuls and SwiGLU are in it; weights, norms, the
    residual stream, the loss and AdamW stay in fp32."""
    settings = run.settings
    with torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bf16"):
        terms = run.diffusion.training_losses(model, batch.x0, batch.t, batch.y, batch.noise)
    return terms["loss"]


# --------------------------------------------------------------------------------------------------
# 2. The way of a picture: folder -> list -> cache -> batch
#
# A first reading may begin at load_image: before it, images are listed, cached and held out.


def list_images(folder, out=None):
    """-> names of the classes, and [[path within the folder, label], ...].

    A subfolder with images is a class. A folder is read once. Links are followed after the real
    folders, so an image belongs to its real class. `out`, the run folder, is left out: it holds
    grids. ValueError, OSError: no data set is found.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    seen = {out}
    folders = [folder]
    links = []  # depth of the folder that a link leads to, the link
    images = []  # path within the folder, name of its class
    broken = []  # classes of links that lead to nothing
    n_unused = 0
    while folders or links:
        if folders:
            here = folders.pop()
        else:
            links.sort()
            _, here = links.pop()  # to the innermost folder first: it knows the class best
        if here.resolve() in seen:
            print(f"{here} is not looked at again")
            continue
        seen.add(here.resolve())
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            path = Path(entry.path)
            inside = path.relative_to(folder).parts
            in_class = len(inside) > 1
            is_image = path.suffix.lower() in Image.registered_extensions()
            is_link = entry.is_symlink()
            if entry.name.startswith(".") or entry.name in ("__MACOSX", "@eaDir"):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif is_link and os.path.isdir(path):
                links.append((len(path.resolve().parts), path))
            elif is_link and not os.path.exists(path) and is_image == in_class:
                broken.append(inside[0])  # an image of a class, or a whole class
            elif is_image and in_class and entry.is_file():
                images.append([os.path.join(*inside), inside[0]])
            else:
                n_unused += 1
    names = sorted({name for _, name in images})
    lost = sorted(set(broken).difference(names))
    if lost:
        raise ValueError(f"--data {folder}: all images of {lost!r:.99} are links to nothing")
    if not images:
        raise ValueError(f"--data {folder}: expected a subfolder of images a class, found none")
    inner = {path.split(os.sep)[1] for path, _ in images}
    if all(path.count(os.sep) > 1 for path, _ in images) and inner != {"images"}:
        raise ValueError(
            f"--data {folder}: all images lie one folder deeper: name the folder that holds the "
            f"classes, such as {folder / names[0]}"
        )
    without = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    without = [name for name in without if name not in names and name[0] != "."]
    if without:
        print(f"{folder}: no images of their own are in {without!r:.200}")
    if n_unused or broken:
        print(
            f"{folder}: {n_unused} files are not used (Pillow cannot read such files, or they are "
            f"in no class's folder), {len(broken)} links lead to nothing"
        )
    labels = {name: label for label, name in enumerate(names)}
    return names, sorted([path, labels[name]] for path, name in images)


def cache_folder(settings):
    """The folder of Rows, where images are as the model reads them. --data itself may be one."""
    if Path(settings.data, "x.npy").is_file():
        return Path(settings.data)
    kind = "latents" if settings.vae else "images"
    return Path(settings.out) / f"{kind}-{settings.image_size}"


def open_cache(settings, base):
    """-> Rows of --data. Where there are none yet, list the images and reserve disk space. (Several
    machines must not fill one cache over a network: let one do so first.)"""
    folder = cache_folder(settings)
    size = settings.image_size
    if ranks()[0] == 0 and not (folder / "header.json").is_file():
        vae = load_vae(settings.vae, settings.device) if settings.vae else None
        row = encode(vae, np.zeros((1, 3, size, size), np.uint8))[0]  # a black image's
        latent = torch.from_numpy(row[:1]).float().to(settings.device)
        pixels = decode(vae, latent, 1.0).shape[-1]
        if pixels != size:
            raise ValueError(f"--image-size {size}: the VAE gives back {pixels} pixels")
        replace(base, in_channels=row.shape[1], input_size=row.shape[2])  # does it fit the model?
        source = Path(settings.data).resolve()
        names, files = list_images(source, Path(settings.out).resolve())
        header = dict(
            vae=settings.vae,
            image_size=size,
            source=str(source),
            latent_scale=vae.config.scaling_factor if vae else 1.0,
            class_names=names,
            files=files,
        )
        create_rows(folder, header, len(files), row.shape, row.dtype)
    barrier()
    return Rows(folder)


MISSING, THERE, UNUSABLE = range(3)  # status of a row


def create_rows(folder, header, n, shape, dtype):
    """Make a folder of Rows. header.json comes last: a folder without it does not count."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "x.npy"
    try:
        np.lib.format.open_memmap(path, "w+", dtype, (n, *shape))
        with open(path, "r+b") as file, suppress(AttributeError):  # macOS has no posix_fallocate
            # Otherwise a full disk would kill the process when it writes a mapped page.
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as e:
        path.unlink(missing_ok=True)  # others may need the space that it has taken
        megabytes = n * math.prod(shape) * np.dtype(dtype).itemsize / 1e6
        raise OSError(f"{path} needs {megabytes:,.0f} MB ({first_line(e)})") from None
    np.save(folder / "status.npy", np.full(n, MISSING, np.uint8))
    atomic_write(folder / "header.json", lambda file: file.write(json.dumps(header).encode()))


class Rows:
    """A cache of images. x (n, ...) and status (n,) are mapped into memory."""

    def __init__(self, folder):
        self.folder = folder
        mode = "r+" if os.access(folder / "x.npy", os.W_OK) else "r"  # it may be someone else's
        try:
            self.header = json.loads((folder / "header.json").read_text())
            np.load(folder / "x.npy", mmap_mode="r")  # mode r+ would lengthen a file cut short
            self.x = np.load(folder / "x.npy", mmap_mode=mode)
            self.status = np.load(folder / "status.npy", mmap_mode=mode)
            if not len(self.x) == len(self.status) == len(self.header["files"]):
                raise ValueError("its parts do not belong together")
        except (ValueError, EOFError, FileNotFoundError, LookupError, TypeError) as e:
            reason = first_line(e)
            raise ValueError(f"{folder} is damaged ({reason}); a cache may be deleted") from None

    def missing(self, size):
        """Numbers of the rows that are missing, in parts that start at multiples of `size`."""
        parts = np.split(np.arange(len(self.status)), range(size, len(self.status), size))
        return [part for part in parts if (self.status[part] == MISSING).any()]

    def put(self, index, rows, status):
        self.x[index] = rows
        self.x.flush()  # the rows are on the disk before their status says so
        self.status[index] = status


def load_images(settings, rows):
    """Fill the cache -> Data.

    One image in 100, drawn by the seed, is held out, at most 256. Every class keeps at least one to
    learn from.
    """
    fill_cache(settings, rows)
    names = rows.header["class_names"]
    labels = np.array([label for _, label in rows.header["files"]])
    good = np.flatnonzero(rows.status == THERE)
    n_train = np.bincount(labels[good], minlength=len(names))  # of each class
    for name, n in zip(names, n_train):
        if n == 0:
            raise ValueError(f"no image of {name!r} can be read; once mended, delete {rows.folder}")
    counts = dict(zip(names, n_train.tolist()))
    print(
        f"{len(good)} images of {len(names)} classes, {counts!r:.200}, "
        f"{len(labels) - len(good)} left out, from {rows.folder}: delete it to read them again"
    )
    held_out = []
    for i in good[torch.randperm(len(good), generator=generator(settings.seed, 2)).numpy()]:
        if len(held_out) < min(256, len(good) // 100) and n_train[labels[i]] > 1:
            n_train[labels[i]] -= 1
            held_out.append(i)
    train_index = torch.from_numpy(np.setdiff1d(good, held_out))
    data = Data(rows.x, labels, train_index, settings.flip)
    if held_out:
        no_flip = torch.zeros(len(held_out), dtype=torch.bool)
        data.held_out = data.read(torch.tensor(held_out), no_flip)
    return data


PART = 16  # images that are read at a time


def fill_cache(settings, rows):
    """Put each image through `encode`, once. Processes share the work, a stopped run goes on."""
    rank, world = ranks()
    size = settings.image_size
    is_own = rows.folder != Path(settings.data)
    source = Path(settings.data if is_own else rows.header["source"])  # --data may have moved
    if not source.is_dir():
        print(f"{source} is not there: its images are taken from {rows.folder}")
    parts = rows.missing(PART)
    barrier()  # nobody fills a row before all have seen what is missing
    own = parts[rank::world]
    if own and not rows.x.flags.writeable:
        raise ValueError(f"{rows.folder} lacks images, and may not be written")
    vae = load_vae(settings.vae, settings.device) if own and settings.vae else None
    progress = Progress(sum(len(part) for part in own))
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for part in own:
            paths = [source / rows.header["files"][i][0] for i in part]
            are_gone = not any(path.exists() for path in paths)
            if are_gone and len(paths) > 1:
                raise FileNotFoundError(
                    f"{paths[0]} and the {len(paths) - 1} after it are gone. Is the disk there? If "
                    f"they were deleted, delete {rows.folder} too: they are then listed anew"
                )
            images = list(pool.map(read_image, paths, [size] * len(part)))
            status = [UNUSABLE if image is None else THERE for image in images]
            black = np.zeros((3, size, size), np.uint8)
            images = [black if image is None else image for image in images]
            rows.put(part, encode(vae, np.stack(images)), status)
            progress.add(len(part), "reading images")
    barrier()


def check_16_bits(image):
    """Numbers of grey images in mode I or F must go from 0, black, to 65535, white. ValueError."""
    is_usual = image.format == "PPM" and image.mode != "F"
    if image.format == "PNG":
        is_usual = "transparency" not in image.info
    elif image.format == "TIFF" and image.mode.startswith("I;16"):
        bits, photometric = image.tag_v2.get(258), image.tag_v2.get(262)
        is_usual = bits == (16,) and photometric == 1
    if not is_usual:
        raise ValueError(f"grey of mode {image.mode} in {image.format}: save it with 8 bits")


def read_image(path, size):
    """load_image, or None for a file that is no picture, which is named. MemoryError, OSError: the
    picture may be good."""
    try:
        return load_image(path, size)
    except MemoryError:
        raise
    except Exception as e:  # Pillow's decoders raise whatever they like on damaged files
        # An error with a number is the system's. But EINVAL is a damaged picture's: a wrong offset.
        is_deleted = isinstance(e, FileNotFoundError) and path.parent.is_dir()
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL) and not is_deleted:
            raise
        # Too little memory looks like damage: then this raises MemoryError.
        np.empty(1 << 30, np.uint8)
        sys.stderr.write(f"{path}: left out ({type(e).__name__}: {first_line(e)})\n")
        return None


def load_image(path, size):
    """What Pillow reads -> uint8 (3, size, size), always RGB: upright, on white, centre-cropped as
    ADM. fill_cache calls read_image, which calls this, and then encode."""
    with Image.open(path) as image:
        if image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))  # decode no larger than needed
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except MemoryError:
            raise
        except Exception:  # Pillow raises whatever it likes on broken EXIF data
            pass
        if image.mode.startswith(("I", "F")):
            check_16_bits(image)
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.reduce(2)
    # fit() crops before it resizes: to enlarge all of 1 x 100,000 pixels would take gigabytes.
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def encode(vae, images):
    """Images (n, 3, H, W) uint8 -> rows of the cache: (n, 1, 3, H, W), the images themselves.

    With a VAE: scaled latents, plain and mirrored, (n, 2, C, h, w) fp16, because a mirrored latent
    does not decode to the mirrored image. We take the posterior's mean; DiT draws a sample. The
    cache's header names the VAE and its scale.
    """
    if vae is None:
        return images[:, None]
    both = np.stack([images, images[..., ::-1]], axis=1)  # (n, 2, 3, H, W)
    x = from_uint8(torch.from_numpy(both).to(vae.device)).flatten(0, 1)
    z = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
    if not z.isfinite().all():
        raise ValueError(f"the VAE {vae.config._name_or_path} outputs infinities or NaN")
    return z.unflatten(0, (len(images), 2)).half().cpu().numpy()


@dataclass
class Data:
    """x (n, 1, 3, H, W) uint8 images or (n, 2, C, h, w) fp16 latents, and their labels (n,)."""

    x: np.ndarray  # in memory, or mapped
    labels: np.ndarray
    train_index: torch.Tensor  # the images that are learned from
    mirror: bool  # flip half of the images
    held_out: tuple | None = None  # x0 (m, C, H, W) and labels (m,) for validation

    def read(self, index, flip):
        """index (m,), flip (m,) bool -> x0 (m, C, H, W) fp32, labels (m,) int64."""
        labels = torch.from_numpy(self.labels[index.numpy()])
        is_latent = self.x.dtype != np.uint8
        if is_latent:
            return torch.from_numpy(self.x[index.numpy(), flip.long().numpy()]).float(), labels
        x0 = from_uint8(torch.from_numpy(self.x[index.numpy(), 0]))
        return torch.where(flip[:, None, None, None], x0.flip(-1), x0), labels


class Batch(NamedTuple):
    x0: torch.Tensor  # (B, C, H, W) in [-1, 1], or latents
    t: torch.Tensor  # (B,) int64
    y: torch.Tensor  # (B,) int64; one in ten is dropped: num_classes, the null label of guidance
    noise: torch.Tensor  # (B, C, H, W)

    def split(self, n, device):
        """Micro-batches of n images, on the device."""
        for first in range(0, len(self.t), n):
            yield Batch(*[z[first : first + n].to(device) for z in self])


def draw_batch(run, step):
    """What step number `step` sees -> Batch.

    Everything random is a function of (seed, step), so no random state is saved. A resumed run
    equals an uninterrupted one, on one CPU process to the bit. Every process draws the numbers of
    the whole batch, and keeps its slice; more processes, or other micro-batches, only change the
    order in which numbers are added. --batch decides what a step sees, so it may not change in a
    run.
    """
    data = run.data
    seed = run.settings.seed
    n = run.settings.batch
    n_images = len(data.train_index)
    rng = generator(seed, 1, step)
    places = []
    for i in range(step * n, (step + 1) * n):  # counted from the start of training
        epoch = epoch_order(seed, i // n_images, n_images)
        places.append(int(epoch[i % n_images]))
    index = data.train_index[places]
    flip = torch.zeros(n, dtype=torch.bool)
    if data.mirror:
        flip = torch.rand(n, generator=rng) < 0.5
    drop = torch.rand(n, generator=rng) < run.model.config.class_dropout_prob
    t = draw_timesteps(n, run.diffusion, rng)
    noise = torch.randn((n, *data.x.shape[2:]), generator=rng)
    rank, world = ranks()
    index, flip, drop, t, noise = [z.chunk(world)[rank] for z in (index, flip, drop, t, noise)]
    x0, labels = data.read(index, flip)
    y = torch.where(drop, run.model.config.num_classes, labels)
    return Batch(x0, t, y, noise)


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, 0, epoch))


def draw_timesteps(n, diffusion, rng):
    """t (n,). For eps: uniform, as in the paper.

    For v: logSNR is drawn from a normal distribution, with mean -2 and standard deviation 2.5; one
    timestep in twenty is drawn uniformly. Most fall between t = 200 and 800, where a picture's
    layout is decided: a short training has no time for nearly clean images, or nearly pure noise.
    The loss is not divided by this density: the middle counts more than in DDPM's average over t.

    Stratified sampling: image i of the batch draws a quantile between i / n and (i + 1) / n, so
    each batch has all noise levels. ndtri, the inverse of the normal distribution function, turns
    it into a normal number.
    """
    if diffusion.prediction == "eps":
        return torch.randint(NUM_TIMESTEPS, (n,), generator=rng)
    quantile = (torch.arange(n) + torch.rand(n, generator=rng)) / n  # spread over the batch
    normal = torch.special.ndtri(quantile.double().clamp(1e-6, 1 - 1e-6))
    t = find_timesteps(-2 + 2.5 * normal, diffusion)
    is_uniform = torch.rand(n, generator=rng) < 0.05
    return torch.where(is_uniform, torch.randint(NUM_TIMESTEPS, (n,), generator=rng), t)


def find_timesteps(log_snr, diffusion):
    """For each log_snr (n,) the largest t whose log(acp / (1 - acp)) is still at least that; 0 if
    there is none -> (n,)

    >>> log_snr = torch.tensor([10.0, 3.0, -2.0, -7.0, -12.0], dtype=torch.float64)
    >>> find_timesteps(log_snr, diffusion_of(Config())).tolist()
    [0, 64, 455, 830, 999]
    """
    acp = torch.from_numpy(diffusion.alphas_cumprod)  # (1000,), it falls
    table = torch.log(acp / (1 - acp))
    n_at_least = (table >= log_snr[:, None]).sum(1)  # these are the first ones
    return (n_at_least - 1).clamp(min=0)


# --------------------------------------------------------------------------------------------------
# 3. Optimizer, average, learning rate


def make_optimizer(model, settings):
    """AdamW. Alphas learn at a fifth of the rate, because one of them scales a whole layer. (In
    1,500 steps of tiny the full rate does as well: tests/RESULTS.md.)

    Weight decay is for the blocks' matrices. It shrinks weights and gamma alike, so alone it flips
    no code. But Adam's steps stay at about lr, so they grow against gamma. The codes 0 are gamma
    wide: with lr = 0.001 and gamma = 0.05 a weight crosses them in 50 steps of one sign, and in 25
    once gamma has decayed to 0.025. So with decay, codes go on flipping until the rate falls.
    """
    alphas = dict(params=[], lr_scale=0.2, weight_decay=0.0)
    matrices = dict(params=[], lr_scale=1.0, weight_decay=settings.weight_decay)
    others = dict(params=[], lr_scale=1.0, weight_decay=0.0)
    for name, p in model.named_parameters():
        group = others
        if name.endswith("alphas"):
            group = alphas
        elif name.startswith("layers.") and p.ndim == 2:
            group = matrices
        group["params"].append(p)
    groups = [group for group in (others, matrices, alphas) if group["params"]]
    betas = (0.9, settings.beta2)
    optimizer = torch.optim.AdamW(groups, settings.lr, betas, fused=True)
    for p in model.parameters():
        # AdamW makes this state at its first step. A resumed run needs it now, to load into.
        zeros = torch.zeros_like(p.detach())
        step = torch.zeros((), device=p.device)
        optimizer.state[p] = dict(step=step, exp_avg=zeros, exp_avg_sq=zeros.clone())
    return optimizer


@torch.no_grad()
def update_average(run):
    """Update the moving average of all parameters, which save_state packs and exports.

    It averages out the noise of single steps. Here that gains little, or loses in very short runs,
    since the rate falls to 1% anyway (tests/RESULTS.md). Its decay grows to ema_decay, 0.995 in
    the demo: with all of it from the start, a short run would export mostly random weights.
    """
    decay = min(run.settings.ema_decay, (1 + run.step) / (10 + run.step))
    if run.step == 0:
        decay = 0.0  # the first average is a copy
    for averaged, p in zip(run.ema.parameters(), run.model.parameters()):
        averaged.lerp_(p, 1 - decay)


def set_learning_rate(optimizer, settings, step):
    """The rate warms up, then falls along a cosine to 1%: codes settle only when it is small. The
    demo's rate, warm-up and steps are in DEMO, section 4."""
    warmup = max(1, min(settings.warmup, settings.steps // 10))
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    lr = settings.lr * min(1, (step + 1) / warmup) * cosine
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


# --------------------------------------------------------------------------------------------------
# 4. Settings, and the start of a run. Skip this and the rest on first reading


def setting(default, help, **options):
    """A field of TrainConfig, and the flag of the same name; options are argparse's."""
    return field(default=default, metadata=dict(help=help, options=options))


COUNT = number(int, 1)
AT_LEAST_0 = number(float, 0)
SHARE = number(float, 0, 1)
ALPHA_STARTS = ["absmean", "random"]
DTYPES = ["bf16", "fp32"]


@dataclass
class TrainConfig:
    """What a run is trained with. Each field is a flag. These are the paper's sizes' values.

    What belongs to the model is a field of Config, too: model_config copies it. If --init keeps
    the checkpoint's, new_settings must.
    """

    size: str = setting("tiny", "shape of the model, and its recipe", choices=list(SIZES))
    data: str = setting(None, "folder of images, a subfolder a class; default: embedded digits")
    vae: str = setting(None, "train on latents of this VAE, a diffusers model or folder")
    image_size: int = setting(None, "default 24; from S on 32; 256 with --vae", type=COUNT)
    flip: bool = setting(True, "mirror half of the images of --data")
    init: str = setting(None, "start from packed.pt, full.pt, a run folder or a released folder")
    full_precision: bool = setting(False, "no ternary weights: the paper's baseline")
    alpha_start: str = setting("absmean", "alphas: mean|W|, or N(0, 1)", choices=ALPHA_STARTS)
    adaln_norm: bool = setting(True, "the paper's RMS Norm after adaLN")
    qk_norm: bool = setting(True, "LayerNorm on queries and keys, so that bf16 is stable")

    batch: int = setting(256, "images a step, of all processes together", type=COUNT)
    micro_batch: int = setting(16, "at a time; CPUs 4 from S on; large cards take 32", type=COUNT)
    steps: int = setting(1_750_000, "updates of the weights", type=COUNT)
    lr: float = setting(1e-4, "Large-DiT's rate, which nobody has verified here", type=AT_LEAST_0)
    warmup: int = setting(1000, "steps, but at most a tenth of the run", type=number(int, 0))
    beta2: float = setting(0.999, "AdamW's second beta", type=SHARE)
    weight_decay: float = setting(0.0, "of the blocks' matrices", type=AT_LEAST_0)
    ema_decay: float = setting(0.9999, "of the average, which is what is exported", type=SHARE)
    seed: int = setting(0, "of everything random", type=number(int, 0, MAX_SEED))

    out: str = setting(None, "run folder; default runs/SIZE, with --init runs/fine-tuned")
    fresh: bool = setting(False, "start over where the run folder holds a state")
    save_every: int = setting(1000, "steps; the last two states are kept", type=COUNT)
    grid: int = setting(0, "images to draw at every save; 0 with --vae", type=number(int, 0))
    compile: bool = setting(False, "torch.compile the blocks: faster after half a minute")
    device: str = setting(DEVICES[0], "what computes", choices=DEVICES)
    dtype: str = setting(None, "of matmuls; default bf16 where hardware has it", choices=DTYPES)


# What a size changes. The demo's are tuned for minutes on two cores.
DEMO = dict(
    batch=16,
    steps=4500,
    lr=4e-3,
    warmup=50,
    beta2=0.99,
    weight_decay=0.3,
    ema_decay=0.995,
    qk_norm=False,
    grid=40,
)
RECIPES = {
    "tiny": DEMO,
    "small": DEMO,
    "4.2B": dict(batch=512, steps=1_180_000, micro_batch=8),
}


def parse_args(argv=None):
    """-> dict of the settings that the command names, with `out`. Paths are absolute."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("    1. ")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in fields(TrainConfig):
        options = dict(type=f.type, default=argparse.SUPPRESS, help=f.metadata["help"])
        if f.type is bool:
            options = options | dict(action=argparse.BooleanOptionalAction)
            del options["type"]
        if f.default is not None:
            recipes = [f"; {size} {r[f.name]}" for size, r in RECIPES.items() if f.name in r]
            options["help"] += f" (default {f.default}{''.join(recipes)})"
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, **options | f.metadata["options"])
    given = vars(parser.parse_args(argv))
    for flag, name in (("--size", "size"), ("--alpha-start", "alpha_start")):
        if "init" in given and name in given:
            parser.error(f"--init starts from the checkpoint: leave out {flag}")
    if "init" in given:
        given.setdefault("out", "runs/fine-tuned")
    given.setdefault("out", f"runs/{given.get('size', 'tiny')}")
    for name in ("data", "init", "vae"):
        if name in given and (name != "vae" or os.path.isdir(given[name])):
            given[name] = os.path.abspath(given[name])
    return given


def main(argv=None):
    # They warn of odd images that can be read, of complex numbers (not compiled), of FSDP's hooks.
    warnings.filterwarnings("ignore", module=r"PIL|torch\._inductor|torch\.distributed")
    given = parse_args(argv)
    init_distributed(given.get("device", DEVICES[0]))
    try:
        with locked(Path(given["out"])):
            train(setup(given))
    except RuntimeError as e:
        if "Connection closed by peer" not in str(e):  # gloo's words
            raise
        sys.exit("stopped: another process has ended")
    end_distributed()


def setup(given):
    """Everything before the first step -> Run, filled from the newest state if there is one."""
    rank, world = ranks()
    out = given["out"]
    state = None if given.get("fresh") else read_state(out)
    init = None
    if not state and not given.get("fresh"):
        refuse_other_runs(out, given)
    if state:
        try:
            settings = resumed_settings(state["settings"], given)
            config = replace(Config(**state["config"]), vae=settings.vae)
        except TypeError as e:  # a setting that a newer train.py has
            raise ValueError(f"{out}: its state is of another train.py ({e})") from None
        cache = open_cache(settings, config) if settings.data else None
        if cache:
            theirs = dict(cache.header, images=len(cache.status), shape=cache.x.shape[2:])
            shape = (config.in_channels, config.input_size, config.input_size)
            ours = dict(images=state["images"], class_names=config.class_names, shape=shape)
            require_same(cache.folder, theirs, ours, "delete it, if the run has other images")
    else:
        init, base = load_init(given)
        settings = new_settings(given, base)
        cache = open_cache(settings, base) if settings.data else None
        if cache:
            ours = dict(image_size=settings.image_size, vae=settings.vae)
            if cache.folder != Path(settings.data):
                ours["source"] = str(Path(settings.data).resolve())
            require_same(cache.folder, cache.header, ours, "take another --out, or delete it")
        config = model_config(settings, base, cache)
    if settings.batch % world:
        raise ValueError(f"--batch {settings.batch} does not split over {world} processes")
    if rank == 0:
        warn_of_memory(config, settings)
    torch.manual_seed(settings.seed)
    with torch.device("cpu" if rank == 0 else "meta"):  # the others get their weights from rank 0
        model = DiT(config)
    if init is not None:
        init_from(model, init, settings.init)
        del init  # gigabytes, of a large model
    data = load_images(settings, cache) if cache else load_digits(settings)
    ema = deepcopy(model)
    shard_model(model, settings.device)
    shard_model(ema, settings.device)
    if settings.compile and can_compile(settings.device):
        for block in model.layers:
            block.compile(dynamic=False)
    run = Run(settings, data, model, ema)
    if state:
        fill_tensors(run_tensors(run), state["tensors"])
        run.step = state["step"]
    if settings.fresh:
        run.old_states = states(out)
    print(
        f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
        f"{len(data.train_index)} images of {settings.image_size} pixels\n"
        f"steps {run.step}-{settings.steps} of {settings.batch} images, "
        f"{settings.micro_batch} at a time, on {world} x {settings.device} {settings.dtype}",
        flush=True,
    )
    return run


def load_init(given):
    """-> the model of --init, on rank 0 alone, and the Config that a new run begins with."""
    if "init" not in given:
        size = given.get("size", "tiny")
        return None, Config(size=size, **SIZES[size])
    init = None
    if ranks()[0] == 0:
        path = find_checkpoint(given["init"])
        print(f"--init: {path}")
        init = load_model(path)
    return init, from_rank_0(init.config if init else None)


def refuse_other_runs(out, given):
    """ValueError: a new run would begin in a folder that holds another run's work."""
    for name in ("packed.pt", "full.pt"):
        if Path(out, name).is_file():
            raise ValueError(f"{out} holds {name} but no state: take another --out, or --fresh")
    if "data" not in given and list(Path(out).glob("*/header.json")):
        raise ValueError(f"{out} holds images but no state yet: repeat its whole command")


def new_settings(given, base):
    """-> TrainConfig of a new run. base: the Config of its size, or of the checkpoint of --init."""
    implied = dict(size=base.size, image_size=base.input_size)
    if "init" in given:
        implied["qk_norm"] = base.qk_norm
        if base.ternary:  # else init_from adds the norm
            implied["adaln_norm"] = base.adaln_norm
    if "data" in given and Path(given["data"], "x.npy").is_file():  # a cache
        header = Rows(Path(given["data"])).header
        implied |= dict(vae=header["vae"], image_size=header["image_size"])
    elif "vae" in given:
        implied["image_size"] = 256
    if given.get("vae", implied.get("vae")):
        implied["grid"] = 0  # a VAE takes seconds to decode an image on a CPU
    multiplies_bf16 = cpu_has("avx512_bf16", "amx_bf16")
    if given.get("device", DEVICES[0]) == "cuda":
        multiplies_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif base.size not in ("tiny", "small"):
        implied["micro_batch"] = 4  # so that the progress line moves every few seconds
    implied["dtype"] = "bf16" if multiplies_bf16 else "fp32"
    settings = TrainConfig(**RECIPES.get(base.size, {}) | implied | given)
    if settings.vae and not settings.data:
        raise ValueError("--vae needs --data")
    if base.vae and not settings.data:
        raise ValueError(f"{given['init']} works on latents of {base.vae}: add --data and --vae")
    return settings


NOTED = {
    "steps": "the learning rate follows",
    "dtype": "products round differently",
    "micro_batch": "sums round differently",
}
MAY_CHANGE = {"save_every", "grid", "compile", "device", "out", "fresh", "init", *NOTED}


def resumed_settings(saved, given):
    """-> TrainConfig of a run that goes on: the state's, with what the command may change:
    MAY_CHANGE, and where data or vae lie. ValueError: another difference."""
    defaults = asdict(TrainConfig()) | RECIPES.get(saved["size"], {})
    saved = defaults | saved  # its file may be older than a setting
    fixed = given.keys() - MAY_CHANGE
    for name in given.keys() & {"data", "vae"}:
        if saved[name] is not None:  # a folder may move
            fixed.discard(name)
    advice = "leave it out, or take another --out, or --fresh"
    require_same(given["out"], saved, {name: given[name] for name in fixed}, advice)
    settings = TrainConfig(**saved | dict(fresh=False, device=DEVICES[0]) | given)
    if "init" in given:
        print(f"note: {given['out']} goes on from its own state, --init is not read again")
    for name, consequence in NOTED.items():
        before, now = saved[name], getattr(settings, name)
        if before != now:
            print(f"note: {name} was {before}, now it is {now}: {consequence}")
    return settings


def model_config(settings, base, cache):
    """The Config of the model: `base` with the classes and the shape of the images."""
    header = dict(class_names=[str(i) for i in range(10)])  # of the digits
    channels = 3
    input_size = settings.image_size
    if cache:
        header = cache.header
        channels, input_size, _ = cache.x.shape[2:]
    names = header["class_names"]
    ternary = not settings.full_precision
    return replace(
        base,
        ternary=ternary,
        alpha_start=settings.alpha_start,
        adaln_norm=settings.adaln_norm and ternary,
        qk_norm=settings.qk_norm,
        in_channels=channels,
        input_size=input_size,
        num_classes=len(names),
        class_names=names,
        vae=header.get("vae"),
        latent_scale=header.get("latent_scale", 1.0),
    )


def can_compile(device):
    """Try torch.compile on something small: it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.nn.GELU())(torch.ones(1024, device=device))
        return True
    except Exception as e:
        print(f"--compile does not work here ({error_line(e)}): training without it, slower")
        return False


def warn_of_memory(config, settings):
    """A run on a CPU that does not fit is killed without a word.

    Weights, gradients, AdamW's two moments and averages are 20 bytes a parameter. With activations
    600M took 18.1 GB at four images at a time: 30 bytes.
    """
    meminfo = Path("/proc/meminfo")
    if settings.device != "cpu" or not meminfo.is_file():
        return
    with torch.device("meta"):
        needed = 30 * sum(p.numel() for p in DiT(config).parameters())
    free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    if needed > free:
        print(
            f"warning: this run takes about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; "
            "--micro-batch 1 takes less"
        )


# --------------------------------------------------------------------------------------------------
# 5. Many processes


def init_distributed(device):
    """Join the process group of a launcher (torchrun), if one started this process."""
    launch = torchrun()
    if launch.world == 1:
        return
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    sys.stderr.write(f"process {launch.rank} is waiting for {launch.world} processes at {place}\n")
    try:
        # Processes may wait for hours while one lists a million files, or fills a cache.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    except (RuntimeError, ValueError) as e:
        reason = first_line(e)
        raise ValueError(f"{launch.world} processes cannot meet at {place} ({reason})") from None


def end_distributed():
    """torch's own teardown sometimes aborts, and the launcher then kills the other processes."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


def ranks():
    """This process's number, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def from_rank_0(value):
    """The value that rank 0 has, on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def all_sum(x):
    """x, in place, summed over the processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def full_tensor(x):
    """A tensor whose parts lie on all processes -> the plain tensor, on each of them."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_model(model, device):
    """Move a model to its device. Each of n processes holds a part of it (FSDP2): 1/n of 20 bytes a
    parameter (see warn_of_memory), its own activations, and a block or two whole. backward()
    averages the gradients over them.

    Matrices are gathered whole, and in fp32: so mean|W| and the codes are those of packing.
    Gathered in bf16 (MixedPrecisionPolicy), some weights would round to other codes.
    """
    if not dist.is_initialized():
        return model.to(device)
    weights = model.state_dict()
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    model.to("meta")
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    fill_tensors(model.state_dict(), weights)
    return model


@torch.no_grad()
def fill_tensors(tensors, values):
    """Copy rank 0's `values` into tensors of the same names, sharded or not."""
    for name, tensor in tensors.items():
        if ranks()[0] == 0:
            value = values[name].to(tensor.device)
        else:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        elif dist.is_initialized():
            dist.broadcast(value, src=0)
        tensor.copy_(value)


@contextmanager
def locked(folder):
    """Make the folder, and keep other runs out of it. A killed run leaves no lock behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            if ranks()[0] == 0:  # of many processes the first one holds it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another run is at work there: wait, stop it, or take another --out"
            ) from None
        except OSError as e:  # some network disks know no locks
            print(f"warning: {folder} cannot be locked ({first_line(e)}): start one run there")
        yield


# --------------------------------------------------------------------------------------------------
# 6. The state of a run: one file, with everything that an exact resume needs

STATE = "terdit-state-5"


def states(out):
    """The states of a run, the newest last. Copies under other names are the user's."""
    found = {}
    for path in Path(out).glob("state-*.pt"):
        digits = path.name.removeprefix("state-").removesuffix(".pt")
        if digits.isdecimal() and path.name == f"state-{int(digits):07d}.pt" and path.is_file():
            found[int(digits)] = path
    return [found[step] for step in sorted(found)]


def run_tensors(run):
    """name -> tensor of all that a state holds: weights, averages, AdamW's moments and steps."""
    tensors = {}
    for (name, p), averaged in zip(run.model.named_parameters(), run.ema.parameters()):
        tensors[f"model.{name}"] = p.detach()
        tensors[f"ema.{name}"] = averaged.detach()
        for kind, value in run.optimizer.state[p].items():
            tensors[f"{kind}.{name}"] = value
    return tensors


def save_state(run):
    """Write the averaged model, then the state (run_tensors, and no random state: draw_batch needs
    none). The last two are kept. A run may go on with another number of processes.

    Each replaces the old file when it is whole (atomic_write). After a kill between the two, the
    run goes on from the older state to the same model. Tensors are gathered one by one, into rank
    0's memory. (A large model takes minutes: torchrun --shutdown-timeout 1800 leaves it the time
    after a stop.)
    """
    is_first = ranks()[0] == 0
    tensors = {}
    for name, value in run_tensors(run).items():
        value = full_tensor(value)
        if is_first:
            tensors[name] = value.cpu()
    if is_first:
        config = run.model.config
        out = Path(run.settings.out)
        with torch.device("meta"):
            model = DiT(config)
        averages = {name: tensors[f"ema.{name}"] for name, _ in model.named_parameters()}
        model.load_state_dict(averages, assign=True)
        # Fixed temporary names: the next save writes over what a kill has left.
        save_checkpoint(run.model_path, pack_model(model) if config.ternary else model, "model.tmp")
        if run.settings.fresh:  # one model file a folder
            other = "full.pt" if config.ternary else "packed.pt"
            (out / other).unlink(missing_ok=True)
        state = dict(
            format=STATE,
            step=run.step,
            settings=asdict(run.settings),
            config=asdict(config),
            images=len(run.data.labels),
            tensors=tensors,
        )
        path = out / f"state-{run.step:07d}.pt"
        atomic_write(path, lambda file: torch.save(state, file), "state.tmp")
        kept = [old for old in states(out) if old == path or old not in run.old_states]
        for old in set(states(out)).difference(kept[-2:]):
            old.unlink()
        run.old_states = []
    barrier()


def read_state(out):
    """The newest state of a run, or None. Rank 0 alone gets its tensors, mapped from the file."""
    state = None
    if ranks()[0] == 0 and states(out):
        path = states(out)[-1]
        expected = f"a state of this train.py (format {STATE!r})"
        advice = "If it is damaged, delete it to go on from the one before, or --fresh"
        try:
            state = read_checkpoint(path, expected, mmap=True)
        except ValueError as e:
            raise ValueError(f"{e}. {advice}") from None
        if state.get("format") != STATE:
            raise ValueError(f"{path}: not {expected}, but {state.get('format')!r}. {advice}")
    without_tensors = from_rank_0(state | dict(tensors=None) if state else None)
    return state or without_tensors


# --------------------------------------------------------------------------------------------------
# 7. Log, validation, grids, signals

FIELDS = "step loss val_loss lr grad_norm images_per_s zero flipped".split()  # filled by Log.add


class Log:
    """log.csv: a row every ten steps, and at every save. A resumed run removes rows past its step.

        loss, images_per_s   mean of the steps since the last row
        val_loss             of the averaged model on images held out, at all timesteps alike (see
                             validate): not to compare with loss, whose timesteps are drawn. Both
                             contain vb, if there are sigma channels
        lr, grad_norm        of the row's last step; the norm before clipping
        zero, flipped        share of codes that are 0; that changed in the last 100 steps, or
                             since the run went on
    """

    def __init__(self, run):
        self.run = run
        self.codes = sample_codes(run.model)
        self.stats = []  # of the steps since the last row
        self.seconds = 0.0  # that they took
        if ranks()[0] == 0:
            path = Path(run.settings.out) / "log.csv"
            rows = log_rows(path, run.step) if run.step and path.is_file() else []
            text = "\n".join([",".join(FIELDS), *rows]) + "\n"
            atomic_write(path, lambda file: file.write(text.encode()), "log.tmp")
            self.file = open(path, "a", buffering=1)

    def add(self, stats, lr, seconds, saving):
        """Note a step; every tenth one, and one that is saved, makes a row."""
        run = self.run
        self.stats.append(stats)
        self.seconds += seconds
        if run.step % 10 and not saving:
            return
        n = len(self.stats)
        row = dict(
            loss=sum(s.loss for s in self.stats) / n,
            lr=lr,
            grad_norm=stats.grad_norm,
            images_per_s=n * run.settings.batch / self.seconds,
        )
        if saving and run.data.held_out:
            row["val_loss"] = validate(run)
        if run.model.config.ternary and run.step % 100 == 0:
            before = self.codes
            self.codes = sample_codes(run.model)
            counts = [(self.codes == 0).sum(), (self.codes != before).sum(), len(self.codes)]
            counts = all_sum(torch.tensor(counts, device=run.settings.device))
            n_zero, n_flipped, n_codes = counts.tolist()
            row |= dict(zero=n_zero / n_codes, flipped=n_flipped / n_codes)
        self.stats = []
        self.seconds = 0.0
        if ranks()[0] == 0:
            texts = [str(run.step)]
            for field in FIELDS[1:]:
                texts.append(f"{row[field]:.6g}" if field in row else "")
            print(*texts, sep=",", file=self.file)


def log_rows(path, step):
    """The rows of log.csv up to this step. ValueError: another program has changed the file."""
    header, *rows = path.read_text(errors="replace").splitlines() or [""]
    steps = [row.split(",")[0] for row in rows]
    if header != ",".join(FIELDS) or not all(text.isdecimal() for text in steps):
        raise ValueError(
            f"{path} is not as train.py wrote it (was it saved by a spreadsheet?): move it away"
        )
    return [row for row, text in zip(rows, steps) if int(text) <= step]


def sample_codes(model):
    """The codes of one ternary weight in 17 of this process's part of the model, int8."""
    codes = [torch.zeros(0, dtype=torch.int8)]  # full precision has none
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            weight = module.weight.detach()
            gamma = full_tensor(weight.abs().mean()) + TERNARY_EPS  # of the whole matrix
            part = weight.to_local() if isinstance(weight, DTensor) else weight
            codes.append(ternarize(part.flatten()[::17], gamma).to(torch.int8).cpu())
    return torch.cat(codes)


@torch.no_grad()
def validate(run):
    """Loss of the averaged model on at most 4 batches of images held out, with the same noise and
    timesteps each time. Few images are seen several times, so that there are at least 64."""
    x0, y = [z[: 4 * run.settings.batch] for z in run.data.held_out]
    times = math.ceil(64 / len(y))
    x0 = x0.repeat(times, 1, 1, 1)
    y = y.repeat(times)
    t = (torch.arange(len(y)) + 0.5) * NUM_TIMESTEPS / len(y)  # in the middle of each part
    noise = torch.randn(x0.shape, generator=generator(run.settings.seed, 3))
    batch = Batch(x0, t.long(), y, noise)
    total = 0.0
    for part in batch.split(run.settings.micro_batch, run.settings.device):
        total += batch_losses(run, run.ema, part).sum().item()
    if ranks()[1] > 1:
        run.ema.reshard()  # FSDP keeps some of it whole after a forward pass
    return total / len(y)


def draw_grid(run, name):
    """Samples of the file that was just saved, of up to ten classes in turn."""
    settings = run.settings
    model = load_model(run.model_path, settings.device)
    vae = load_vae(model.config.vae, settings.device) if model.config.vae else None
    n_classes = min(10, model.config.num_classes)
    index = torch.arange(settings.grid)
    x = draw(model, vae, index % n_classes, index, seed=settings.seed)
    save_grid(x, min(settings.grid, n_classes), Path(settings.out) / name)


class StopSignal:
    """Ctrl-C, SIGTERM, a closed terminal: all processes look once a step whether one came."""

    def __init__(self):
        self.received = 0  # the signal's number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.received = number
        if ranks()[1] == 1:  # torchrun may send a signal more than once
            signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once
        with suppress(OSError):  # the terminal may be closed; print is not safe in a handler
            text = f"\n{signal.Signals(number).name}: ends after this step, and saves\n"
            os.write(2, text.encode())

    def requested(self):
        """Whether any of the processes has received a signal."""
        return all_sum(torch.tensor(self.received)).item() > 0


# --------------------------------------------------------------------------------------------------
# 8. --init

LABEL_TABLE = "y_embedder.embedding_table.weight"


def label_rows(theirs, ours):
    """For each row of our label table the row of theirs, or None: the classes are not the same.

    Released models name ImageNet's classes 0 to 999: its folders (n01440764, ...) in sorted order.
    """
    is_imagenet = len(ours) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in ours)
    if theirs != ours and is_imagenet:
        ours = [str(i) for i in range(1000)]
    if sorted(theirs or []) != sorted(ours):
        return None
    rows = [theirs.index(name) for name in ours]
    return [*rows, len(rows)]  # the last row is the null label


@torch.no_grad()
def init_from(model, source, path):
    """Copy the weights of the model `source`, loaded from `path`, into a fresh model.

    Codes become latent weights of +-|alpha| and 0, of which ternarize makes them again. From full
    precision alphas start at mean|W|, and the RMS Norm's gain keeps the size of the adaLN outputs.
    Other classes get a new label table. Optimizer, average and step start anew. ValueError: the
    models have other shapes; so have images of another size in a model with pos_embed.
    """
    ours = model.state_dict()
    theirs = source.state_dict()
    for name, module in source.named_modules():
        if isinstance(module, PackedTernaryLinear):
            theirs[f"{name}.weight"] = unpack_ternary(module.weight) * module.alphas.abs()
    rows = label_rows(source.config.class_names, model.config.class_names)
    if rows:
        theirs[LABEL_TABLE] = theirs[LABEL_TABLE][rows]
    else:
        print(f"new label table: {path} has {source.config.num_classes} other classes")
        theirs[LABEL_TABLE] = ours[LABEL_TABLE]
    # What adaLN gets: 50 timesteps, with the mean of the labels.
    t = torch.linspace(0, NUM_TIMESTEPS - 1, 50)
    c = source.t_embedder(t) + source.y_embedder.embedding_table.weight.mean(0)
    for name in ours.keys() - theirs.keys():  # what a model in full precision lacks
        if name.endswith("alphas"):
            theirs[name] = theirs[name.replace("alphas", "weight")].abs().mean().view(1)
        elif name.endswith("adaLN_modulation.2.weight"):  # the RMS Norm's gain
            outputs = source.layers[int(name.split(".")[1])].adaLN_modulation(c)
            theirs[name] = outputs.square().mean().sqrt().expand(outputs.shape[1])
    try:
        model.load_state_dict(theirs)
    except RuntimeError as e:
        reason = " ".join(str(e).split())  # it has several lines
        raise ValueError(f"--init {path} does not fit: {reason:.300}") from None


# --------------------------------------------------------------------------------------------------
# 9. The embedded digits


def load_digits(settings):
    """-> Data of the embedded digits, drawn with Pillow's font: 12,000 to learn from, and 256."""
    x, labels = digits(12000, settings.image_size, settings.seed)
    held_out = digits(256, settings.image_size, settings.seed + 1)
    pixels = to_uint8(x)[:, None].numpy()  # (n, 1, 3, H, W)
    return Data(pixels, labels.numpy(), torch.arange(len(x)), mirror=False, held_out=held_out)


def digits(n, size=24, seed=0):
    """The embedded data set: n bright, centred digits on dark gradients, the same for a seed.

    -> images (n, 3, size, size) float32 in [-1, 1], labels (n,) int64
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    images = np.empty((n, size, size, 3), np.float32)
    for i in range(n):
        images[i] = draw_digit(labels[i], size, rng)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    return x, torch.from_numpy(labels)


def draw_digit(digit, size, rng):
    """One bright digit on a dark gradient, shape and colours from rng -> (size, size, 3) in 0..1"""
    large = 4 * size  # drawn at four times the size, then averaged down
    angle = rng.uniform(-0.12, 0.12)  # radians
    slant = rng.uniform(-0.2, 0.2)
    stretch = rng.uniform(0.9, 1.15)
    height = rng.uniform(0.43, 0.53)  # the inverse of the digit's height
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = np.array([[stretch, slant], [0, 1]])
    to_source = rotation @ shear * height * 192 / large  # pixel -> pixel of the glyph
    centre = large / 2 + rng.uniform(-0.05, 0.05, 2) * large
    offset = 96 - to_source @ centre
    source = glyph(str(digit), int(rng.integers(1, 5)))
    affine = (*to_source[0], offset[0], *to_source[1], offset[1])
    ink = source.transform(
        (large, large), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    ink = np.asarray(ink.reduce(4), np.float32)[..., None] / 255  # (H, W, 1)
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1), 1))
    dark1 = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(), rng.uniform(0.05, 0.35)))
    dark2 = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(), rng.uniform(0.05, 0.35)))
    direction = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, size)
    xy = np.stack(np.meshgrid(line, line), axis=-1)  # (H, W, 2)
    mix = 0.5 + xy @ [math.cos(direction), math.sin(direction)] / math.sqrt(8)
    background = dark1 * mix[..., None] + dark2 * (1 - mix[..., None])
    return background * (1 - ink) + colour * ink


@lru_cache(maxsize=None)
def glyph(digit, stroke):
    """One digit of Pillow's own font, 96 pixels high, white on black, centred in 192 x 192."""
    image = Image.new("L", (192, 192))
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=96)
    left, top, right, bottom = pen.textbbox((0, 0), digit, font=font, stroke_width=stroke)
    centre = ((192 - left - right) / 2, (192 - top - bottom) / 2)
    pen.text(centre, digit, fill=255, font=font, stroke_width=stroke)
    return image


if __name__ == "__main__":
    run_main(main)
