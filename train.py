"""Train a ternary diffusion transformer.

    python train.py                                        the CPU demo: digits in minutes
    python train.py --data DIR --image-size 64             your images, one subfolder a class
    python train.py --size 600M --data DIR --vae VAE       the paper's model, on latents that are made once
    torchrun --nproc-per-node=8 train.py --size 4.2B ...   many GPUs
    python train.py --init FULL.pt --teacher FULL.pt       ternary from a full-precision model, in far fewer steps

The same command resumes a run that was stopped, on any number of processes. Random numbers depend only on --seed and
the step; every process draws those of the whole batch and keeps its slice. So no random state is saved: a resumed run
equals an uninterrupted one, on one CPU process bit for bit. More processes, or other micro-batches, round differently.
"""

import argparse
import colorsys
import errno
import math
import os
import re
import signal
import sys
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sample import DEVICES, THERE, UNUSABLE, Progress, Rows, barrier, cpu_has, create_rows, decode
from sample import find_checkpoint, from_rank_0, generator, init_distributed, load_vae, locked, ranks
from sample import run_main, sample_latents, save_grid
from terdit import SIZES, TERNARY_EPS, Config, DiT, GaussianDiffusion, PackedTernaryLinear, TernaryLinear, atomic_write
from terdit import first_line, in_dtype, load_model, pack_model, read_checkpoint, save_checkpoint, ternarize
from terdit import unpack_ternary

# ----------------------------------------------------------------------------------------------------------------------
# 1. The loop: `train` is all steps, `train_step` one update


class Run:
    """What a step of training reads and changes."""

    def __init__(self, settings, description, data, model, ema, teacher):
        self.settings = settings
        self.description = description  # what a state says of its run
        self.data = data
        self.model = model
        self.ema = ema  # the averaged model, which is validated, drawn and saved in model_path
        self.model_path = Path(settings.out) / ("full.pt" if settings.full_precision else "packed.pt")
        self.teacher = teacher  # a model in eval mode, or None
        self.optimizer = make_optimizer(model, settings)
        self.diffusion = GaussianDiffusion(prediction=model.config.prediction)
        self.step = 0  # steps that are done
        self.stats = None  # StepStats of the last one


def train(run):
    """All steps from the run's own to the last, or until a signal comes."""
    settings = run.settings
    log = Log(run)
    progress = Progress((settings.steps - run.step) * settings.batch)
    stop = StopSignal()
    stopped = False
    pool = ThreadPoolExecutor(1)
    upcoming = pool.submit(draw_batch, run, run.step)
    while run.step < settings.steps and not stopped:
        start = time.time()
        batch = upcoming.result()  # a function of (seed, step)
        upcoming = pool.submit(draw_batch, run, run.step + 1)  # a thread draws it while this step is computed
        lr = set_learning_rate(run.optimizer, settings, run.step)
        run.stats = train_step(run, batch, progress)
        stopped = stop.requested()
        is_last = run.step == settings.steps
        saving = is_last or run.step % settings.save_every == 0
        log.add(run.stats, lr, time.time() - start, saving)
        if saving or stopped:
            save_state(run)
        if saving and settings.grid and ranks()[0] == 0:
            draw_grid(run, "grid.png" if is_last else f"grid-{run.step:07d}.png")
    if stopped and run.step < settings.steps:
        print(f"stopped at step {run.step}, saved in {settings.out}; the same command (without --fresh) goes on")
        sys.exit(128 + (stop.received or signal.SIGTERM))
    if ranks()[0] == 0:  # the others may not see its disk
        print(f"{run.model_path}: {run.model_path.stat().st_size / 1e6:.2f} MB, step {run.step}")


@dataclass
class StepStats:
    """Statistics of one step, over all processes."""

    loss: float  # mean over the batch, without the teacher's term
    distill: float  # the teacher's term: mean square between its outputs and the model's; 0 without a teacher
    grad_norm: float  # before clipping


def train_step(run, batch, progress):
    """One update of the weights and of their average -> StepStats. The teacher's term is added here."""
    settings = run.settings
    world = ranks()[1]
    loss = torch.zeros((), device=settings.device, dtype=torch.float64)
    distill = torch.zeros((), device=settings.device, dtype=torch.float64)
    what = f"step {run.step + 1}/{settings.steps}"
    if run.stats:
        what += f", loss {run.stats.loss:.4f}"
    # Gradients add up over micro-batches, which bounds the memory of activations.
    for part in batch.split(settings.micro_batch, settings.device):
        terms = autocast_losses(run, run.model, part, run.teacher)
        part_loss = terms["loss"].sum() / settings.batch
        loss += part_loss.detach()
        if run.teacher:
            distill += terms["distill"].detach().sum() / settings.batch
            part_loss = part_loss + settings.teacher_weight * terms["distill"].sum() / settings.batch
        (part_loss * world).backward()  # FSDP takes the mean over the processes; this makes it the sum
        progress.add(len(part.t) * world, what)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)).item()
    stats = StepStats(all_sum(loss).item(), all_sum(distill).item(), grad_norm)
    if not math.isfinite(stats.loss + stats.distill + grad_norm):
        raise ValueError(f"step {run.step + 1}: loss {stats.loss}, teacher's term {stats.distill}, gradient norm "
                         f"{grad_norm}, not finite: stopped; {settings.out} keeps what was saved. Try a lower --lr")
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_average(run)
    run.step += 1
    return stats


def autocast_losses(run, model, batch, teacher=None):
    """GaussianDiffusion.training_losses of a micro-batch, in the dtype of the run."""
    with torch.autocast(run.settings.device, torch.bfloat16, enabled=run.settings.dtype == "bf16"):
        return run.diffusion.training_losses(model, batch.x0, batch.t, batch.y, batch.noise, teacher)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Batches: everything random, as a function of (seed, step)


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


def draw_batch(run, step):
    """What step number `step` sees -> Batch. Every process draws the numbers of the whole batch and keeps its slice."""
    data = run.data
    seed = run.settings.seed
    n = run.settings.batch
    n_images = len(data.train_index)
    rng = generator(seed, 1, step)
    places = []
    for i in range(step * n, (step + 1) * n):  # counted from the start of training: image i % n_images of an epoch
        places.append(int(epoch_order(seed, i // n_images, n_images)[i % n_images]))
    index = data.train_index[places]
    flip = torch.rand(n, generator=rng) < 0.5 if data.mirror else torch.zeros(n, dtype=torch.bool)
    drop = torch.rand(n, generator=rng) < run.model.config.class_dropout_prob
    t = draw_timesteps(n, run.diffusion, rng)
    noise = torch.randn((n, *data.x.shape[2:]), generator=rng)
    rank, world = ranks()
    index, flip, drop, t, noise = (z.chunk(world)[rank] for z in (index, flip, drop, t, noise))
    x0, labels = data.read(index, flip)
    return Batch(x0, t, torch.where(drop, run.model.config.num_classes, labels), noise)


def draw_timesteps(n, diffusion, rng):
    """t (n,). For eps: uniform, as in the paper. For v: logSNR is normal, mean -2, standard deviation 2.5, and one in
    twenty is uniform. Most then fall between t = 200 and 800, where a picture's layout is decided: a short training has
    no time for nearly clean images, or nearly pure noise, which teach little. Image i of the batch draws its quantile
    between i / n and (i + 1) / n, so each batch has all noise levels (and each process a range of them)."""
    if diffusion.prediction == "eps":
        return torch.randint(1000, (n,), generator=rng)
    quantile = (torch.arange(n) + torch.rand(n, generator=rng)) / n  # spread evenly over the batch
    t = find_timesteps(-2 + 2.5 * torch.special.ndtri(quantile.double().clamp(1e-6, 1 - 1e-6)), diffusion)
    is_uniform = torch.rand(n, generator=rng) < 0.05
    return torch.where(is_uniform, torch.randint(1000, (n,), generator=rng), t)


def find_timesteps(log_snr, diffusion):
    """The last timestep at which log(alphas_cumprod / (1 - alphas_cumprod)) is at least log_snr (n,), or 0 -> (n,)
    >>> find_timesteps(torch.tensor([10.0, 3.0, -2.0, -7.0, -12.0], dtype=torch.float64), GaussianDiffusion()).tolist()
    [0, 64, 455, 830, 999]
    """
    table = torch.from_numpy(np.log(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)))  # (1000,), it falls
    return ((table >= log_snr[:, None]).sum(1) - 1).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Optimizer, average, learning rate


def make_optimizer(model, settings):
    """AdamW. Alphas learn at a fifth of the rate: one of them scales a whole layer. Decay shrinks the blocks' matrices.
    Scaling a whole matrix leaves its ternary codes as they are, so the output does not change. But Adam's steps do not
    shrink with the weights, so a code flips in fewer of them: with decay, codes go on flipping until the rate falls."""
    alphas = dict(params=[], lr_scale=0.2, decayed=False)
    matrices = dict(params=[], lr_scale=1.0, decayed=True)
    others = dict(params=[], lr_scale=1.0, decayed=False)
    for name, p in model.named_parameters():
        group = others
        if name.endswith("alphas"):
            group = alphas
        elif name.startswith("layers.") and p.ndim == 2:
            group = matrices
        group["params"].append(p)
    groups = [group for group in (others, matrices, alphas) if group["params"]]  # full precision has no alphas
    optimizer = torch.optim.AdamW(groups, settings.lr, betas=(0.9, settings.beta2), weight_decay=0.0, fused=True)
    for p in model.parameters():
        # AdamW's first state as it makes it itself, so that there are tensors to load into.
        zeros = torch.zeros_like(p.detach())
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=zeros, exp_avg_sq=zeros.clone())
    return optimizer


@torch.no_grad()
def update_average(run):
    """The exported weights: an exponential moving average of the latent weights, which is ternarized afterwards.
    Its decay grows as (1 + step) / (10 + step) up to ema_decay. With the full decay from the start, a short run would
    export mostly the random weights that it started from. 1 - decay is 9 / (10 + step), so a short run averages over
    about its last ninth. A long one averages over 1 / (1 - ema_decay) steps. In images, for 600M and for the demo:
    >>> round(256 / (1 - 0.9999)), round(16 / (1 - 0.995))
    (2560000, 3200)
    """
    decay = min(run.settings.ema_decay, (1 + run.step) / (10 + run.step)) if run.step else 0.0  # the first is a copy
    for averaged, p in zip(run.ema.parameters(), run.model.parameters()):
        averaged.lerp_(p, 1 - decay)


def set_learning_rate(optimizer, settings, step):
    """The rate warms up, then falls along a cosine to 1%: ternary codes settle only when it is small. -> the rate"""
    warmup = max(1, min(settings.warmup, settings.steps // 10))
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    lr = settings.lr * min(1, (step + 1) / warmup) * cosine
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decayed"]:
            group["weight_decay"] = settings.weight_decay if step < settings.decay_until * settings.steps else 0.0
    return lr


# ----------------------------------------------------------------------------------------------------------------------
# 4. Settings, and the start of a run. Skip this and the rest on first reading


def setting(default, help, **options):
    """A field of TrainConfig, and the flag of the same name; options are argparse's."""
    return field(default=default, metadata=dict(help=help, options=options))


@dataclass
class TrainConfig:
    """What a run is trained with. Each field is a flag; these are the paper's sizes' values, RECIPES has the others."""

    size: str = setting("tiny", "shape of the model, and its recipe", choices=list(SIZES))
    data: str = setting(None, "folder with a subfolder of images a class, or a cache of one; default: embedded digits")
    vae: str = setting(None, "train on latents of this VAE, a diffusers model or folder; made once, in OUT/latents-*")
    image_size: int = setting(32, "pixels; 256 with --vae")
    flip: bool = setting(True, "mirror half of the images of --data; --no-flip for letters, signs, left or right hands")
    init: str = setting(None, "start from this checkpoint: packed.pt, full.pt, a run folder or a released folder")
    teacher: str = setting(None, "also learn to put out what this checkpoint does on the same noisy images")
    teacher_weight: float = setting(1.0, "factor of the teacher's term in the loss")
    full_precision: bool = setting(False, "no ternary weights: the paper's baseline")
    adaln_norm: bool = setting(True, "the paper's RMS Norm after adaLN; with --full-precision there is none")
    qk_norm: bool = setting(True, "LayerNorm on queries and keys, so that bf16 is stable; with --init the checkpoint's")

    batch: int = setting(256, "images a step, of all processes together")
    micro_batch: int = setting(None, "images at a time within a step; default up to 16, as many as fit")
    steps: int = setting(1_750_000, "updates of the weights")
    lr: float = setting(1e-4, "Large-DiT's rate; nobody has verified it for ternary weights at the paper's sizes")
    warmup: int = setting(1000, "steps in which the rate rises; at most a tenth of the run")
    beta2: float = setting(0.999, "AdamW's second beta")
    weight_decay: float = setting(0.0, "of the blocks' matrices")
    decay_until: float = setting(0.5, "share of the steps after which weights decay no longer")
    ema_decay: float = setting(0.9999, "what is exported is an average of the weights; reached slowly")
    seed: int = setting(0, "of everything random")

    out: str = setting(None, "run folder; default runs/SIZE, with --init runs/fine-tuned")
    fresh: bool = setting(False, "start over where the run folder holds a state")
    save_every: int = setting(1000, "steps; the last two states are kept, packed.pt or full.pt is written anew")
    grid: int = setting(0, "images in the sample grid that is drawn at every save")
    compile: bool = setting(False, "torch.compile the blocks: faster after half a minute")
    device: str = setting(DEVICES[0], "what computes", choices=DEVICES)
    dtype: str = setting(None, "of matmuls; default bf16 where the hardware multiplies it", choices=["bf16", "fp32"])


# What a size changes. The demo sizes are tuned for minutes on two cores; why they decay: see make_optimizer.
DEMO = dict(image_size=24, batch=16, steps=4500, lr=4e-3, warmup=50, beta2=0.99, weight_decay=0.3, decay_until=1.0,
            ema_decay=0.995, qk_norm=False, grid=40)  # fmt: skip
RECIPES = {"tiny": DEMO, "small": DEMO, "4.2B": dict(batch=512, steps=1_180_000)}


def parse_args(argv=None):
    """-> dict of the settings that the command names, and `out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(TrainConfig):
        help = f.metadata["help"]
        if f.default is not None:
            recipes = [f"; {size} {recipe[f.name]}" for size, recipe in RECIPES.items() if f.name in recipe]
            help += f" (default {f.default}{''.join(recipes)})"
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, help=help, default=argparse.SUPPRESS, **kind, **f.metadata["options"])
    given = vars(parser.parse_args(argv))
    least = dict(image_size=1, batch=1, micro_batch=1, steps=1, save_every=1, grid=0, seed=0, lr=0, weight_decay=0)
    for name, value in given.items():
        if value == "" or (name in least and not value >= least[name]):  # nan, too
            expected = f"at least {least[name]}" if name in least else "a name"
            parser.error(f"argument --{name.replace('_', '-')}: got {value!r}, expected {expected}")
    if "init" in given and "size" in given:
        parser.error("--init takes its size from the checkpoint: leave out --size")
    if "vae" in given and "data" not in given:
        parser.error("argument --vae: needs --data")
    given.setdefault("out", "runs/fine-tuned" if "init" in given else f"runs/{given.get('size', 'tiny')}")
    return given


def make_settings(given, base, saved):
    """-> TrainConfig. The last that names a value counts: the dataclass, the recipe of base's size, --init and --data,
    the state (`saved`), the flags of the command (`given`)."""
    values = dict(size="B")  # a shape without a name takes B's recipe, the paper's
    for name, shape in SIZES.items():
        if (base.dim, base.n_layers) == (shape["dim"], shape["n_layers"]):
            values = dict(size=name) | RECIPES.get(name, {})
    if "init" in given:
        values |= dict(image_size=base.input_size, qk_norm=base.qk_norm)
        will_be_ternary = not given.get("full_precision", False)
        if base.ternary == will_be_ternary:  # else a norm is added or removed, and init_from sees to it
            values["adaln_norm"] = base.adaln_norm
        if base.vae and "data" not in given:
            raise ValueError(f"--init {given['init']} works on latents of {base.vae}: add --data and --vae")
    if "vae" in given:
        values["image_size"] = 256
    if Path(given.get("data", ""), "header.json").is_file():  # a cache
        header = Rows(Path(given["data"]), {}).header
        values |= dict(vae=header["vae"], image_size=header["image_size"])
    settings = TrainConfig(**values | saved | given)
    if settings.vae and "grid" not in given:
        settings.grid = 0  # a VAE takes seconds to decode an image on a CPU
    if settings.vae and os.path.isdir(settings.vae):
        settings.vae = os.path.realpath(settings.vae)  # the checkpoint names it, and is sampled from other folders
    multiplies_bf16 = cpu_has("avx512_bf16", "amx_bf16")
    if settings.device == "cuda":
        multiplies_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    settings.dtype = settings.dtype or ("bf16" if multiplies_bf16 else "fp32")
    return settings


def main(argv=None):
    # Odd images that can be read; complex numbers, which inductor does not compile; FSDP's hooks.
    warnings.filterwarnings("ignore", module=r"PIL|torch\._inductor|torch\.distributed")
    given = parse_args(argv)
    init_distributed(given.get("device", TrainConfig.device))
    with locked(Path(given["out"])):
        train(setup(given))


def setup(given):
    """Everything before the first step -> Run, filled from the newest state if there is one."""
    rank, world = ranks()
    state = None if given.get("fresh") else read_state(given["out"])
    init = None
    if "init" not in given:
        base = Config(**SIZES[given.get("size", "tiny")])
    elif state:
        base = Config(**{f.name: state["run"][f.name] for f in fields(Config)})  # --init is not read again
    else:
        if rank == 0:
            init = load_model(find_checkpoint(given["init"]))
        base = from_rank_0(init.config if init else None)
    kept = {name: state["run"][name] for name in ("micro_batch", "dtype")} if state else {}  # or sums round otherwise
    settings = make_settings(given, base, kept)
    if settings.batch % world:
        raise ValueError(f"--batch {settings.batch} does not split evenly over {world} processes")
    # What can be wrong is found before images are read, which may take hours.
    cache = open_cache(settings, base) if settings.data else None
    config = model_config(settings, base, cache)
    settings.micro_batch = settings.micro_batch or from_rank_0(choose_micro_batch(config, settings))
    description = asdict(settings) | asdict(config)
    description |= dict(teacher=settings.teacher is not None, images=len(cache.status) if cache else None)
    if state:
        check_resumed(state["run"], description)
    torch.manual_seed(settings.seed)
    with torch.device("cpu" if rank == 0 else "meta"):  # the others get their weights from rank 0
        model = DiT(config)
    if init is not None:
        init_from(model, init, settings.init)
        del init  # gigabytes, of a large model
    teacher = load_teacher(settings, config) if settings.teacher else None
    data = load_images(settings, cache) if cache else load_digits(settings)
    ema = deepcopy(model)
    shard_model(model, settings.device)
    shard_model(ema, settings.device)
    if settings.compile and can_compile(settings.device):
        frozen = teacher.layers if teacher and not teacher.config.ternary else []
        for block in [*model.layers, *frozen]:
            block.compile(dynamic=False)
    run = Run(settings, description, data, model, ema, teacher)
    if state:
        fill_tensors(run_tensors(run), state["tensors"])
        run.step = state["step"]
    if settings.fresh and rank == 0:
        for old in states(settings.out):
            old.unlink()  # only now, after all checks: a wrong command must not delete states
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(data.train_index)} images of "
          f"{settings.image_size} pixels, steps {run.step}-{settings.steps} of {settings.batch} images, "
          f"{settings.micro_batch} at a time, {world} x {settings.device} {settings.dtype}, "
          f"in {settings.out}", flush=True)  # fmt: skip
    return run


def model_config(settings, base, cache):
    """The Config of the model: `base` with the classes and the shape of the images. cache=None: of the digits."""
    header = cache.header if cache else dict(class_names=[str(i) for i in range(10)])
    names = header["class_names"]
    channels, height, _ = cache.x.shape[2:] if cache else (3, settings.image_size, settings.image_size)
    ternary = not settings.full_precision
    return replace(base, ternary=ternary, adaln_norm=settings.adaln_norm and ternary, qk_norm=settings.qk_norm,
                   in_channels=channels, input_size=height, num_classes=len(names), class_names=names,
                   vae=header.get("vae"), latent_scale=header.get("latent_scale", 1.0))  # fmt: skip


def can_compile(device):
    """Try torch.compile on something small: it needs a C++ compiler and Python's headers, or Triton on a GPU."""
    try:
        torch.compile(torch.nn.GELU())(torch.ones(1024, device=device))
        return True
    except Exception as e:
        print(f"--compile does not work here ({' '.join(str(e).split())[:100]}): training without it, slower")
        return False


def choose_micro_batch(config, settings):
    """The most images at a time that fit in memory, without a teacher. ValueError: not even one does."""
    share = settings.batch // ranks()[1]
    if settings.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if config.dim > SIZES["small"]["dim"]:
            share = min(share, 4)  # so that the progress line moves every few seconds
    fixed, image = memory_needed(config, settings.dtype, settings.device, ranks()[1])
    for n in (min(share, 16), 8, 4, 2, 1):
        if n <= share and fixed + n * image < free:
            return n
    raise ValueError(f"this run needs {(fixed + image) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: take more GPUs "
                     "(torchrun) or a smaller --size; --micro-batch 1 tries it all the same")  # fmt: skip


def free_memory():
    """Bytes that can still be taken of the machine and its container."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # macOS: all that there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int(limit.with_name("memory.current").read_text())
        cached = int(limit.with_name("memory.stat").read_text().split("inactive_file")[1].split()[0])  # can be dropped
        free = min(free, int(limit.read_text()) - used + cached)
    return free


def memory_needed(config, dtype, device, world=1):
    """-> bytes that a process holds whatever the micro-batch, and bytes more for each of its images.
    The 600M model on a CPU in bf16: 20 bytes for each of 0.61 billion parameters are 12.2 GB (fp32 weights, gradients,
    AdamW's two moments and averages: each process holds its share). int8 codes and bf16 weights, kept for the backward
    pass, are 1.8 GB, and of whole matrices in each process. An image is 16 blocks of 256 tokens of 140 kB: 0.57 GB.
    malloc keeps some of what is freed, so all is taken by 1.1: measured are 16.1 GB at 1 image and 18.1 GB at 4.
    >>> [round(n_bytes / 1e9, 2) for n_bytes in memory_needed(Config(**SIZES["600M"]), "bf16", "cpu")]
    [15.43, 0.63]
    """
    with torch.device("meta"):
        n_params = sum(p.numel() for p in DiT(config).parameters())
    value = 2 if dtype == "bf16" else 4
    fixed = 20 * n_params / world + (1 + value) * n_params
    # Of width D 4 tensors in fp32 (residual stream, norms) and 11 others: inputs of 6 matmuls, q, k, v, what is gated.
    token = 16 * config.dim + 11 * value * config.dim + 4 * value * config.ffn_dim
    if device == "cpu":
        token += (4 + value) * config.n_heads * config.n_tokens  # softmax_attention keeps its scores
    return 1.1 * fixed, 1.1 * config.n_layers * config.n_tokens * token


# ----------------------------------------------------------------------------------------------------------------------
# 5. Many processes (what they agree on of random numbers: draw_batch; of images: Data)


def all_sum(x):
    """x, in place, summed over the processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def full_tensor(x):
    """A tensor whose parts lie on all processes -> the plain tensor, on each of them."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_model(model, device):
    """Move a model to its device. Of many processes each holds a part (FSDP2), and a whole block only to compute it.
    Weights are gathered in fp32 and ternarized whole: so mean|W| is that of the whole matrix, and the codes are those
    that packing will make. Of weights gathered in bf16 (MixedPrecisionPolicy), some would round to other codes."""
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
    """Copy rank 0's `values` into the tensors of the same names, whose parts may lie on all processes."""
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


# ----------------------------------------------------------------------------------------------------------------------
# 6. The state of a run: one file, with everything that an exact resume needs

STATE = "terdit-state-4"
COMPARED = "teacher teacher_weight batch lr warmup beta2 weight_decay decay_until ema_decay seed flip images".split()


def states(out):
    """The states of a run, the newest last."""
    return sorted(Path(out).glob("state-*.pt"), key=lambda path: (len(path.name), path.name))


def run_tensors(run):
    """name -> tensor of all that a state holds: weights, averaged weights, AdamW's moments and step counts."""
    tensors = {}
    for (name, p), averaged in zip(run.model.named_parameters(), run.ema.parameters()):
        tensors[f"model.{name}"] = p.detach()
        tensors[f"ema.{name}"] = averaged.detach()
        for kind, value in run.optimizer.state[p].items():
            tensors[f"{kind}.{name}"] = value
    return tensors


def check_resumed(theirs, ours):
    """Compare what a state and the command say, but for the files of --init and --teacher. ValueError: they differ."""
    for name in [*COMPARED, *(f.name for f in fields(Config))]:
        if theirs.get(name) != ours[name]:  # None: a setting that was added since then
            raise ValueError(f"{ours['out']} was trained with {name}={theirs.get(name)!r:.99}, this command says "
                             f"{ours[name]!r:.99}: use the same, another --out, or --fresh")  # fmt: skip
    if theirs["steps"] != ours["steps"]:
        print(f"note: planned for {theirs['steps']} steps before, now {ours['steps']}: the learning rate follows")
    if ours["init"]:
        print(f"note: {ours['out']} goes on from its own state, --init {ours['init']} is not read again")


def save_state(run):
    """Write the averaged model, then the state; the last two states are kept. A kill leaves each file old or new, never
    half. After a kill between the two the run goes on from the older state, and comes to the same model again. Tensors
    are gathered one by one: a GPU holds its part and one whole matrix, rank 0's memory the whole state."""
    is_first = ranks()[0] == 0
    tensors = {}
    for name, value in run_tensors(run).items():
        value = full_tensor(value)
        if is_first:
            tensors[name] = value.cpu()
    if is_first:
        with torch.device("meta"):
            model = DiT(run.model.config)
        averages = {name: tensors[f"ema.{name}"] for name, _ in model.named_parameters()}
        model.load_state_dict(averages, assign=True)
        save_checkpoint(run.model_path, pack_model(model) if model.config.ternary else model)
        state = dict(format=STATE, step=run.step, run=run.description, tensors=tensors)
        out = Path(run.settings.out)
        atomic_write(out / f"state-{run.step:07d}.pt", lambda file: torch.save(state, file))
        for old in [*states(out)[:-2], *out.glob("state-*.tmp")]:
            old.unlink()
    barrier()


def read_state(out):
    """The newest state of a run, or None. Rank 0 alone has its tensors, which stay in the file until they are used."""
    state = None
    if ranks()[0] == 0 and states(out):
        path = states(out)[-1]
        expected = f"a state of this train.py (format {STATE!r})"
        try:
            state = read_checkpoint(path, expected, mmap=True)
            if state.get("format") != STATE:
                raise ValueError(f"{path}: not {expected}")
        except ValueError as e:
            raise ValueError(f"{e}. Delete it to go on from the one before, or --fresh") from None
    without_tensors = from_rank_0(state | dict(tensors=None) if state else None)
    return state or without_tensors


# ----------------------------------------------------------------------------------------------------------------------
# 7. Log, validation, grids, signals

FIELDS = "step loss val_loss lr grad_norm images_per_s zero flipped distill".split()  # Log.add fills a row


class Log:
    """log.csv: a row every ten steps, and at every save. Rows past a resumed step are removed.

        loss            of the training batches: mean of the steps since the last row, without the teacher's term
        distill         the teacher's term, mean of the same steps
        val_loss        loss of the averaged model on images held out, at most 4 batches of them: see validate
        lr, grad_norm   of the row's last step; the norm before clipping
        images_per_s    since the row before, without saving and drawing
        zero, flipped   share of ternary codes that are 0, and that changed in the last 100 steps (or since the resume)
    """

    def __init__(self, run):
        self.run = run
        self.codes = sample_codes(run.model)
        self.stats = []  # of the steps since the last row
        self.seconds = 0.0  # that they took
        if ranks()[0] == 0:
            path = Path(run.settings.out) / "log.csv"
            rows = path.read_text().splitlines()[1:] if run.step and path.is_file() else []
            rows = [row for row in rows if row.split(",")[0].isdecimal() and int(row.split(",")[0]) <= run.step]
            text = "\n".join([",".join(FIELDS), *rows]) + "\n"
            atomic_write(path, lambda file: file.write(text.encode()))
            self.file = open(path, "a", buffering=1)

    def add(self, stats, lr, seconds, saving):
        """Note a step; every tenth one, and one that is saved, makes a row."""
        run = self.run
        self.stats.append(stats)
        self.seconds += seconds
        if run.step % 10 and not saving:
            return
        n = len(self.stats)
        row = dict(step=run.step, loss=sum(s.loss for s in self.stats) / n, lr=lr, grad_norm=stats.grad_norm,
                   images_per_s=n * run.settings.batch / self.seconds)  # fmt: skip
        if saving and run.data.held_out:
            row["val_loss"] = validate(run)
        if run.teacher:
            row["distill"] = sum(s.distill for s in self.stats) / n
        if run.model.config.ternary and run.step % 100 == 0:
            before = self.codes
            self.codes = sample_codes(run.model)
            counts = [(self.codes == 0).sum(), (self.codes != before).sum(), len(self.codes)]
            n_zero, n_flipped, n_codes = all_sum(torch.tensor(counts, device=run.settings.device)).tolist()
            row |= dict(zero=n_zero / n_codes, flipped=n_flipped / n_codes)
        self.stats = []
        self.seconds = 0.0
        if ranks()[0] == 0:
            values = [row.get(field) for field in FIELDS]
            print(*("" if value is None else f"{value:.6g}" for value in values), sep=",", file=self.file)


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
    """Loss of the averaged model on the images held out, with the same timesteps and noise each time."""
    x0, y = (z[: 4 * run.settings.batch] for z in run.data.held_out)
    t = torch.arange(len(y)) * 1000 // len(y)
    noise = torch.randn(x0.shape, generator=generator(run.settings.seed, 3))
    total = 0.0
    for part in Batch(x0, t, y, noise).split(run.settings.micro_batch, run.settings.device):
        total += autocast_losses(run, run.ema, part)["loss"].sum().item()
    if ranks()[1] > 1:
        run.ema.reshard()  # FSDP keeps some of it whole after a forward pass
    return total / len(y)


def draw_grid(run, name):
    """A sheet of samples of the file that was just saved, the classes in turn (the first ten of more)."""
    settings = run.settings
    model = load_model(run.model_path, settings.device)
    config = model.config
    n_classes = min(10, config.num_classes)
    index = torch.arange(settings.grid)
    x = sample_latents(model, index % n_classes, index, settings.seed)
    vae = load_vae(config.vae, settings.device) if config.vae else None
    save_grid(decode(vae, x, config.latent_scale), min(settings.grid, n_classes), Path(settings.out) / name)


class StopSignal:
    """Ctrl-C, SIGTERM, a closed terminal: noted, and looked at once a step by all processes. A second one ends it."""

    def __init__(self):
        self.received = 0  # the signal's number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        # torchrun sends on what the terminal has sent to all: so a second one counts only for a single process.
        if self.received and ranks()[1] == 1:
            os._exit(128 + number)
        self.received = number
        with suppress(OSError):  # the terminal may be closed. print is not safe in a handler.
            os.write(2, f"\n{signal.Signals(number).name}: ends after this step, and saves\n".encode())

    def requested(self):
        """Whether any of the processes has received a signal."""
        return all_sum(torch.tensor(self.received)).item() > 0


# ----------------------------------------------------------------------------------------------------------------------
# 8. --init and --teacher

LABEL_TABLE = "y_embedder.embedding_table.weight"


def label_rows(their_names, ours):
    """For each row of our label table the row of theirs, or None: the classes are not the same. In sorted order
    ImageNet's 1,000 folders (n01440764, ...) are the indices 0 to 999 that name the classes of a released model."""
    theirs = [unicodedata.normalize("NFC", name) for name in their_names or []]
    if theirs != ours and len(ours) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in ours):
        ours = [str(i) for i in range(1000)]
    if sorted(theirs) != sorted(ours):
        return None
    rows = [theirs.index(name) for name in ours]
    return [*rows, len(rows)]  # the last row is the null label


def require_same(flag, theirs, ours, names):
    for name in names:
        if getattr(theirs, name) != getattr(ours, name):
            raise ValueError(f"{flag} has {name}={getattr(theirs, name)!r}, the student {getattr(ours, name)!r}")


@torch.no_grad()
def init_from(model, source, path):
    """Copy the weights of the model `source`, loaded from `path`, into a fresh model of the same shape.
    Codes become latent weights of +-|alpha| and 0, which round back to them. From full precision alphas start at
    mean|W|, and the RMS Norm's gain keeps the size of the adaLN outputs. Other classes get a new label table."""
    require_same(f"--init {path}", source.config, model.config, ["in_channels"])
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
    c = source.t_embedder(torch.linspace(0, 999, 50)) + source.y_embedder.embedding_table.weight.mean(0)
    for name in ours.keys() - theirs.keys():  # what a model in full precision lacks
        if name.endswith("alphas"):
            theirs[name] = theirs[name.replace("alphas", "weight")].abs().mean().view(1)
        elif name.endswith("adaLN_modulation.2.weight"):  # the RMS Norm's gain
            outputs = source.layers[int(name.split(".")[1])].adaLN_modulation(c)
            theirs[name] = outputs.square().mean().sqrt().expand(outputs.shape[1])
    for name in sorted(ours.keys() | theirs.keys()):
        here = list(ours[name].shape) if name in ours else "none"
        there = list(theirs[name].shape) if name in theirs else "none"
        if here != there:
            raise ValueError(f"--init {path} does not fit: its {name} is {there}, this model's {here}")
        ours[name].copy_(theirs[name])


def load_teacher(settings, config):
    """-> the model of --teacher in eval mode, its label table in our order. Each process holds all of it, packed or in
    the run's dtype; memory_needed does not count it. train_step adds its term; the log's loss and val_loss lack it."""
    teacher = load_model(from_rank_0(find_checkpoint(settings.teacher)))
    names = ["prediction", "in_channels", "input_size", "learn_sigma"] + (["latent_scale"] if config.vae else [])
    require_same(f"--teacher {settings.teacher}", teacher.config, config, names)
    rows = label_rows(teacher.config.class_names, config.class_names)
    if rows is None:
        raise ValueError(f"--teacher {settings.teacher} has the classes {teacher.config.class_names!r:.99}, --data "
                         f"{config.class_names!r:.99}: a teacher must know the same classes")  # fmt: skip
    table = teacher.y_embedder.embedding_table.weight
    table.copy_(table[rows])
    teacher.to(settings.device)
    if settings.dtype == "bf16" and teacher.config.ternary:
        return in_dtype(teacher, torch.bfloat16)
    for p in teacher.layers.parameters():
        if settings.dtype == "bf16" and p.ndim == 2:
            p.data = p.data.bfloat16()  # autocast would do so at every step. Norms stay in fp32.
    return teacher


# ----------------------------------------------------------------------------------------------------------------------
# 9. Data: the embedded digits in memory, or a memory-mapped cache of images or latents


@dataclass
class Data:
    """x (n, 1, 3, H, W) uint8 images or (n, 2, C, h, w) fp16 latents, in memory or mapped, and their labels (n,).
    Processes agree on them: digits, and what is held out, follow from the seed. Rank 0 makes a cache (open_cache), each
    fills its part (fill_cache), and after a barrier all map the same files, so it lies on a disk that all see."""

    x: np.ndarray
    labels: np.ndarray
    train_index: torch.Tensor  # the images that are learned from
    held_out: tuple | None  # x0 (m, C, H, W) and labels (m,) for validation
    mirror: bool  # flip half of the images

    def read(self, index, flip):
        """index (m,), flip (m,) bool -> x0 (m, C, H, W) fp32, images in [-1, 1] or latents; labels (m,) int64."""
        labels = torch.from_numpy(self.labels[index.numpy()])
        if self.x.dtype != np.uint8:  # latents are stored mirrored too: to mirror a latent is not to mirror its image
            return torch.from_numpy(self.x[index.numpy(), flip.long().numpy()]).float(), labels
        x0 = torch.from_numpy(self.x[index.numpy(), 0]).float() / 127.5 - 1
        return torch.where(flip[:, None, None, None], x0.flip(-1), x0), labels


def load_digits(settings):
    """-> Data of the embedded digits: 12,000 to learn from, 256 others held out."""
    x, labels = digits(12000, settings.image_size, settings.seed)
    held_out = digits(256, settings.image_size, settings.seed + 1)
    x = x.add_(1).mul_(127.5).round_().byte()[:, None].numpy()  # in place, to spare memory
    return Data(x, labels.numpy(), torch.arange(len(x)), held_out, mirror=False)


def digits(n, size=24, seed=0):
    """The embedded data set, the same for a seed: n bright, centred digits on dark gradients; a small model learns them
    in minutes. -> images (n, 3, size, size) float32 in [-1, 1], labels (n,) int64"""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    images = np.empty((n, size, size, 3), np.float32)
    for i in range(n):
        images[i] = draw_digit(labels[i], size, rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul_(2).sub_(1), torch.from_numpy(labels)


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


def open_cache(settings, base):
    """-> Rows of --data: a cache, or the one in the run folder, which is made here and filled by load_images.
    The VAE is asked first: the shape of a black image's latents is that of the model's inputs."""
    wanted = dict(vae=settings.vae, image_size=settings.image_size)
    cache = Path(settings.data)
    if not (cache / "header.json").is_file():
        wanted["source"] = str(cache.resolve())
        cache = Path(settings.out) / f"{'latents' if settings.vae else 'images'}-{settings.image_size}"
    if ranks()[0] == 0 and not (cache / "header.json").is_file():
        size = settings.image_size
        vae = load_vae(settings.vae, settings.device) if settings.vae else None
        scale = vae.config.scaling_factor if vae else 1.0
        row = encode(vae, np.zeros((1, 3, size, size), np.uint8), ["a black image"])[0]
        comes_back = decode(vae, torch.from_numpy(row[:1]).float().to(settings.device), scale)
        if comes_back.shape[-1] != size:
            raise ValueError(f"--image-size {size}: the VAE {settings.vae} gives back {comes_back.shape[-1]} pixels")
        replace(base, in_channels=row.shape[1], input_size=row.shape[2])  # refuses what does not split into patches
        names, files = list_images(Path(wanted["source"]), Path(settings.out).resolve())
        header = wanted | dict(latent_scale=scale, class_names=names, files=files)
        create_rows(cache, header, len(files), row.shape, row.dtype)
    barrier()
    return Rows(cache, wanted)


def load_images(settings, rows):
    """Fill the cache -> Data. One image in 100 is held out, at most 256, but never a class's last one."""
    fill_cache(settings, rows)
    names = rows.header["class_names"]
    labels = np.array([label for _, label in rows.header["files"]])
    good = np.flatnonzero(rows.status == THERE)
    if not len(good):
        raise ValueError(f"--data {settings.data}: none of its {len(labels)} images can be read")
    print(f"{len(good)} images of {len(names)} classes, {names!r:.99}, {len(labels) - len(good)} left out, from "
          f"{rows.folder}: delete it to read them again")  # fmt: skip
    n_left = np.bincount(labels[good])  # of each class, to learn from
    held_out = []
    for i in good[torch.randperm(len(good), generator=generator(settings.seed, 2)).numpy()]:
        if len(held_out) < min(256, len(good) // 100) and n_left[labels[i]] > 1:
            n_left[labels[i]] -= 1
            held_out.append(i)
    data = Data(rows.x, labels, torch.from_numpy(np.setdiff1d(good, held_out)), None, settings.flip)
    if held_out:
        data.held_out = data.read(torch.tensor(held_out), torch.zeros(len(held_out), dtype=torch.bool))
    return data


def fill_cache(settings, rows):
    """Put each image through `encode`, once. A stopped run goes on where it was. Processes share the work."""
    size = settings.image_size
    own = rows.missing(16)[ranks()[0] :: ranks()[1]]
    vae = load_vae(settings.vae, settings.device) if own and settings.vae else None
    progress = Progress(sum(len(part) for part in own))
    with ThreadPoolExecutor(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1) as pool:
        for part in own:
            names = [rows.header["files"][i][0] for i in part]
            paths = [Path(rows.header["source"], name) for name in names]
            images = list(pool.map(read_image, paths, [size] * len(part)))  # Pillow decodes outside Python's lock
            status = [UNUSABLE if image is None else THERE for image in images]
            images = [np.zeros((3, size, size), np.uint8) if image is None else image for image in images]
            rows.put(part, encode(vae, np.stack(images), names), status)
            progress.add(len(part), "reading images")
    barrier()


def encode(vae, images, names):
    """Images (n, 3, H, W) uint8 of the files `names` -> rows of the cache: the images, (n, 1, 3, H, W), or with a VAE
    scaled latents, plain and mirrored, (n, 2, C, h, w) fp16: means of the VAE's posteriors, not draws as in DiT."""
    if vae is None:
        return images[:, None]
    both = np.stack([images, images[..., ::-1]], axis=1)  # (n, 2, 3, H, W): as they are, and mirrored
    x = torch.from_numpy(both).to(vae.device).float() / 127.5 - 1
    z = vae.encode(x.flatten(0, 1)).latent_dist.mode() * vae.config.scaling_factor
    z = z.unflatten(0, (len(images), 2)).half()
    for latents, name in zip(z, names):
        if not latents.isfinite().all():
            raise ValueError(f"the VAE {vae.config._name_or_path} puts out values that are not finite for {name}")
    return z.cpu().numpy()


def list_images(folder, out):
    """-> names of the classes, and [[path within the folder, label], ...]. A subfolder with images is a class.
    Two ways to write a name (é or e + accent) are one class: names are in Unicode's form NFC, which keyboards type."""
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    ours = {out, *out.parents} if out else {}  # a run folder within --data holds grids, no class
    files = []  # path within the folder, name of its class
    n_unused = 0
    for root, subfolders, names in os.walk(folder, followlinks=True):
        hidden = {name for name in subfolders if name.startswith(".") or name in ("__MACOSX", "@eaDir")}
        subfolders[:] = [name for name in subfolders if name not in hidden and Path(root, name).resolve() not in ours]
        for name in subfolders:
            os.scandir(Path(root, name)).close()  # os.walk would leave out what it cannot list, and its class with it
        for path in [Path(root, name) for name in names]:
            inside = path.relative_to(folder).parts
            is_image = path.suffix.lower() in Image.registered_extensions() and path.name[0] != "." and path.is_file()
            if is_image and len(inside) > 1:
                files.append([os.path.join(*inside), unicodedata.normalize("NFC", inside[0])])
            else:
                n_unused += 1
    if not files:
        raise ValueError(f"--data {folder}: expected one subfolder of images a class, found no image in any")
    if n_unused:
        print(f"{n_unused} files in {folder} are not used: no images that Pillow reads, or outside the class folders")
    names = sorted({name for _, name in files})
    # Where the root of a data set was named instead of its folder "train", images lie one folder deeper.
    deeper = {path for path, _ in files if path.count(os.sep) > 1}
    in_train = [path for path, name in files if name.lower().startswith("train")]
    if len(deeper) == len(files) or len(deeper.intersection(in_train)) > len(in_train) / 2:
        wrong = Path(in_train[0]).parts[0] if in_train else names[0]
        raise ValueError(f"--data {folder}: {wrong} holds only folders, or mostly: did you mean --data "
                         f"{folder / wrong}? If {names!r:.99} are the classes, put the images of {wrong} right into it")
    labels = {name: label for label, name in enumerate(names)}
    return names, sorted([path, labels[name]] for path, name in files)


def load_image(path, size):
    """What Pillow reads -> uint8 (3, size, size): upright, RGB on white, centre-cropped (ADM: to whole pixels)"""
    with Image.open(path) as image:
        if image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))  # decode no larger than needed
        image.load()
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # theirs has 16
            raise ValueError("its grey has 32 bits, and nothing says which number is white")
        with suppress(Exception):  # Pillow raises whatever it likes on broken EXIF data. The pixels are fine.
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.reduce(2)
    # fit() crops before it resizes: 1 x 100,000 pixels would take gigabytes if all of them were enlarged.
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def read_image(path, size):
    """load_image, or None for a file that is no picture, which is named."""
    try:
        return load_image(path, size)
    except Exception as e:  # Pillow's decoders raise whatever they like on damaged files
        # Only the system's errors have a number: a disk that is gone must not make its pictures unusable for good.
        # EINVAL alone may be the picture's fault, which sends the decoder to a place before the file's start.
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise
        sys.stderr.write(f"{path}: left out, cannot be read ({type(e).__name__}: {first_line(e)})\n")
        return None


if __name__ == "__main__":
    run_main(main)
