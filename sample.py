"""Sample images from a checkpoint: noise -> guided denoising loop -> a picture, or an .npz for FID.

    python sample.py --ckpt runs/demo                            a grid of every class
    python sample.py --ckpt runs/demo --classes 7 3 --n 20       of some classes
    python sample.py --ckpt TerDiT-600M/ --classes 207 --cfg 4   a released folder
    python sample.py --ckpt runs/demo --npz 1000 --out x.npz     what ADM's evaluator reads

`torchrun --nproc-per-node=8 sample.py --npz ...` shares the work. After a stop, repeat the command.
"""

import argparse
import io
import json
import math
import os
import resource
import secrets
import sys
import time
import traceback
import unicodedata
import zipfile
import zlib
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from terdit import NUM_TIMESTEPS, atomic_write, check_writable, cpu_kernel, cuda_kernel
from terdit import diffusion_of, first_line, in_dtype, load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
SAMPLERS = ["ddpm", "ddim", "dpm"]  # of sample_latents
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def main(argv=None):
    args = parse_args(argv)
    if args.device == "cuda":
        torch.cuda.set_device(torchrun().local_rank)
    path = find_checkpoint(args.ckpt)
    model = load(path, args)
    config = model.config
    vae = load_vae(config.vae, args.device) if config.vae else None
    names = class_names(config)
    classes = pick_classes(args.classes, config, everything=args.npz is not None)
    n = args.npz or args.n or 4 * len(classes)
    sampler = args.sampler or ("ddpm" if config.vae else "dpm")
    # For latents the paper's 250, else 16: so dpm, of second order, is as good on digits as ddpm
    # with 25 (tests/RESULTS.md).
    steps = args.steps or (16 if sampler == "dpm" or not config.vae else 250)
    options = dict(
        seed=args.seed,
        cfg_scale=args.cfg,
        steps=steps,
        sampler=sampler,
        guided_channels=args.guided_channels,
    )
    print(f"{path}: {n} images of the classes {[names[row] for row in classes[:n]]!r:.200}")

    def draw_images(index, progress):
        y = torch.tensor(classes)[index % len(classes)]  # the classes take turns
        return draw(model, vae, y, index, progress=progress, **options)

    start = time.monotonic()
    if args.npz:
        settings = options | dict(
            n=n,
            classes=classes,
            batch=args.batch,
            n_heads=config.n_heads,
            vae=config.vae,
            dtype=args.dtype,
            checksum=checksum(model),  # of the weights: their file may move
        )
        labels = torch.tensor(class_numbers(names))[classes].numpy()  # the data set's own numbers
        n_drawn = sample_npz(args.out, draw_images, labels, settings)
    else:
        columns = min(len(classes), n)
        check_picture(args.out, model, vae, n, columns)
        progress = Progress(n)
        images = [draw_images(index, progress) for index in torch.arange(n).split(args.batch)]
        save_grid(torch.cat(images), columns, args.out)
        n_drawn = n
    report(model, args, n_drawn, steps, time.monotonic() - start)
    print(f"wrote {args.out}")


def draw(model, vae, y, index, **options):
    """Images (n, 3, H, W) fp32 in [-1, 1], on the CPU. Arguments as in sample_latents."""
    x = sample_latents(model, y, index, **options)
    if not x.isfinite().all():
        raise ValueError("the samples are not finite; is the checkpoint damaged?")
    return decode(vae, x, model.config.latent_scale)


@torch.no_grad()
def sample_latents(
    model,
    y,
    index,
    seed=0,
    cfg_scale=1.5,
    steps=16,
    sampler="dpm",
    guided_channels=None,
    progress=None,
):
    """The guided denoising loop: labels y (n,) -> x_0 (n, C, H, W) fp32.

    index (n,): each image's number. Its noise is a function of the seed and this number, so it does
    not depend on the batch. (Rounding does: matmuls of another height add in another order.)
    """
    config = model.config
    device = next(model.parameters()).device
    diffusion = diffusion_of(config, steps)
    shape = (config.in_channels, config.input_size, config.input_size)
    generators = [generator(seed, int(i)) for i in index]

    def draw_noise(x=None):  # the sampler passes x, which is not needed
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    y = torch.as_tensor(y).to(device)
    null = torch.full_like(y, config.num_classes)

    def model_fn(x, t):
        if cfg_scale == 1:
            out = model(x, t, y)
        else:
            # uncond + cfg_scale * (cond - uncond), in one batch: weights are read once.
            twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
            out = model.forward_with_cfg(*twice, cfg_scale, guided_channels)[: len(x)]
        if progress:
            progress.add(len(x) / steps, "sampling")  # each sampler calls this once a step
        return out

    clip = config.vae is None  # pixels lie in [-1, 1], latents do not
    noise = draw_noise()  # x_T
    if sampler == "ddpm":
        return diffusion.p_sample_loop(model_fn, noise, clip, draw_noise)
    if sampler == "ddim":
        return diffusion.ddim_sample_loop(model_fn, noise, clip)
    if sampler == "dpm":
        return diffusion.dpm_sample_loop(model_fn, noise, clip)
    raise ValueError(f"sampler={sampler!r}, expected one of {SAMPLERS}")


# --------------------------------------------------------------------------------------------------
# The checkpoint and its classes


def find_checkpoint(path):
    """A run folder of train.py -> its packed.pt or full.pt. Other paths stay as they are."""
    found = [Path(path, name) for name in ("packed.pt", "full.pt") if Path(path, name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} holds {found[0].name} and {found[1].name}: name one of them")
    return found[0] if found else Path(path)


def load(path, args):
    """The model in eval mode, with what the command says about it."""
    overrides = dict(n_heads=args.n_heads) if args.n_heads else {}
    model = load_model(path, args.device, **overrides)
    config = model.config
    if args.vae and not config.vae:
        raise ValueError(f"--vae {args.vae}: {path} draws pixels, there are no latents to decode")
    config.vae = args.vae or config.vae
    if args.dtype is None:
        # Ternary models of latents are large. int8 is faster, if the CPU has instructions for it.
        has_int8 = config.ternary and config.vae and cpu_has("avx512_vnni", "avx_vnni")
        on_cpu = "int8" if has_int8 else "fp32"
        args.dtype = "bf16" if args.device == "cuda" else on_cpu
    return in_dtype(model, DTYPES[args.dtype])


def class_names(config):
    return config.class_names or [str(row) for row in range(config.num_classes)]


def pick_classes(wanted, config, everything=False):
    """Class names -> rows of the label table: "207" is the name of row 121 in a released TerDiT.

    wanted=None: all classes if they are at most ten (everything=True: any number), else eight.
    """
    names = class_names(config)
    if wanted is None:
        is_all = everything or len(names) <= 10
        return list(range(len(names) if is_all else 8))
    # é may be one letter or e + accent: compared is Unicode's form NFC, which keyboards type.
    names = [unicodedata.normalize("NFC", name) for name in names]
    rows = []
    for name in wanted:
        name = unicodedata.normalize("NFC", name)
        if names.count(name) != 1:
            raise ValueError(f"class {name!r} is not one of the {len(names)}: {names!r:.200}")
        rows.append(names.index(name))
    return rows


def class_numbers(names):
    """The data set's own numbers: in a released TerDiT (see released_config) row 121 is 207."""
    numbers = [int(name) for name in names if name.isdecimal()]
    if len(set(numbers)) == len(names):
        return numbers
    return list(range(len(names)))


# --------------------------------------------------------------------------------------------------
# Pictures and latents


def load_vae(name, device):
    """The VAE between images and latents: a diffusers model, by name or folder. ValueError."""
    try:
        from diffusers import AutoencoderKL

        kind = AutoencoderKL.load_config(name).get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"it is a {kind}, expected an AutoencoderKL")
        vae, info = AutoencoderKL.from_pretrained(
            name, output_loading_info=True, low_cpu_mem_usage=False
        )
    except ImportError:
        raise ValueError(f"the latents of the VAE {name} need: pip install diffusers") from None
    except Exception as e:  # diffusers and its hub raise errors of many kinds
        reason = first_line(e)
        raise ValueError(
            f"the VAE {name} cannot be loaded ({reason}). If it has moved, name it with --vae"
        ) from None
    if info["missing_keys"]:
        raise ValueError(f"the VAE {name} is not whole: it lacks {min(info['missing_keys'])}")
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(f"the VAE {name} shifts its latents: our Config has no place for that")
    return vae.to(device).eval().requires_grad_(False)


def decode(vae, x, latent_scale):
    """x_0 (n, C, h, w) -> images (n, 3, H, W) fp32 in [-1, 1], on the CPU. vae=None: pixels."""
    if vae:
        if vae.config.latent_channels != x.shape[1]:
            raise ValueError(f"the VAE has {vae.config.latent_channels} channels, not {x.shape[1]}")
        x = torch.cat([vae.decode(z / latent_scale).sample for z in x.split(1)])  # to spare memory
    return x.float().clamp(-1, 1).cpu()


def to_uint8(x):
    """Pixels of [-1, 1] -> 0 to 255, of the same shape. from_uint8 is the way back."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def from_uint8(x):
    return x.float() / 127.5 - 1


def encode_grid(x, columns, path):
    """Images (n, 3, H, W) -> the bytes of one picture, in the format of path's ending.

    ValueError: Pillow cannot write it so.
    """
    n, _, h, w = x.shape
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, h, w, 3), 255, np.uint8)  # empty places stay white
    cells[:n] = to_uint8(x).permute(0, 2, 3, 1).numpy()
    cells = cells.reshape(rows, columns, h, w, 3).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    picture = Image.fromarray(cells.reshape(rows * h, columns * w, 3))
    zoom = max(1, min(96 // w, 1600 // picture.width))
    picture = ImageOps.scale(picture, zoom, Image.Resampling.NEAREST)
    file = io.BytesIO()
    try:
        picture.save(file, Image.registered_extensions().get(Path(path).suffix.lower()))
        size = Image.open(file).size
    except Exception as e:  # Pillow's encoders raise whatever they like
        raise ValueError(f"--out {path}: no picture can be written so ({first_line(e)})") from None
    if size != picture.size:
        raise ValueError(f"--out {path}: its format cuts {picture.size} pixels down to {size}")
    return file.getvalue()


def save_grid(x, columns, path):
    """Write images (n, 3, H, W) as one picture. The ending of path names its format."""
    picture = encode_grid(x, columns, path)
    atomic_write(path, lambda file: file.write(picture))


def check_picture(path, model, vae, n, columns):
    """Encode a blank sheet first: an --out that cannot be written is found before hours of drawing.
    """
    check_writable(path)
    config = model.config
    device = next(model.parameters()).device
    x = torch.zeros(1, config.in_channels, config.input_size, config.input_size, device=device)
    encode_grid(decode(vae, x, config.latent_scale).expand(n, -1, -1, -1), columns, path)


# --------------------------------------------------------------------------------------------------
# An .npz of many images


def sample_npz(out, draw_images, labels, settings):
    """Draw n images, whose labels (classes,) take turns, into the .npz file `out`. -> how many

    Each batch is a file of its own in OUT.part, drawn only if it is not there, with noise of (seed,
    number of the image). So the images do not depend on the number of processes, nor on stops. No
    process waits for another: the first one also draws what is missing after its own batches, from
    the last one backwards. Then it writes the .npz. ValueError: the folder has batches of other
    settings.
    """
    check_writable(out)
    part = Path(f"{os.path.realpath(out)}.part")
    part.mkdir(exist_ok=True)
    agree_on(part / "settings.json", settings)
    n = settings["n"]
    batch = settings["batch"]
    starts = range(0, n, batch)
    launch = torchrun()

    def path_of(start):
        return part / f"{start:09d}.npy"

    def numbers_from(start):
        return torch.arange(start, min(start + batch, n))

    n_drawn = 0
    for mine in (starts[launch.rank :: launch.world], starts[::-1]):
        drawn = [int(path.stem) for path in part.glob("*.npy") if path.stem.isdecimal()]
        n_missing = batch * (len(mine) - sum(start in mine for start in drawn))
        if starts[-1] in mine and starts[-1] not in drawn:
            n_missing -= batch * len(starts) - n  # the last batch may be smaller
        progress = Progress(n_missing)
        for start in mine:
            if path_of(start).exists():
                continue
            index = numbers_from(start)
            images = to_uint8(draw_images(index, progress)).permute(0, 2, 3, 1).numpy()
            atomic_write(path_of(start), lambda file: np.save(file, images))
            n_drawn += len(index)
        if launch.rank > 0:
            return n_drawn

    shape = np.load(path_of(0)).shape[1:]  # (H, W, 3)
    images = (np.load(path_of(start)) for start in starts)
    y = (labels[numbers_from(start) % len(labels)] for start in starts)

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            write_array(archive, "arr_0", (n, *shape), np.uint8, images)
            write_array(archive, "arr_1", (n,), np.int64, y)

    atomic_write(out, write)
    print(f"{part} holds the same images; it may be deleted")
    return n_drawn


def agree_on(path, settings):
    """Whoever comes first writes the settings. The others must have the same. ValueError."""
    own = path.with_name(f"{secrets.token_hex(4)}.tmp")
    atomic_write(own, lambda file: file.write(json.dumps(settings).encode()))
    try:
        os.link(own, path)  # whole from its first moment on
    except FileExistsError:
        pass
    finally:
        own.unlink()
    theirs = json.loads(path.read_text())
    require_same(path.parent, theirs, settings, "take another --out, or delete that folder")


def checksum(model):
    """CRC-32 of all weights of a model."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy(), crc)
    return crc


def write_array(archive, name, shape, dtype, parts):
    """Add an array to an .npz as numpy would, part after part: memory does not grow with it."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = dict(descr=descr, fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())


# --------------------------------------------------------------------------------------------------
# The report and the flags


def report(model, args, n, steps, seconds):
    """Print what the paper's efficiency table (table 2) reports."""
    if model.config.ternary:
        if args.device == "cpu":
            kernel = cpu_kernel()
        else:  # a GPU takes it in bf16 alone, see packed_linear
            kernel = args.dtype == "bf16" and cuda_kernel(next(model.parameters()).device)
        helps = "helps" if kernel else "is not used"
        print(f"products with packed weights in {args.dtype}, kernel.cu {helps}")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    codes = sum(buffer.numel() for buffer in model.buffers())  # bytes
    rest = sum(p.nbytes for p in model.parameters())
    print(
        f"2-bit codes {codes / 1e6:.2f} MB, the rest {rest / 1e6:.2f} MB; peak memory "
        f"{peak / 1e6:,.0f} MB; {n} images of {steps} steps in {seconds:.1f} s"
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    how_many = parser.add_mutually_exclusive_group().add_argument
    flag("--ckpt", required=True, help="packed.pt, a run folder of train.py, a released folder")
    flag("--classes", nargs="+", help="class names; default all, or eight of more than ten")
    how_many("--n", type=number(int, 1), help="images in all; default four a class")
    how_many("--npz", type=number(int, 1), metavar="N", help="write N images as .npz, not a grid")
    flag(
        "--cfg",
        type=number(float, 0),
        default=1.5,
        help="guidance: 1 is none, 4 gives clear shapes and strong colours (default 1.5)",
    )
    flag("--guided-channels", type=number(int, 1), help="guide the first N alone; upstream 3")
    flag(
        "--steps",
        type=number(int, 1, NUM_TIMESTEPS),
        help="denoising steps; default 16; for latents 250 with ddpm or ddim",
    )
    flag(
        "--sampler",
        choices=SAMPLERS,
        help="default dpm (DPM-Solver++); for latents ddpm, the paper's",
    )
    flag("--seed", type=number(int, 0, MAX_SEED), default=0, help="of the noise (default 0)")
    flag("--batch", type=number(int, 1), default=100, help="images at a time (default 100)")
    flag("--out", help="default grid.png or samples.npz")
    flag("--device", choices=DEVICES, default=DEVICES[0], help=f"default {DEVICES[0]}")
    flag(
        "--dtype",
        choices=DTYPES,
        help="of ternary products; default bf16 on a GPU; on a CPU fp32, for latents int8 if fast",
    )
    flag("--vae", help="take this VAE (name or folder), not the one that the checkpoint names")
    flag("--n-heads", type=number(int, 1), help="of a released model, if they are not 32")
    args = parser.parse_args(argv)
    args.out = args.out or ("samples.npz" if args.npz else "grid.png")
    if not args.npz and torchrun().world > 1:
        parser.error("several processes share the batches of --npz N; for a grid start one")
    return args


# --------------------------------------------------------------------------------------------------
# What both scripts need: random numbers, flags, progress, processes, errors

TORCHRUN = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
MAX_SEED = 2**32 - 1  # SeedSequence splits larger numbers: 2^32 would mean 0, 1


def generator(*numbers):
    """A random generator seeded by whole numbers: (seed, number of the image).

    In train.py (seed, 0, epoch) for the order of images, (seed, 1, step) for batches, (seed, 2) for
    which images are held out, (seed, 3) for validation.
    """
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def number(kind, least, most=2**31 - 1):
    """A type for argparse: an int or float from least to most. By default C++ can hold it."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:  # nan, too
            limits = f"at least {least} and at most {most}"
            raise argparse.ArgumentTypeError(f"got {text}, expected {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse's words for what is no number
    return parse


def require_same(what, theirs, ours, advice):
    """ValueError: something was made with other settings than ours. It names the first one."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{what} was made with {name}={theirs.get(name)!r:.99}, "
                f"this command says {value!r:.99}: {advice}"
            )


def cpu_has(*flags):
    """Whether the CPU has one of these instruction sets, by the names that Linux gives them."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and not set(flags).isdisjoint(cpuinfo.read_text().split())


class Launch(NamedTuple):
    """This process among those that a launcher has started together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine


def torchrun():
    """-> Launch, from torchrun's variables. One process, unless all of them are set."""
    values = [os.environ.get(name) for name in TORCHRUN]
    if not all(values):
        return Launch()
    for name, value in zip(TORCHRUN[:4], values):
        if not value.isdecimal() or (name.endswith("SIZE") and int(value) == 0):
            raise ValueError(f"the variable {name} is {value!r}, expected a number of processes")
    launch = Launch(*map(int, values[:3]))
    if launch.rank >= launch.world:
        raise ValueError(f"RANK={launch.rank}, expected less than WORLD_SIZE={launch.world}")
    return launch


class Progress:
    """Show how many of `total` images are done: on a terminal, or as a line every 15 s."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.start = time.monotonic()
        self.shown = self.start

    def add(self, n, what):
        self.done += n
        now = time.monotonic()
        live = sys.stderr.isatty()
        is_last = self.done > self.total - 1e-6
        pause = 0.5 if live else 15
        if torchrun().rank > 0 or (not is_last and now - self.shown < pause):
            return
        self.shown = now
        rate = self.done / max(now - self.start, 1e-9)
        left = timedelta(seconds=int((self.total - self.done) / rate))
        line = f"{what}: {self.done / self.total:.1%}, {rate:.3g} images/s, {left} left"
        if live:
            width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
            line = f"\r{line[:width]:<{width}}"
        print(line, end="\n" if is_last or not live else "", file=sys.stderr, flush=True)


class Speech:
    """stdout or stderr for main(). No run is lost because nobody can read what it says."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # a terminal may not know é

    def write(self, text):
        with suppress(OSError):  # the terminal or the pipe is closed
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):  # isatty, fileno, ...
        return getattr(self.stream, name)


OUT_OF_MEMORY = "error: out of memory; a smaller --batch or --micro-batch takes less"


def run_main(main):
    """Call main(). What a user can mend ends in one line and exit code 1; argparse's code is 2."""
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass  # 1 or 2 was closed: a file could have taken its number, and got what is printed
    for name in ("stdout", "stderr"):
        setattr(sys, name, Speech(getattr(sys, name) or open(os.devnull, "w")))
    try:
        if torchrun().rank > 0:
            sys.stdout = open(os.devnull, "w")  # one process speaks for all
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (MemoryError, torch.OutOfMemoryError) as e:
        sys.exit(OUT_OF_MEMORY + f" ({first_line(e)})")
    except (ValueError, OSError) as e:
        place = traceback.extract_tb(e.__traceback__)[-1]  # for those who have edited the code
        sys.exit(f"error: {e} ({Path(place.filename).name}:{place.lineno})")
    except RuntimeError as e:
        if "DefaultCPUAllocator" in str(e):  # torch has no type for it
            sys.exit(OUT_OF_MEMORY)
        raise


if __name__ == "__main__":
    run_main(main)
