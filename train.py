"""Train a ternary diffusion transformer.

    python train.py                                the CPU demo: digits in minutes
    python train.py --data DIR --image-size 64     your images, one subfolder a class
    python train.py --size 600M --data DIR         the paper's model

The same command resumes a run that was stopped. Everything random is a function of --seed and the step, so a resumed
run equals an uninterrupted one, on a CPU bit for bit.
"""

import argparse
import colorsys
import csv
import math
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sample import STEPS, Progress, check_common, generator, positive, run, sample_images, save_grid
from terdit import SIZES, Config, DiT, GaussianDiffusion, PackedTernaryLinear
from terdit import atomic_write, load_model, pack_model, read_checkpoint, save_checkpoint, unpack_ternary

# What a size is trained with unless a flag says otherwise. The demo's was tuned for minutes on two cores; the paper's
# sizes follow the paper: 448M images at 600M, in batches of 256.
DEMO = dict(batch=16, steps=4500, lr=4e-3, warmup=50, ema=0.995, betas=(0.9, 0.99), image_size=24)
PAPER = dict(batch=256, steps=1_750_000, lr=1e-4, warmup=1000, ema=0.9999, betas=(0.9, 0.999), image_size=32)
STATE = "terdit-state-1"

# ----------------------------------------------------------------------------------------------------------------------
# Data: arrays of uint8 images in memory


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
        inverse = (
            rotation @ [[stretch, slant], [0, 1]] * rng.uniform(0.43, 0.53) * 192 / big
        )  # of a pixel to its source
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


def load_folder(folder, size):
    """A folder with one subfolder of images a class -> uint8 images (n, 3, size, size), labels (n,), class names.

    Held in memory. A file that cannot be read is named and left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    names = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise ValueError(f"--data {folder}: expected one subfolder of images a class, found no subfolder")
    endings = Image.registered_extensions()
    files = [
        (f, label)
        for label, name in enumerate(names)
        for f in sorted((folder / name).rglob("*"))
        if f.suffix.lower() in endings
    ]
    if not files:
        raise ValueError(f"--data {folder}: its {len(names)} class folders hold no images")
    images, keep = np.empty((len(files), 3, size, size), np.uint8), []
    progress = Progress(len(files), "reading images")

    def read(i):
        try:
            images[i] = load_image(files[i][0], size)
            return None
        except Exception as e:  # Pillow's decoders raise whatever they like on damaged files
            return f"{files[i][0]}: left out, cannot be read ({type(e).__name__}: {e})"

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        for i, problem in enumerate(pool.map(read, range(len(files)))):
            progress(1)
            keep.append(i) if problem is None else print(problem, file=sys.stderr)
    if not keep:
        raise ValueError(f"--data {folder}: none of its {len(files)} images can be read")
    labels = torch.tensor([files[i][1] for i in keep])
    for label in sorted(set(range(len(names))) - set(labels.tolist())):
        print(f"class {names[label]!r} has no image that can be read: it will not be learned", file=sys.stderr)
    print(f"{len(keep)} images of {len(names)} classes from {folder}, {len(files) - len(keep)} left out")
    return torch.from_numpy(images if len(keep) == len(files) else images[keep]), labels, names


def load_data(args, size):
    """-> uint8 images (n, 3, size, size), labels (n,), class names, whether a mirrored image is as good."""
    if args.data:
        return *load_folder(args.data, size), True
    images, labels = digits(12000, size, args.seed)
    return to_bytes(images), labels, [str(i) for i in range(10)], False


def to_bytes(images):
    return ((images + 1) * 127.5).round().byte()


# ----------------------------------------------------------------------------------------------------------------------
# Everything random, as a function of (seed, step)


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, 0, epoch))


def draw_batch(data, config, args, diffusion, step):
    """What step number `step` sees: x0 (N, C, H, W) in [-1, 1], t, y with labels dropped, and the noise."""
    images, labels, _, mirror = data
    rng = generator(args.seed, 1, step)
    places = range(step * args.batch, (step + 1) * args.batch)
    index = torch.tensor([epoch_order(args.seed, p // len(images), len(images))[p % len(images)] for p in places])
    x0, y = images[index].float() / 127.5 - 1, labels[index]
    if mirror:
        flip = torch.rand(len(x0), generator=rng) < 0.5
        x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
    drop = torch.rand(len(y), generator=rng) < config.class_dropout_prob
    y = torch.where(drop, config.num_classes, y)  # the null label, for guidance
    return x0, draw_timesteps(len(x0), diffusion, rng), y, torch.randn(x0.shape, generator=rng)


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
    p.add_argument("--size", choices=SIZES, help="default tiny")
    p.add_argument("--data", help="folder with a subfolder of images for each class; default: the embedded digits")
    p.add_argument("--image-size", type=positive, help="pixels; default 24 for tiny, else 32")
    p.add_argument("--batch", type=positive, help="images a step; default 16 for tiny, else 256")
    p.add_argument(
        "--micro-batch", type=positive, help="images at a time within a step; default all, 32 at 600M and up"
    )
    p.add_argument("--steps", type=positive, help=f"default {DEMO['steps']:,} for tiny, else {PAPER['steps']:,}")
    p.add_argument("--lr", type=float, help="default 4e-3 for tiny, else 1e-4")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="run folder; default runs/SIZE")
    p.add_argument("--init", metavar="CKPT", help="start from a packed.pt, state.pt or released folder (fine-tuning)")
    p.add_argument("--full-precision", action="store_true", help="no ternary weights (the paper's baseline)")
    p.add_argument("--no-adaln-norm", action="store_true", help="no RMS Norm behind adaLN (the paper's ablation)")
    p.add_argument("--fresh", action="store_true", help="start over where the run folder holds a state")
    p.add_argument("--save-every", type=positive, default=1000, metavar="STEPS", help="default 1000")
    p.add_argument("--sample-every", type=positive, metavar="STEPS", help="default: a quarter of the run")
    p.add_argument(
        "--grid",
        type=int,
        metavar="N",
        help="images in a sample grid, 0 for none; default 4 a class, up to 40; none for large models on a CPU",
    )
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks: faster after half a minute")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["fp32", "bf16"], help="of matmuls; default bf16 where the hardware has it")
    args = p.parse_args(argv)
    if args.lr is not None and not args.lr > 0:
        p.error(f"argument --lr: got {args.lr}, expected a number above 0")
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
        print(f"--compile does not work here ({str(e).strip().splitlines()[0][:100]}): training without it, slower")
        return False


def read_init(path):
    """What --init names -> its Config, and its state dict with full-precision weights."""
    if Path(path).is_file():
        ckpt = read_checkpoint(path, "a checkpoint or training state of this project")
        if isinstance(ckpt, dict) and ckpt.get("format") == STATE:
            return Config(**ckpt["config"]), ckpt["ema"]
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
    ours = model.state_dict()
    for name in ours.keys() | state.keys():
        if name == "y_embedder.embedding_table.weight" and name not in state:
            continue
        if name.endswith("alphas") and name not in state:  # from full precision: alpha starts at the quantizer's scale
            ours[name].copy_(state[name.replace("alphas", "weight")].abs().mean())
        elif name not in ours or name not in state or ours[name].shape != state[name].shape:
            shapes = [tuple(d[name].shape) if name in d else "none" for d in (state, ours)]
            raise ValueError(f"--init {args.init} does not fit: its {name} is {shapes[0]}, this model's {shapes[1]}")
        else:
            ours[name].copy_(state[name])
    return model


def make_optimizer(model, lr, betas):
    """AdamW without decay. Alphas learn at a fifth of the rate: they are small numbers that scale whole layers."""
    alphas = [p for n, p in model.named_parameters() if n.endswith("alphas")]
    others = [p for n, p in model.named_parameters() if not n.endswith("alphas")]
    groups = [dict(params=others, scale=1.0)] + ([dict(params=alphas, scale=0.2)] if alphas else [])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=0.0, fused=True)


def load_state(path, config, n_images, args):
    """The training state in `path` if it is this run's, or ValueError that names the field that differs."""
    state = read_checkpoint(path, "a training state of this project")
    if not isinstance(state, dict) or state.get("format") != STATE:
        raise ValueError(f"{path}: not a training state of this project (format {STATE!r})")
    names = ("batch", "lr", "seed", "init", "dtype")
    try:
        here = asdict(config) | {"images": n_images} | {k: getattr(args, k) for k in names}
        there = state["config"] | {"images": state["images"]} | {k: state["args"][k] for k in (*names, "steps")}
        step = state["step"]
    except (LookupError, TypeError) as e:
        raise ValueError(f"{path}: damaged: {e} is missing; --fresh starts over") from None
    for field in here:
        if here[field] != there.get(field):
            difference = f"{field}={there.get(field)!r}, this command says {here[field]!r}"
            raise ValueError(f"{path} was trained with {difference}: use the same, another --out, or --fresh")
    if step > args.steps:
        raise ValueError(f"{path} is at step {step} already, --steps says {args.steps}")
    if state["args"]["steps"] != args.steps:
        print(f"note: planned for {state['args']['steps']} steps before, now {args.steps}: the learning rate follows")
    return state


class Log:
    """log.csv: one row each few steps. Rows past a resumed step are dropped, so the file reads as one run."""

    FIELDS = ["step", "loss", "grad_norm", "lr", "images_per_s"]

    def __init__(self, path, step):
        rows = []
        if step and path.is_file():
            with open(path, newline="") as file:
                rows = [
                    r for r in csv.reader(file) if len(r) == len(self.FIELDS) and r[0].isdigit() and int(r[0]) <= step
                ]
        self.file = open(path, "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows([self.FIELDS, *rows])

    def __call__(self, *row):
        self.writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
        self.file.flush()


def clock(seconds):
    days, seconds = divmod(int(seconds), 86400)
    return f"{days} days " * (days > 0) + f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def main(argv=None):
    args = parse_args(argv)
    if args.init and args.size:
        raise ValueError("--init takes its size from the checkpoint: leave out --size")
    base, init_state = read_init(args.init) if args.init else (Config(**SIZES[args.size or "tiny"]), None)
    if base.vae:
        raise ValueError(f"--init {args.init} works on 4 channels, latents of {base.vae}; images here have 3")
    recipe = dict(DEMO if base.prediction == "v" else PAPER)
    if args.init:
        recipe["image_size"] = base.input_size
    for name in ("batch", "steps", "lr", "image_size"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    if args.image_size % base.patch_size:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of the patch size {base.patch_size}")
    args.dtype = args.dtype or ("bf16" if bf16_is_fast(args.device) else "fp32")
    args.out = Path(args.out or ("runs/fine-tuned" if args.init else f"runs/{args.size or 'tiny'}"))
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise PermissionError(f"--out {args.out}: not writable")
    torch.manual_seed(args.seed)

    # Data, model, optimizer, EMA, and the state of an earlier run if there is one
    data = load_data(args, args.image_size)
    images, _, class_names, _ = data
    config = replace(
        base,
        input_size=args.image_size,
        in_channels=images.shape[1],
        num_classes=len(class_names),
        class_names=class_names,
        ternary=not args.full_precision,
        # Large-DiT has no norm there; a model that is fine-tuned keeps what it has.
        adaln_norm=base.adaln_norm and not args.no_adaln_norm and (not args.full_precision or bool(args.init)),
    )
    if args.init and base.class_names != class_names:
        init_state = {k: v for k, v in init_state.items() if not k.startswith("y_embedder.")}
        print(f"new label table: {args.init} has {base.num_classes} classes, here are {len(class_names)}")
    model = build_model(args, config, init_state).to(args.device)
    diffusion = GaussianDiffusion(prediction=config.prediction)
    optimizer = make_optimizer(model, args.lr, recipe["betas"])
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe["ema"]))
    n_params = sum(p.numel() for p in model.parameters())
    if args.compile and can_compile(args.device):
        for layer in model.layers:
            layer.compile(dynamic=False)
    state_file, step = args.out / "state.pt", 0
    if args.fresh:
        state_file.unlink(missing_ok=True)
    if state_file.exists():
        state = load_state(state_file, config, len(images), args)
        try:
            model.load_state_dict(state["model"])
            ema.module.load_state_dict(state["ema"])
            ema.n_averaged.copy_(state["n_averaged"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{state_file}: damaged: {' '.join(str(e).split())[:200]}; --fresh starts over") from None
        del state
    micro = args.micro_batch or (32 if n_params > 200e6 else args.batch)
    print(f"{n_params / 1e6:.2f}M parameters{' in full precision' * args.full_precision}, {len(images)} images of "
          f"{args.image_size}x{args.image_size}, steps {step}-{args.steps} of {args.batch} images, "
          f"{args.device} {args.dtype}, in {args.out}")  # fmt: skip

    grid = args.grid
    if grid is None:
        grid = min(40, 4 * config.num_classes)
        if args.device == "cpu" and n_params > 50e6:
            grid = 0
            print("no sample grids: a model of this size takes minutes an image on a CPU (--grid N draws them)")

    def draw_grid(model, path):
        columns = min(10, config.num_classes, grid)
        y = torch.arange(grid) % min(10, config.num_classes)
        save_grid(sample_images(model.eval(), y, args.seed, progress=Progress(grid * STEPS)), columns, path)

    def save():
        state = dict(
            format=STATE,
            step=step,
            config=asdict(config),
            args=vars(args) | {"out": str(args.out)},
            images=len(images),
            model=model.state_dict(),
            ema=ema.module.state_dict(),
            n_averaged=ema.n_averaged,
            optimizer=optimizer.state_dict(),
        )
        atomic_write(state_file, lambda file: torch.save(state, file))

    stop, usual = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number, frame):
        stop.append(number)  # looked at once a step
        signal.signal(number, usual[number])  # a second one stops at once

    for s in usual:
        signal.signal(s, on_signal)

    log = Log(args.out / "log.csv", step)
    sample_every = args.sample_every or max(1, args.steps // 4)
    losses, shown, start, first = [], 0.0, time.time(), step
    while step < args.steps and not stop:
        # The learning rate warms up, then falls along a cosine to 1%: ternary codes settle only when it is small.
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        lr = args.lr * min(1, (step + 1) / recipe["warmup"]) * decay
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        # Gradients add up over micro-batches, which bounds the memory of activations.
        loss = 0.0
        for parts in zip(*(z.split(micro) for z in draw_batch(data, config, args, diffusion, step))):
            x0, t, y, noise = (z.to(args.device) for z in parts)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
                part = diffusion.training_losses(model, x0, t, y, noise)["loss"].sum() / args.batch
            part.backward()
            loss += part.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kept = f"{state_file} holds the last good state" if state_file.exists() else "nothing was saved yet"
            raise ValueError(f"step {step}: loss {loss}, gradient norm {grad_norm}: stopped; {kept}. Try a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        step += 1
        losses.append(loss)

        now = time.time()
        rate = (step - first) / (now - start)  # steps a second
        if step % 10 == 0 or step == args.steps:
            log(step, sum(losses) / len(losses), grad_norm, lr, rate * args.batch)
        live = sys.stdout.isatty()
        if now - shown > (0.5 if live else 15) or step == args.steps:
            shown = now
            mean, left = sum(losses) / len(losses), clock((args.steps - step) / rate)
            print(f"{chr(13) * live}step {step}/{args.steps}  loss {mean:.4f}  grad {grad_norm:.2f}  lr {lr:.1e}  "
                  f"{rate * args.batch:.3g} images/s  ETA {left}   ", end="" if live else "\n", flush=True)  # fmt: skip
        if step % 10 == 0:
            losses.clear()
        if step % args.save_every == 0 and step < args.steps:
            save()
        if grid and step % sample_every == 0 and step < args.steps:
            before = time.time()
            draw_grid(ema.module, args.out / f"grid-{step:07d}.png")
            start += time.time() - before  # not training time
    print()
    save()
    for s, handler in usual.items():
        signal.signal(s, handler)
    if stop:
        print(
            f"stopped at step {step}, saved in {state_file}; the same command{' without --fresh' * args.fresh} goes on from here"
        )
        sys.exit(128 + stop[0])

    name = "full.pt" if args.full_precision else "packed.pt"
    save_checkpoint(args.out / name, ema.module if args.full_precision else pack_model(ema.module))
    on_disk, dense = (args.out / name).stat().st_size / 1e6, 4 * n_params / 1e6
    print(f"{args.out / name}: {on_disk:.2f} MB; in fp32 the weights would take {dense:.2f} MB")
    if grid:
        draw_grid(load_model(args.out / name, args.device), args.out / "grid.png")  # the picture comes from the file
        print(f"{args.out / 'grid.png'}: samples of {name}")


if __name__ == "__main__":
    run(main)
