"""Train a ternary diffusion transformer.

    python train.py                                        the CPU demo: digits in minutes
    python train.py --data DIR --image-size 64             your images, one subfolder a class
    python train.py --size 600M --data DIR --vae VAE       the paper's model, on latents that are made once
    torchrun --nproc-per-node=8 train.py --size 4.2B ...   many GPUs; --plan says what each of them will hold

The same command resumes a run that was stopped, on any number of processes. Everything random is a function of --seed,
the step and a sample's place in the batch: a resumed run equals an uninterrupted one, on one CPU process bit for bit,
and more processes change no more than the order of additions.
"""

import argparse
import colorsys
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from sample import STEPS, Progress, check_common, generator, load_decoder, load_encoder, positive, run, sample_images
from sample import save_grid
from terdit import SIZES, Config, DiT, GaussianDiffusion, PackedTernaryLinear, TernaryLinear
from terdit import atomic_write, first_line, load_model, pack_model, save_checkpoint, unpack_ternary

# What a size is trained with unless a flag says otherwise. The demo's was tuned for minutes on two cores; the paper's
# sizes follow the paper: 448M images at 600M, in batches of 256.
DEMO = dict(batch=16, steps=4500, lr=4e-3, warmup=50, ema=0.995, betas=(0.9, 0.99), decay=0.3, image_size=24)
PAPER = dict(batch=256, steps=1_750_000, lr=1e-4, warmup=1000, ema=0.9999, betas=(0.9, 0.999), decay=0.0, image_size=32)
STATE, CACHE = "terdit-state-2", "terdit-cache-1"
UNREAD, BROKEN = -2, -1  # labels of images that are not in the cache yet, and that cannot be

# ----------------------------------------------------------------------------------------------------------------------
# Data: the embedded digits in memory, or a memory-mapped cache of images or latents


@lru_cache(maxsize=None)
def glyph(digit, stroke):
    """One digit of Pillow's own font, 96 pixels high, white on black, centred by its ink in 192 x 192."""
    image = Image.new("L", (192, 192))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=96)
    left, top, right, bottom = draw.textbbox((0, 0), digit, font=font, stroke_width=stroke)
    centre = (192 - left - right) / 2, (192 - top - bottom) / 2
    draw.text(centre, digit, fill=255, font=font, stroke_width=stroke)
    return image


def digits(n, size=24, seed=0):
    """The embedded data set: n bright digits on dark colour gradients, the same for the same seed.

    -> images (n, 3, size, size) float32 in [-1, 1], labels (n,) int64. Turn, slant, size, weight, place and colours
    vary. Centred and bright on dark is what a model learns in minutes.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    images = np.empty((n, size, size, 3), np.float32)
    across = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 2), axis=-1)  # (H, W, 2): x and y of each pixel
    big = 4 * size  # drawn at four times the size, then averaged down
    for i in range(n):
        turn, slant, stretch = rng.uniform(-0.12, 0.12), rng.uniform(-0.2, 0.2), rng.uniform(0.9, 1.15)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        inverse = rotation @ [[stretch, slant], [0, 1]] * rng.uniform(0.43, 0.53) * 192 / big  # a pixel to its source
        offset = 96 - inverse @ (big / 2 + rng.uniform(-0.05, 0.05, 2) * big)
        source = glyph(str(labels[i]), int(rng.integers(1, 5)))
        affine = (*inverse[0], offset[0], *inverse[1], offset[1])
        ink = source.transform((big, big), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(4)
        ink = np.asarray(ink, np.float32)[..., None] / 255
        colour = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1), 1)
        dark = [np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(), rng.uniform(0.05, 0.35))) for _ in range(2)]
        angle = rng.uniform(0, 2 * math.pi)
        mix = 0.5 + across @ [math.cos(angle), math.sin(angle)] / math.sqrt(8)
        background = dark[0] * mix[..., None] + dark[1] * (1 - mix[..., None])
        images[i] = background * (1 - ink) + np.array(colour) * ink
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, torch.from_numpy(labels)


def load_image(path, size):
    """Any picture that Pillow reads -> uint8 (3, size, size): upright, RGB, centre-cropped as ADM does it."""
    with Image.open(path) as image:
        if image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))  # decode no larger than needed
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert("RGB") would clip to white
            deep = np.asarray(image).astype(np.int64)
            image = Image.fromarray((deep // (257 if deep.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.reduce(2)
    scale = size / min(image.size)
    image = image.resize([max(size, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def read_image(path, size):
    """load_image, or None for a file that cannot be read, which is named."""
    try:
        return load_image(path, size)
    except Exception as e:  # Pillow's decoders raise whatever they like on damaged files
        print(f"{path}: left out, cannot be read ({type(e).__name__}: {e})", file=sys.stderr)


class Images:
    """x (n, 1, 3, H, W) uint8 or latents (n, 2, C, h, w) fp16, labels (n,), in memory or mapped; header: what they are.

    [index (n,), flip (n,) bool] -> x0 (n, C, H, W) fp32, images in [-1, 1] or latents; labels (n,) int64.
    """

    def __init__(self, x, labels, header):
        self.x, self.labels, self.header, self.shape = x, labels, header, x.shape[2:]

    def __getitem__(self, index_flip):
        index, flip = index_flip
        labels = torch.from_numpy(self.labels[index])
        if self.x.dtype != np.uint8:
            return torch.from_numpy(self.x[index, flip.long()]).float(), labels
        x0 = torch.from_numpy(self.x[index, 0]).float() / 127.5 - 1
        return torch.where(flip[:, None, None, None], x0.flip(-1), x0), labels


def open_cache(cache, mode="r", **wanted):
    """The folder that make_cache made -> Images. ValueError names what is damaged or not as `wanted` (None: any)."""
    try:
        header = json.loads((cache / "header.json").read_text())
        images = Images(*(np.load(cache / f"{name}.npy", mmap_mode=mode) for name in ("x", "labels")), header)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{cache}: cut short or damaged ({e}); delete it to read the images again") from None
    for field, here in (wanted | {"format": CACHE}).items():
        if here is not None and header.get(field) != here:
            raise ValueError(f"{cache} was made with {field}={header.get(field)!r}, this command says {here!r}")
    return images


def make_cache(args, cache):
    """List the images of --data, one subfolder a class, and put each through load_encoder, once.

    -> the folder `cache`: header.json with the listing, and two mapped arrays, x.npy and labels.npy, where UNREAD marks
    what is yet to do and BROKEN a file that cannot be read. So a stopped run goes on where it was. Processes share the
    work, and threads read (Pillow decodes outside Python's lock).
    """
    folder, (rank, world) = Path(args.data), ranks()
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    names = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise ValueError(f"--data {folder}: expected one subfolder of images a class, found no subfolder")
    header = dict(format=CACHE, vae=args.vae, image_size=args.image_size, class_names=names)
    blank, (encode, scale) = np.zeros((3, *[args.image_size] * 2), np.uint8), load_encoder(args.vae, args.device)
    if rank == 0 and not (cache / "header.json").is_file():
        endings, row = Image.registered_extensions(), encode(blank[None])[0]
        found = [(label, f) for label, name in enumerate(names) for f in sorted((folder / name).rglob("*"))]
        files = [(str(f.relative_to(folder)), label) for label, f in found if f.suffix.lower() in endings]
        if not files:
            raise ValueError(f"--data {folder}: its {len(names)} class folders hold no images")
        cache.mkdir(exist_ok=True)
        np.lib.format.open_memmap(cache / "x.npy", "w+", row.dtype, (len(files), *row.shape)).flush()
        with open(cache / "x.npy", "r+b") as file:  # of a full disk a mapped file would learn by a bus error
            getattr(os, "posix_fallocate", lambda *a: None)(file.fileno(), 0, os.path.getsize(file.name))
        np.save(cache / "labels.npy", np.full(len(files), UNREAD))
        text = json.dumps(header | dict(latent_scale=scale, source=str(folder), files=files)).encode()
        atomic_write(cache / "header.json", lambda file: file.write(text))
    barrier()
    images = open_cache(cache, "r+", **header)
    todo, files = np.flatnonzero(images.labels == UNREAD)[rank::world], images.header["files"]
    parts, progress = [todo[i : i + 16] for i in range(0, len(todo), 16)], Progress(len(todo), "reading images")
    with ThreadPoolExecutor(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) as pool:
        start = lambda part: pool.map(lambda i: read_image(folder / files[i][0], args.image_size), part)
        reading = start(parts[0] if parts else [])
        for part, after in zip(parts, [*parts[1:], []]):
            read, reading = list(reading), start(after)  # the next ones are read while these are encoded
            images.x[part] = encode(np.stack([blank if z is None else z for z in read]))
            images.x.flush()  # before they are called done
            images.labels[part] = [BROKEN if z is None else files[i][1] for i, z in zip(part, read)]
            progress(len(part))
    barrier()


def load_data(args):
    """-> Images, whether a mirrored one is as good, the indices that are learned from, and what is held out, one image
    in 100 and at most 256: x0 (m, C, H, W) and labels (m,), or None."""
    if not args.data:
        (x, labels), held_out = (digits(n, args.image_size, args.seed + i) for i, n in enumerate((12000, 256)))
        x = ((x + 1) * 127.5).round().byte()[:, None].numpy()
        images = Images(x, labels.numpy(), dict(class_names=[str(i) for i in range(10)]))
        return images, False, torch.arange(len(x)), held_out
    cache = Path(args.data)
    if not (cache / "header.json").is_file():
        cache = args.out / f"{'latents' if args.vae else 'images'}-{args.image_size}"
        if not (cache / "header.json").is_file() or (open_cache(cache).labels == UNREAD).any():
            make_cache(args, cache)
        if Path(source := open_cache(cache).header["source"]).resolve() != Path(args.data).resolve():
            raise ValueError(f"{cache} holds the images of {source}, not of --data {args.data}: take another --out, delete "
                             f"that folder, or say --data {cache}")  # fmt: skip
    images = open_cache(cache, vae=args.vae, image_size=args.image_size)
    names, n = images.header["class_names"], len(images.labels)
    if unread := (images.labels == UNREAD).sum():
        raise ValueError(f"{cache}: {unread} of {n} images are not in it yet: run the command that made it again")
    keep = torch.from_numpy(np.flatnonzero(images.labels != BROKEN))
    if not len(keep):
        raise ValueError(f"--data {args.data}: none of its {n} images can be read")
    for label in sorted(set(range(len(names))) - set(images.labels.tolist())):
        print(f"class {names[label]!r} has no image that can be read: it will not be learned")
    print(f"{len(keep)} images of {len(names)} classes of {images.header['source']}, {n - len(keep)} left out, "
          f"from {cache}: delete it to read them again")  # fmt: skip
    keep = keep[torch.randperm(len(keep), generator=generator(args.seed, 2))]
    n = min(256, len(keep) // 100)
    return images, True, keep[n:].sort().values, images[keep[:n], torch.zeros(n).bool()] if n else None


# ----------------------------------------------------------------------------------------------------------------------
# Everything random, as a function of (seed, step)


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, 0, epoch))


def draw_batch(data, config, args, diffusion, step):
    """What step number `step` sees: x0 (N, C, H, W) in [-1, 1], t, y with labels dropped, and the noise.

    Every process draws the numbers of the whole batch, and keeps its own slice of it.
    """
    (images, mirror, train, _), n = data, args.batch
    rng, (rank, world) = generator(args.seed, 1, step), ranks()
    places = [divmod(p, len(train)) for p in range(step * n, (step + 1) * n)]
    index = train[[int(epoch_order(args.seed, epoch, len(train))[p]) for epoch, p in places]]
    flip = torch.rand(n, generator=rng) < 0.5 if mirror else torch.zeros(n, dtype=torch.bool)
    drop = torch.rand(n, generator=rng) < config.class_dropout_prob
    t, noise = draw_timesteps(n, diffusion, rng), torch.randn((n, *images.shape), generator=rng)
    index, flip, drop, t, noise = (z.chunk(world)[rank] for z in (index, flip, drop, t, noise))
    x0, y = images[index, flip]
    return x0, t, torch.where(drop, config.num_classes, y), noise  # the null label, for guidance


def draw_timesteps(n, diffusion, rng):
    """t (n,). Uniform for eps, as in the paper. For v: logSNR ~ N(-2, 2.5), spread evenly over the batch, and one in
    twenty uniform. High noise is where a picture's layout is decided, and the bottleneck of a short training."""
    if diffusion.prediction == "eps":
        return torch.randint(1000, (n,), generator=rng)
    u = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    log_snr = -2 + 2.5 * torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
    table = torch.from_numpy(np.log(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)))
    t = 999 - torch.searchsorted(table.flip(0).contiguous(), log_snr).clamp(0, 999)
    anywhere = torch.rand(n, generator=rng) < 0.05
    return torch.where(anywhere, torch.randint(1000, (n,), generator=rng), t)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    # fmt: off
    flag("--size", choices=SIZES, help="default tiny")
    flag("--data", help="folder with a subfolder of images for each class, or a cache; default: the embedded digits")
    flag("--vae", help="train on the latents of this VAE, a diffusers model or folder; made once, in OUT/latents-*")
    flag("--image-size", type=positive, help="pixels; default 24 for tiny and small, 256 with --vae, else 32")
    flag("--batch", type=positive, help="images a step, of all processes together; default 16 for tiny and small, else 256")
    flag("--micro-batch", type=positive, help="images at a time within a step; default all, 32 at 600M and up")
    flag("--steps", type=positive, help=f"default {DEMO['steps']:,} for tiny and small, else {PAPER['steps']:,}")
    flag("--lr", type=float, help="default 4e-3 for tiny and small, else 1e-4")
    flag("--seed", type=int, default=0)
    flag("--out", help="run folder; default runs/SIZE")
    flag("--init", metavar="CKPT", help="start from a packed.pt, a state folder of your own or a released folder")
    flag("--full-precision", action="store_true", help="no ternary weights (the paper's baseline)")
    flag("--no-adaln-norm", action="store_true", help="no RMS Norm behind adaLN (the paper's ablation)")
    flag("--fresh", action="store_true", help="start over where the run folder holds a state")
    flag("--save-every", type=positive, default=1000, metavar="STEPS", help="default 1000; the last two are kept")
    flag("--keep-every", type=positive, metavar="STEPS", help="save at these steps too, and keep it for good")
    flag("--sample-every", type=positive, metavar="STEPS", help="default: a quarter of the run; on one process")
    flag("--grid", type=int, metavar="N", help="images in a sample grid, 0 for none; default 4 a class, up to 40; none "
         "of latents and for large models on a CPU")
    flag("--checkpointing", action="store_true", help="compute a block's activations twice instead of keeping them")
    flag("--compile", action="store_true", help="torch.compile the blocks: faster after half a minute")
    flag("--plan", action="store_true", help="print what a step will take in memory and work, and stop")
    flag("--gpus", type=positive, metavar="N", help="GPUs that --plan is for; default: this device")
    flag("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--dtype", choices=["fp32", "bf16"], help="of matmuls; default bf16 where the hardware has it")
    # fmt: on
    args = p.parse_args(argv)
    if args.lr is not None and not args.lr > 0:
        p.error(f"argument --lr: got {args.lr}, expected a number above 0")
    if args.vae and not args.data and not args.plan:
        p.error("argument --vae: needs --data")
    if args.gpus and not args.plan:
        p.error("argument --gpus: is for --plan; torchrun says on how many GPUs to train")
    check_common(p, args)
    if args.grid is not None and args.grid < 0:
        p.error(f"argument --grid: got {args.grid}, expected 0 or more")
    return args


def bf16_is_fast(device):
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def can_compile(device):
    """Try torch.compile on something small: it needs a C++ compiler and Python's headers, or Triton on a GPU."""
    try:
        torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(1024, device=device))
        return True
    except Exception as e:
        print(f"--compile does not work here ({first_line(e)[:100]}): training without it, slower")
        return False


def read_init(path):
    """What --init names -> its Config, and its state dict with full-precision weights."""
    if (run_file := Path(path) / "run.json").is_file():
        index = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {k: torch.empty(m.size) for k, m in index.items() if k.startswith("ema.")}
        load_tensors(path, state)
        return Config(**json.loads(run_file.read_text())["config"]), {k[4:]: v for k, v in state.items()}
    model = load_model(path)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            # Latents at +-|alpha| and 0 round back to the same codes.
            state[f"{name}.weight"] = unpack_ternary(module.weight) * module.alphas.abs()
    return model.config, state


def build_model(args, config, state=None):
    """-> DiT to train: fresh, or with the weights `state` of --init, whose missing label table is made anew."""
    model = DiT(config)
    if state is None:
        return model
    ours, table = model.state_dict(), "y_embedder.embedding_table.weight"
    state = {table: ours[table]} | state
    for name in ours.keys() - state.keys():
        if name.endswith("alphas"):  # from full precision: alpha starts at the quantizer's scale
            state[name] = state[name.replace("alphas", "weight")].abs().mean().view(1)
    for name in ours.keys() | state.keys():
        there, here = (tuple(d[name].shape) if name in d else "none" for d in (state, ours))
        if there != here:
            raise ValueError(f"--init {args.init} does not fit: its {name} is {there}, this model's {here}")
        ours[name].copy_(state[name])
    return model


def make_optimizer(model, lr, betas, decay):
    """AdamW. Alphas learn at a fifth of the rate: they are small numbers that scale whole layers.

    Decay shrinks the blocks' matrices. Rounding sees latent weights next to each other, not how large they all are; but
    the smaller they are, the sooner a step flips a code: with decay, codes go on moving until the learning rate falls.
    """
    groups = {}
    for name, p in model.named_parameters():
        matrix = name.startswith("layers.") and p.ndim == 2
        kind = (0.2, 0.0) if name.endswith("alphas") else (1.0, decay if matrix else 0.0)
        groups.setdefault(kind, []).append(p)
    groups = [dict(params=params, scale=kind[0], weight_decay=kind[1]) for kind, params in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def ranks():
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_sum(x):
    """x, in place, summed over the processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def whole(x):
    """A tensor whose parts lie on all processes -> the plain tensor, on each of them."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def place(model, device):
    """Move a model to its device, on many processes in parts (FSDP2): a block's weights are whole while it computes.

    They are gathered in fp32, then rounded: so ternarize divides by the whole matrix's mean, and its codes are those
    that packing will make. Of weights gathered in bf16 (MixedPrecisionPolicy), some would round to other codes.
    """
    if not dist.is_initialized():
        return model.to(device)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    state, mesh = model.state_dict(), dist.init_device_mesh(device, (dist.get_world_size(),))
    model.to("meta")
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)  # only rank 0 has drawn weights
    set_model_state_dict(model, state if dist.get_rank() == 0 else {}, options=options)


def states(out):
    """Folders of whole states, the newest last. Unfinished and half-deleted ones end in .tmp."""
    return sorted((d for d in out.glob("state-*") if d.name[6:].isdigit()), key=lambda d: int(d.name[6:]))


def save_state(out, tensors, about, keep_every):
    """Write tensors (each process its own parts) and the dict `about` beside, then rename; keep the last two."""
    path = out / f"state-{about['step']:07d}"
    beside, first = path.with_suffix(".tmp"), ranks()[0] == 0
    try:
        dcp.save(tensors, checkpoint_id=beside)  # flushed to the disk
        if first:
            atomic_write(beside / "run.json", lambda file: file.write(json.dumps(about).encode()))
            os.rename(beside, path)
    except (dcp.api.CheckpointException, OSError) as e:
        free = shutil.disk_usage(out).free / 1e6  # torch hides a full disk behind "unexpected pos"
        shutil.rmtree(beside, ignore_errors=True)
        kept = f"{states(out)[-1]} is whole" if states(out) else "nothing was saved before"
        raise OSError(f"{path}: cannot be written ({reason(e)}; {free:,.0f} MB free); {kept}") from None
    for old in states(out)[:-2] if first else []:
        if not (keep_every and int(old.name[6:]) % keep_every == 0):
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # renamed first: half a state must not look whole
    barrier()


def reason(e):
    """One line of an exception; of DCP's, which hold one for each process, the first."""
    return first_line(next(iter(e.failures.values()))[0] if isinstance(e, dcp.api.CheckpointException) else e)


def load_tensors(path, tensors):
    """Fill tensors, in place, from a state folder that any number of processes wrote.

    Its index is a pickle, which can run code: load only your own. (What is shared is packed.pt.)
    """
    try:
        dcp.load(tensors, checkpoint_id=path)
    except (dcp.api.CheckpointException, OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path}: damaged ({reason(e)}); delete it to go on from the one before, or --fresh") from None


def check_state(path, about):
    """The step of the state in `path` if it is of the run that `about` says, or ValueError that names what differs."""
    try:
        state = json.loads((path / "run.json").read_text())
        there, step, steps, version = state["config"] | state, state["step"], state["steps"], state["torch"]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{path}: damaged ({e!r}); delete it to go on from the one before, or --fresh") from None
    for field, here in (about["config"] | about).items():
        if field not in ("step", "steps", "torch") and here != there.get(field):
            difference = f"{field}={there.get(field)!r}, this command says {here!r}"
            raise ValueError(f"{path} was trained with {difference}: use the same, another --out, or --fresh")
    if step > about["steps"]:
        raise ValueError(f"{path} is at step {step} already, --steps says {about['steps']}")
    if steps != about["steps"]:
        print(f"note: planned for {steps} steps before, now {about['steps']}: the learning rate follows")
    if version != about["torch"]:
        print(f"note: {path} was written by torch {version}, this is {about['torch']}: the last bits may differ")
    return step


def open_log(path, step):
    """log.csv, one row each ten steps -> function that adds one. Rows past a resumed step go: it reads as one run.

    mse_q1..4: mean square error of the predicted noise at timesteps 0-249, ... 750-999. zero, flipped: share of ternary
    codes that are 0, and that changed in the 100 steps (or since the resume). val_loss: of the averaged model. tflops: of
    the model, 1e12 a second on each device (all that an H100 has in bf16 are 989).
    """
    fields = "step loss mse_q1 mse_q2 mse_q3 mse_q4 grad_norm lr images_per_s zero flipped val_loss tflops".split()
    rows = [line.split(",") for line in path.read_text().splitlines()] if step and path.is_file() else []
    rows = [fields, *(row for row in rows if row[0].isdigit() and int(row[0]) <= step)]
    atomic_write(path, lambda file: file.write("".join(",".join(row) + "\n" for row in rows).encode()))
    file = open(path, "a", buffering=1)
    show = lambda v: f"{v:.6g}" if isinstance(v, float) else v
    return lambda row: print(*(show(row.get(k, "")) for k in fields), sep=",", file=file)


def sample_codes(model):
    """The codes of one ternary weight in 17 of this process's part of the model, int8."""
    codes = []
    for weight in (m.weight.detach() for m in model.modules() if isinstance(m, TernaryLinear)):
        gamma = whole(weight.abs().mean()) + 1e-6  # of the whole matrix
        part = weight.to_local() if hasattr(weight, "to_local") else weight
        codes.append((part.flatten()[::17] / gamma).round().clamp(-1, 1).to(torch.int8))
    return torch.cat(codes)


def first_bad_layer(model, forward):
    """Name of the first module that puts out something not finite in forward(), on any of the processes."""
    bad = []
    for name, module in model.named_modules():
        module._compiled_call_impl = None  # hooks do not reach into compiled code
        module.register_forward_hook(lambda module, x, out, name=name: bad.extend([name] * (not out.isfinite().all())))
    with torch.no_grad():
        forward()
    first = next(filter(None, bad), None)  # the model itself, which has no name, puts out what its last layer does
    found = [first] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, first)
    return next(filter(None, found), "the backward pass")


def micro_batch(args, n_params):
    return args.micro_batch or (32 if n_params > 200e6 else args.batch)


def flops_an_image(config):
    """FLOP of training on one image: a forward pass, counted on shapes alone, and twice as much for the backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, t = torch.empty(1, config.in_channels, *[config.input_size] * 2), torch.zeros(1, dtype=torch.long)
        DiT(config)(x, t, t)
    return 3 * counter.get_total_flops()


def plan(args, config):
    """Print what a step of training takes. Shapes alone go through the model, as torch's fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpus, on_gpu = args.gpus or 1, bool(args.gpus) or args.device == "cuda"
    held, size, n_tokens = {}, config.input_size, (config.input_size // config.patch_size) ** 2

    def note(z):  # what the backward pass waits for; a GPU's attention keeps no matrix of tokens by tokens
        if z.untyped_storage()._cdata not in weights and not (on_gpu and z.shape[-2:] == (n_tokens, n_tokens)):
            held[z.untyped_storage()._cdata] = z.untyped_storage()
        return z

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
        model = DiT(config)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        n, block = (4 * sum(p.numel() for p in m.parameters()) for m in (model, model.layers[0]))  # bytes, fp32
        micro = min(micro_batch(args, n / 4), -(-args.batch // gpus))
        x, t = torch.empty(micro, config.in_channels, size, size), torch.zeros(micro, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda z: z):
            model(x, t, t)
    activations = sum(s.nbytes() for s in held.values())
    if args.checkpointing:  # one block's, and what goes into each
        activations = activations / config.n_layers + config.n_layers * micro * n_tokens * config.dim * 4
    rows = {"weights": n / gpus, "gradients": n / gpus, "optimizer": 2 * n / gpus, "averaged weights": n / gpus}
    rows |= {f"activations, {micro} images at a time": activations, "gathered blocks": 3 * block * (gpus > 1)}
    print(f"{n / 4e6:,.1f}M parameters; batch {args.batch} on {gpus} {'GPU' if on_gpu else 'CPU'}, {args.dtype}; "
          f"each holds")  # fmt: skip
    for name, size in [*rows.items(), ("in all", sum(rows.values()))]:
        print(f"  {name:<36}{size / 1e9:9.2f} GB")
    flops = flops_an_image(config)
    rate = 0.4 * 989e12 * gpus / flops
    print(f"{flops / 1e12:.3f} TFLOP an image; {86400 * rate / 1e6:,.1f}M images a day if the GPUs are H100 or H200 "
          f"and reach 40% of their 989 TFLOP/s")  # fmt: skip


def join(device):
    """Take part in what a launcher (torchrun) started, if one did -> this process's number, and how many there are."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Processes may wait for hours while one lists a million files, or finishes its share of a cache.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return ranks()


def resolve(args):
    """Fill in what the command leaves open, from DEMO or PAPER, from --init and from a cache.

    -> the model's Config, to which the data's classes and channels are yet to be added, and the weights of --init.
    """
    if args.init and args.size:
        raise ValueError("--init takes its size from the checkpoint: leave out --size")
    base, state = read_init(args.init) if args.init else (Config(**SIZES[args.size or "tiny"]), None)
    recipe = dict(DEMO if base.prediction == "v" else PAPER)
    recipe["dtype"] = "bf16" if args.gpus or bf16_is_fast(args.device) else "fp32"
    cache = open_cache(Path(args.data)) if args.data and (Path(args.data) / "header.json").is_file() else None
    if cache:
        recipe["image_size"] = cache.header["image_size"]
    elif base.vae and not args.vae:
        raise ValueError(f"--init {args.init} works on {base.in_channels} channels, latents of {base.vae}: add --vae")
    elif args.vae or args.init:
        recipe["image_size"] = 256 if args.vae else base.input_size
    vars(args).update(recipe | {k: v for k, v in vars(args).items() if v is not None})
    args.out = Path(args.out or ("runs/fine-tuned" if args.init else f"runs/{args.size or 'tiny'}"))
    channels, size = (4, args.image_size // 8) if args.vae else (base.in_channels, args.image_size)
    if cache:
        channels, size = cache.shape[:2]
    large_dit = args.full_precision and not args.init  # has no norm there; what is fine-tuned keeps what it has
    adaln_norm = base.adaln_norm and not (args.no_adaln_norm or large_dit)
    # What does not split into patches is refused here, before images are read.
    return replace(base, ternary=not args.full_precision, adaln_norm=adaln_norm, in_channels=channels,
                   input_size=size), state  # fmt: skip


def export(args, config, tensors):
    """Write the averaged model of all processes, which leave their group. -> its path: packed.pt, or full.pt"""
    path = args.out / ("full.pt" if args.full_precision else "packed.pt")
    weights = ((k[4:], whole(v)) for k, v in tensors.items() if k.startswith("ema."))  # one at a time
    weights = {k: v.cpu() for k, v in weights if ranks()[0] == 0}
    if dist.is_initialized():
        dist.destroy_process_group()
    if weights:
        with torch.device("meta"):
            model = DiT(config)
        model.load_state_dict(weights, assign=True)
        save_checkpoint(path, model if args.full_precision else pack_model(model))
    return path


def main(argv=None):
    args = parse_args(argv)
    # Odd but readable images; complex numbers, which --compile leaves as they are; one process, which is fine.
    warnings.filterwarnings("ignore", module=r"PIL|torch\.(_inductor|distributed)")
    rank, world = join(args.device)
    base, init_state = resolve(args)
    if args.plan:
        return plan(args, base)
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} does not split evenly over {world} processes")
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise PermissionError(f"--out {args.out}: not writable")
        for left in args.out.glob("state-*.tmp"):
            shutil.rmtree(left)
    barrier()
    torch.manual_seed(args.seed)

    # Data, model, optimizer, EMA, and the state of an earlier run if there is one
    images, *_, held_out = data = load_data(args)
    header, class_names = images.header, images.header["class_names"]
    config = replace(base, in_channels=images.shape[0], input_size=images.shape[1], num_classes=len(class_names),
                     class_names=class_names, vae=header.get("vae"),
                     latent_scale=header.get("latent_scale", base.latent_scale))  # fmt: skip
    if args.init and base.class_names != class_names:
        init_state = {k: v for k, v in init_state.items() if not k.startswith("y_embedder.")}
        print(f"new label table: {args.init} has {base.num_classes} classes, here are {len(class_names)}")
    with torch.device("cpu" if rank == 0 else "meta"):
        model = build_model(args, config, init_state)
    n_params = sum(p.numel() for p in model.parameters())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    for m in (model, ema.module):
        place(m, args.device)
    compiled = args.compile and can_compile(args.device)
    for layer in model.layers:
        if args.checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        if compiled:
            layer.compile(dynamic=False)
    diffusion = GaussianDiffusion(prediction=config.prediction)
    optimizer = make_optimizer(model, args.lr, args.betas, args.decay)
    tensors = {"n_averaged": ema.n_averaged}  # with about, below, all that a resumed run needs
    for (name, p), averaged in zip(model.named_parameters(), ema.module.parameters()):
        zeros = {k: torch.zeros_like(p.detach()) for k in ("exp_avg", "exp_avg_sq")}
        # AdamW's first state as it makes it itself, but there to load into.
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device), **zeros)
        kinds = dict(model=p.detach(), ema=averaged.detach(), **optimizer.state[p])
        tensors |= {f"{kind}.{name}": v for kind, v in kinds.items()}
    about = dict(format=STATE, config=asdict(config), images=len(images.labels), torch=str(torch.__version__))
    about["files"] = zlib.crc32(json.dumps(header.get("files")).encode())
    about |= {k: getattr(args, k) for k in ("steps", "batch", "lr", "decay", "seed", "init", "dtype")}
    step = 0
    if args.fresh:  # only now, when all that could be wrong with this command has been looked at
        for old in states(args.out) if rank == 0 else []:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # renamed first, as in save_state
        barrier()
    if found := states(args.out):
        step = check_state(found[-1], about)
        load_tensors(found[-1], tensors)
    micro = micro_batch(args, n_params)
    print(f"{n_params / 1e6:.2f}M parameters{' in full precision' * args.full_precision}, "
          f"{(images.labels >= 0).sum()} images of {args.image_size}x{args.image_size}, steps {step}-{args.steps} of "
          f"{args.batch} images, {f'{world} x ' * (world > 1)}{args.device} {args.dtype}, in {args.out}")  # fmt: skip

    grid = args.grid
    if grid is None:
        grid = 0 if config.vae or args.device == "cpu" and n_params > 50e6 else min(40, 4 * config.num_classes)
    decode = load_decoder(config.vae, config.latent_scale, args.device) if config.vae and grid else None

    def draw_grid(model, path):
        y = torch.arange(grid) % min(10, config.num_classes)
        sheet = sample_images(model.eval(), y, args.seed, decode=decode, progress=Progress(grid * STEPS))
        save_grid(sheet, min(10, config.num_classes, grid), path)

    def micro_batches(*tensors):
        return list(zip(*(z.to(args.device).split(micro) for z in tensors)))

    def losses(model, x0, t, y, noise):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            return diffusion.training_losses(model, x0, t, y, noise)

    @torch.no_grad()
    def validate():
        """Loss of the averaged model on what is held out, with the same timesteps and noise each time."""
        x0, y = (z[: 4 * args.batch] for z in held_out)
        t, noise = torch.arange(len(y)) * 1000 // len(y), torch.randn(x0.shape, generator=generator(args.seed, 3))
        parts = micro_batches(x0, t, y, noise)
        return sum(losses(ema.module, *part)["loss"].sum().item() for part in parts) / len(y)

    stop, usual = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number, frame):
        stop.append(number)  # looked at once a step
        if world == 1:  # a launcher passes on a signal that the terminal may have sent already
            signal.signal(number, usual[number])  # a second one stops at once

    for s in usual:
        signal.signal(s, on_signal)

    log = open_log(args.out / "log.csv", step) if rank == 0 else None
    sample_every = args.sample_every or max(1, args.steps // 4)
    codes = sample_codes(model) if config.ternary else None
    acp = torch.from_numpy(diffusion.alphas_cumprod).to(args.device)
    flops = flops_an_image(config)
    shown, start, first, total, stopped = 0.0, time.time(), step, 0, False
    pool = ThreadPoolExecutor(1)  # draws the next batch while this one computes
    batch = pool.submit(draw_batch, data, config, args, diffusion, step)
    while step < args.steps and not stopped:
        # The learning rate warms up, then falls along a cosine to 1%: ternary codes settle only when it is small.
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        lr = args.lr * min(1, (step + 1) / args.warmup) * cosine
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        parts = micro_batches(*batch.result())
        batch = pool.submit(draw_batch, data, config, args, diffusion, step + 1)
        seen = torch.zeros(11, device=args.device, dtype=torch.float64)  # stop, loss, 1, MSE by quartile, counts
        # Gradients add up over micro-batches, which bounds the memory of activations.
        for x0, t, y, noise in parts:
            terms = losses(model, x0, t, y, noise)
            part = terms["loss"].sum() / args.batch
            (part * world).backward()  # FSDP takes the mean over the processes
            mse = terms["mse"].detach() * (acp[t] if config.prediction == "v" else 1)  # v's error -> the noise's
            seen[1] += part.detach()
            seen[3:].index_add_(0, torch.cat([t // 250, t // 250 + 4]), torch.cat([mse, mse**0]).double())
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
        seen[0], seen[2] = len(stop), 1 / world
        total = total + all_sum(seen).cpu().numpy()
        stopped, loss, *_ = seen.tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            where = first_bad_layer(model, lambda: [losses(model, *part) for part in parts])
            kept = f"{states(args.out)[-1]} holds the last good state" if states(args.out) else "nothing was saved yet"
            raise ValueError(f"step {step}: loss {loss}, gradient norm {grad_norm}, not finite first in {where}: "
                             f"stopped; {kept}. Try a lower --lr")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            ema.module.reshard()  # validation leaves some of it whole
        ema.update_parameters(model)
        step += 1

        now, live = time.time(), sys.stdout.isatty()
        rate = (step - first) / (now - start)  # steps a second
        saving = step % args.save_every == 0 or args.keep_every and step % args.keep_every == 0 or step == args.steps
        if now - shown > (0.5 if live else 15) or step == args.steps:
            shown, left = now, timedelta(seconds=int((args.steps - step) / rate))
            print(f"{chr(13) * live}step {step}/{args.steps}  loss {total[1] / total[2]:.4f}  grad {grad_norm:.2f}  "
                  f"lr {lr:.1e}  {rate * args.batch:.3g} images/s  ETA {left}   ",
                  end="" if live else "\n", flush=True)  # fmt: skip
        if step % 10 == 0 or saving:
            row = dict(step=step, loss=total[1] / total[2], grad_norm=grad_norm, lr=lr, images_per_s=rate * args.batch)
            row["tflops"] = row["images_per_s"] / world * flops / 1e12
            row |= {f"mse_q{i + 1}": total[i + 3] / total[i + 7] for i in range(4) if total[i + 7]}
            if config.ternary and step % 100 == 0:
                before, codes = codes, sample_codes(model)
                counts = torch.tensor([(codes == 0).sum(), (codes != before).sum(), len(codes)], device=args.device)
                row["zero"], row["flipped"] = (all_sum(counts)[:2] / counts[2]).tolist()
            if saving and held_out:
                row["val_loss"] = validate()
            if log:
                log(row)
            total = 0
        if saving or stopped:
            save_state(args.out, tensors, about | {"step": step}, args.keep_every)
        if grid and world == 1 and step % sample_every == 0 and step < args.steps:
            before = time.time()
            draw_grid(ema.module, args.out / f"grid-{step:07d}.png")
            start += time.time() - before  # not training time
    print()
    pool.shutdown(cancel_futures=True)
    for s, handler in usual.items():
        signal.signal(s, handler)
    if stopped:
        print(f"stopped at step {step}, saved in {args.out}; the same command{' without --fresh' * args.fresh} goes on")
        sys.exit(128 + (stop or [signal.SIGTERM])[0])

    path = export(args, config, tensors)
    if rank == 0:
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; in fp32 the weights would take {4 * n_params / 1e6:.2f} MB")
        if grid:
            draw_grid(load_model(path, args.device), args.out / "grid.png")  # the picture comes from the file
            print(f"{args.out / 'grid.png'}: samples of {path.name}")
    if world > 1:
        # All is written. torch's own teardown sometimes aborts a process that has taken part in a group ("terminate
        # called without an active exception"), and the launcher then kills the others, rank 0 at its files included.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    run(main)
