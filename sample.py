"""Sample images from a checkpoint: noise -> guided denoising loop -> a PNG grid, or an .npz for FID.

python sample.py --ckpt runs/demo/packed.pt                          a grid of every class
python sample.py --ckpt runs/demo --classes 7 3 --n 20               what a run has learned, ended or not
python sample.py --ckpt runs/demo --npz 1000 --out x.npz             uint8 NHWC, as the ADM evaluation suite reads
torchrun --nproc-per-node=8 sample.py --ckpt runs/600M --npz 50000   on many GPUs; after a stop, repeat the command
python sample.py --ckpt TerDiT-600M/ --classes 207 --cfg 4           a released folder
"""

import argparse
import fcntl
import json
import math
import os
import resource
import shutil
import sys
import time
import unicodedata
import zlib
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from terdit import GaussianDiffusion, atomic_write, cpu_kernel, cuda_kernel, first_line, in_dtype, load_model

IMAGENET = ["207", "360", "387", "974", "88", "979", "417", "279"]  # the eight classes that DiT papers show
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def main(argv=None):
    args = parse_args(argv)
    init_distributed(args.device)
    path = from_rank_0(find_checkpoint(args.ckpt))  # a run that is still training may save a newer one meanwhile
    model = load(path, args)
    config = model.config
    vae = load_vae(config.vae, args.device) if config.vae else None
    if vae and vae.config.latent_channels != config.in_channels:
        raise ValueError(f"the VAE {config.vae} has {vae.config.latent_channels} channels, {path} {config.in_channels}")
    names = config.class_names or [str(row) for row in range(config.num_classes)]
    classes = pick_classes(args.classes, config, everything=args.npz)
    n = args.npz or args.n or 4 * len(classes)
    y = torch.tensor([classes[i % len(classes)] for i in range(n)])
    sampler = args.sampler or ("ddpm" if config.vae else "dpm")
    steps = args.steps or (250 if config.vae and sampler != "dpm" else 16)
    options = dict(seed=args.seed, cfg_scale=args.cfg, steps=steps, sampler=sampler,
                   guided_channels=args.guided_channels, guidance_interval=args.guidance_interval)  # fmt: skip
    print(f"{n} images of the classes {[names[row] for row in classes[:n]]!r:.200}")

    def draw(index, progress):
        """The images of these numbers (m,) -> (m, 3, H, W) fp32 in [-1, 1], on the CPU."""
        x = sample_latents(model, y[index], index, progress=progress, **options)
        if not x.isfinite().all():
            raise ValueError(f"{path}: the samples are not finite; is the checkpoint damaged?")
        return decode(vae, x, config.latent_scale)

    start = time.time()
    if args.npz:
        indices = np.arange(len(names))  # the data set's own: in a released TerDiT row 121 has the name, and index, 207
        numbers = [int(name) for name in names if name.isdecimal()]
        if len(set(numbers)) == len(names):
            indices = np.array(numbers)
        blank = torch.zeros(1, config.in_channels, config.input_size, config.input_size, device=args.device)
        image_shape = to_uint8(decode(vae, blank, config.latent_scale)).shape[1:]
        tensors = [value.cpu().contiguous() for value in model.state_dict().values()]
        weights = sum(zlib.crc32(value.view(torch.uint8).numpy()) for value in tensors)  # wherever their file lies
        settings = options | dict(n=n, classes=classes, batch=args.batch, n_heads=config.n_heads, vae=config.vae,
                                  dtype=args.dtype, weights=weights)  # fmt: skip
        n = sample_npz(args.out, draw, indices[y.numpy()], image_shape, settings)
    else:
        progress = Progress(n)
        images = torch.cat([draw(index, progress) for index in torch.arange(n).split(args.batch)])
        save_grid(images, min(len(classes), n), args.out)
    report(path, model, args, time.time() - start, n, steps)
    print(f"wrote {args.out}")


def find_checkpoint(path):
    """A run folder of train.py -> its packed.pt or full.pt, whichever is newer. Other paths stay as they are."""
    found = [Path(path, name) for name in ("packed.pt", "full.pt") if Path(path, name).is_file()]
    return max(found, key=os.path.getmtime, default=Path(path))


def load(path, args):
    """The model in eval mode, with what the command says about it."""
    model = load_model(path, args.device, **(dict(n_heads=args.n_heads) if args.n_heads else {}))
    config = model.config
    if args.vae and not config.vae:
        raise ValueError(f"--vae {args.vae}: {path} draws pixels, there are no latents to decode")
    config.vae = args.vae or config.vae
    # Ternary models of latents are large: on a CPU they take int8, if it has instructions for it.
    on_cpu = "int8" if config.ternary and config.vae and cpu_has("avx512_vnni", "avx_vnni") else "fp32"
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else on_cpu)
    return in_dtype(model, DTYPES[args.dtype])


@torch.no_grad()
def sample_latents(model, y, index, seed=0, cfg_scale=1.5, steps=16, sampler="dpm", progress=None,
                   guided_channels=None, guidance_interval=None):  # fmt: skip
    """The guided denoising loop: labels y (n,) -> x_0 (n, C, H, W) fp32.

    index (n,): each image's number in the run. Its noise is a function of the seed and this number, so an image is the
    same whatever batch it is computed in (a matmul of another height may round its last bits otherwise).
    guidance_interval: the lowest and the highest timestep of 0..999 that are guided; None guides all. At the others the
    model runs without its unconditional half (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """
    config = model.config
    device = next(model.parameters()).device
    diffusion = GaussianDiffusion(steps, config.prediction)
    shape = (config.in_channels, config.input_size, config.input_size)
    generators = [generator(seed, int(i)) for i in index]
    low, high = guidance_interval or (0, 999)
    if not any(low <= t <= high for t in diffusion.timestep_map):
        raise ValueError(f"--guidance-interval {low} {high} guides nothing: none of the {steps} timesteps lies in it")

    def draw_noise(x=None):  # the sampler passes x, which is not needed
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    y = torch.as_tensor(y).to(device)
    null = torch.full_like(y, config.num_classes)

    def model_fn(x, t):
        if cfg_scale != 1 and low <= int(t[0]) <= high:  # all images are at the same timestep
            twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
            out = model.forward_with_cfg(*twice, cfg_scale, guided_channels)[: len(x)]
        else:
            out = model(x, t, y)
        if progress:
            progress.add(len(x) / steps, "sampling")
        return out

    clip = config.vae is None  # pixels lie in [-1, 1], latents do not
    if sampler == "ddpm":
        return diffusion.p_sample_loop(model_fn, draw_noise(), clip_denoised=clip, noise_fn=draw_noise)
    loop = dict(ddim=diffusion.ddim_sample_loop, dpm=diffusion.dpm_sample_loop)[sampler]
    return loop(model_fn, draw_noise(), clip_denoised=clip)


# ----------------------------------------------------------------------------------------------------------------------
# Classes, an .npz of many images, the report, the flags


def pick_classes(wanted, config, everything=False):
    """Class names -> rows of the label table: "207" is the name of row 121 in a released TerDiT. A number also finds
    the one name that is the same number: 7 finds 007. None: all of up to ten, else eight (everything=True: all)."""
    names = config.class_names or [str(row) for row in range(config.num_classes)]
    if wanted is None:
        if everything or len(names) <= 10:
            return list(range(len(names)))
        wanted = IMAGENET if set(IMAGENET) <= set(names) else names[:8]
    # é may be one letter or e + accent: compared is Unicode's form NFC, which keyboards type.
    names = [unicodedata.normalize("NFC", name) for name in names]
    rows = []
    for name in wanted:
        found = [row for row, other in enumerate(names) if other == unicodedata.normalize("NFC", name)]
        if not found and name.isdecimal():
            found = [row for row, other in enumerate(names) if other.isdecimal() and int(other) == int(name)]
        if len(found) != 1:
            raise ValueError(f"class {name!r} is unknown or not the only one: the {len(names)} are {names!r:.200}")
        rows += found
    return rows


def sample_npz(out, draw, labels, image_shape, settings):
    """Draw the images of labels (n,), in batches that the processes share, into the .npz file `out`. -> how many
    What is drawn lies in OUT.part, where a run that was stopped goes on, on any number of processes: batches do not
    depend on it, so the images are equal to the bit. ValueError: the folder holds images of other settings."""
    part = Path(os.path.realpath(out) + ".part")
    rank, world = ranks()
    with locked(part):
        if rank == 0 and not (part / "header.json").is_file():
            create_rows(part, settings, len(labels), image_shape, np.uint8)
        barrier()
        rows = Rows(part, settings)
        todo = rows.missing(settings["batch"])
        own = todo[rank::world]
        progress = Progress(sum(len(index) for index in own))
        for index in own:
            rows.put(index, to_uint8(draw(torch.from_numpy(index), progress)), THERE)
        barrier()
        if rank == 0:
            atomic_write(out, lambda file: np.savez(file, arr_0=rows.x, arr_1=labels))
            (part / "header.json").unlink()  # first: a folder without it is ignored, so a kill in between does no harm
            shutil.rmtree(part)
    return sum(len(index) for index in todo)


def report(path, model, args, seconds, n, steps):
    """Print what the paper's efficiency table (table 2) reports."""
    if model.config.ternary:
        on_cpu = args.device == "cpu"  # a GPU takes it in bf16 alone, see packed_linear
        kernel = cpu_kernel() if on_cpu else (args.dtype == "bf16" and cuda_kernel(next(model.parameters()).device))
        print(f"products with packed weights in {args.dtype}, kernel.cu {'helps' if kernel else 'is not used'}")
    status = Path("/proc/self/status")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    elif status.is_file():  # on Linux ru_maxrss starts with the peak of the program that started this one
        peak = 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    codes = sum(buffer.numel() for buffer in model.buffers())  # bytes
    rest = sum(4 * p.numel() for p in model.parameters())
    print(f"{path}: 2-bit codes {codes / 1e6:.2f} MB, the rest {rest / 1e6:.2f} MB; peak memory "
          f"{peak / 1e6:,.0f} MB; {n} images of {steps} steps in {seconds:.1f} s")  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    how_many = parser.add_mutually_exclusive_group().add_argument
    flag("--ckpt", required=True, help="packed.pt, a run folder of train.py, a released TerDiT or Large-DiT folder")
    flag("--classes", nargs="+", help="class names; all by default (eight of more than ten)")
    how_many("--n", type=int, help="images in all, the classes taking turns; four a class by default")
    how_many("--npz", type=int, metavar="N", help="write N images of classes in turn as .npz instead of a grid")
    flag("--cfg", type=float, default=1.5, help="guidance scale; 1 is none (default 1.5)")
    flag("--guided-channels", type=int, help="guide the first N channels; default all; upstream 3")
    flag("--guidance-interval", type=int, nargs=2, metavar=("LOW", "HIGH"), help="guide only at these of 0..999")
    flag("--steps", type=int, help="denoising steps; default 16; for latents 250 with ddpm or ddim")
    flag("--sampler", choices=["ddpm", "ddim", "dpm"], help="default dpm (DPM-Solver++); for latents ddpm, the paper's")
    flag("--seed", type=int, default=0, help="of the noise (default 0)")
    flag("--batch", type=int, default=100, help="images at a time, of each process (default 100)")
    flag("--out", help="default grid.png or samples.npz")
    flag("--device", choices=DEVICES, default=DEVICES[0], help=f"default {DEVICES[0]}")
    flag("--dtype", choices=DTYPES, help="of ternary products; default bf16 on a GPU; on a CPU fp32, for latents int8")
    flag("--vae", help="use this VAE (name or folder) instead of the one that the checkpoint names")
    flag("--n-heads", type=int, help="of a released model, if they are not 32")
    args = parser.parse_args(argv)
    args.out = args.out or ("samples.npz" if args.npz else "grid.png")
    for name in ("n", "npz", "steps", "batch", "guided_channels"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    if os.path.isdir(args.out) or not os.access(Path(args.out).resolve().parent, os.W_OK):
        parser.error(f"argument --out: {args.out} is a folder, or not in one that can be written to")
    if not args.npz and Image.registered_extensions().get(Path(args.out).suffix.lower()) not in Image.SAVE:
        parser.error(f"argument --out: {args.out} does not end as a picture that can be written, such as grid.png")
    if not args.npz and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("several processes share the batches of --npz N; for a grid start one: python sample.py ...")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Shared with train.py: rows on disk that several processes fill, VAEs, pictures, processes, progress, errors

MISSING, THERE, UNUSABLE = range(3)  # status of a row


def create_rows(folder, header, n, shape, dtype):
    """Make the folder of Rows: x.npy (n, *shape), status.npy, and header.json last: a folder without it is ignored."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "x.npy"
    try:
        np.lib.format.open_memmap(path, "w+", dtype, (n, *shape))
        with open(path, "r+b") as file, suppress(AttributeError):  # macOS has no posix_fallocate
            # Reserve the disk space now: a full disk would otherwise kill the process when a mapped page is written.
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as e:
        n_bytes = n * math.prod(shape) * np.dtype(dtype).itemsize
        path.unlink(missing_ok=True)  # others may need the space that it has taken
        raise OSError(f"{path}: cannot be made, it takes {n_bytes / 1e6:,.0f} MB ({first_line(e)})") from None
    np.save(folder / "status.npy", np.full(n, MISSING, np.uint8))
    atomic_write(folder / "header.json", lambda file: file.write(json.dumps(header).encode()))


class Rows:
    """x (n, ...) and status (n,), mapped into memory; header: what they are, as it was when the folder was made.
    ValueError: the folder was made with other settings than `wanted`, which are named, or it is damaged."""

    def __init__(self, folder, wanted):
        self.folder = folder
        mode = "r+" if os.access(folder / "x.npy", os.W_OK) else "r"  # a finished cache may be someone else's
        try:
            self.header = json.loads((folder / "header.json").read_text())
            np.load(folder / "x.npy", mmap_mode="r")  # in mode r+, numpy fills a file that was cut short with zeros
            self.x = np.load(folder / "x.npy", mmap_mode=mode)
            self.status = np.load(folder / "status.npy", mmap_mode=mode)
        except (OSError, ValueError, EOFError) as e:
            raise ValueError(f"{folder}: cut short or damaged ({first_line(e)}); delete it to start anew") from None
        for name, here in wanted.items():
            theirs = self.header.get(name)
            is_moved_vae = name == "vae" and here and theirs == os.path.realpath(here)  # a folder that may be gone
            if theirs != here and not is_moved_vae:
                raise ValueError(f"{folder} was made with {name}={theirs!r:.99}, this command says {here!r:.99}: say "
                                 "the same, take another --out, or delete that folder")  # fmt: skip

    def missing(self, size):
        """Numbers of the rows that are missing, in parts that start at multiples of `size`, for all processes."""
        parts = np.split(np.arange(len(self.status)), range(size, len(self.status), size))
        parts = [part for part in parts if (self.status[part] == MISSING).any()]
        barrier()  # nobody fills a row before all have seen what is missing
        return parts

    def put(self, index, rows, status):
        self.x[index] = rows
        self.x.flush()  # the rows are on the disk before their status says so
        self.status[index] = status


def load_vae(name, device):
    """The VAE between images and latents, a diffusers model or a local folder. ValueError: it is none, or not whole."""
    try:
        from diffusers import AutoencoderKL

        kind = AutoencoderKL.load_config(name).get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"it is a {kind}, expected an AutoencoderKL")
        vae, info = AutoencoderKL.from_pretrained(name, output_loading_info=True, low_cpu_mem_usage=False)
    except ImportError:
        raise ValueError(f"the latents of the VAE {name} need: pip install diffusers") from None
    except Exception as e:  # diffusers and its hub raise errors of many kinds
        moved = "" if os.path.isdir(name) else ". If it has moved, name it with --vae; latents in a cache need none"
        raise ValueError(f"the VAE {name} cannot be loaded ({first_line(e)}){moved}") from None
    if info["missing_keys"]:
        raise ValueError(f"the VAE {name} is not whole: it lacks {min(info['missing_keys'])}")
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(f"the VAE {name} shifts its latents (shift_factor): our Config has no place for it")
    return vae.to(device).eval().requires_grad_(False)


def decode(vae, x, latent_scale):
    """x_0 (n, C, h, w) -> images (n, 3, H, W) fp32 in [-1, 1], on the CPU. vae=None: they are pixels already."""
    if vae:  # one after the other, to spare memory
        x = torch.cat([vae.decode(z / latent_scale).sample for z in x.split(1)])
        if not x.isfinite().all():
            raise ValueError(f"the VAE {vae.config._name_or_path} puts out values that are not finite")
    return x.float().clamp(-1, 1).cpu()


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> (n, H, W, 3) uint8 numpy."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return x.expand(-1, -1, -1, 3).contiguous().numpy()


def save_grid(x, columns, path):
    """Images (n, 3, H, W) row by row into one picture, enlarged to a width that a person can see."""
    images = to_uint8(x)
    n, h, w, _ = images.shape
    rows = -(-n // columns)  # rounded up
    sheet = np.full((rows * columns, h, w, 3), 255, np.uint8)  # empty places stay white
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    picture = Image.fromarray(sheet)
    zoom = max(1, min(96 // w, 1600 // picture.width))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    atomic_write(path, lambda file: picture.save(file, kind))


def generator(*numbers):
    """A random generator seeded by these whole numbers: (seed, number of the image) here; in train.py (seed, 0, epoch)
    order of the images, (seed, 1, step) batches, (seed, 2) which images are held out, (seed, 3) validation."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def init_distributed(device):
    """Join the process group of a launcher (torchrun), if one started this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # Processes may wait for hours while one lists a million files, or finishes its share of a cache.
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all


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


@contextmanager
def locked(folder):
    """Make the folder, and keep other runs out of it. The system's lock: a killed run leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            if ranks()[0] == 0:  # of many processes the first one holds it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work there: wait, stop it, or take another --out") from None
        yield


class Progress:
    """Count the images that are done of `total`, and show rate and time left: on a terminal, or a line every 15 s."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.start = time.time()
        self.shown = self.start

    def add(self, n, what):
        self.done += n
        now = time.time()
        live = sys.stderr.isatty()
        is_last = self.done > self.total - 1e-6
        if ranks()[0] > 0 or (not is_last and now - self.shown < (0.5 if live else 15)):
            return
        self.shown = now
        rate = self.done / (now - self.start)
        left = timedelta(seconds=int((self.total - self.done) / rate))
        line = f"{what}: {self.done / self.total:.1%}, {rate:.3g} images/s, {left} left"
        with suppress(OSError):  # the terminal may be closed
            line = f"\r{line:<100}" if live else line
            print(line, end="\n" if is_last or not live else "", file=sys.stderr, flush=True)


def cpu_has(*flags):
    """Whether the CPU has one of these instruction sets, by the names that Linux gives them."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and not set(flags).isdisjoint(cpuinfo.read_text().split())


def run_main(main):
    """main() with one line instead of a traceback for what a user can mend; exit code 1 (argparse's own is 2)."""
    try:
        main()
        if dist.is_initialized():  # torch's own teardown sometimes aborts, and the launcher then kills the others
            dist.barrier()
            sys.stdout.flush()
            os._exit(0)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except (MemoryError, RuntimeError) as e:  # a GPU raises torch.OutOfMemoryError; a CPU raises a plain RuntimeError
        if "Connection closed by peer" in str(e):  # gloo's words
            sys.exit("stopped: another process has ended")
        if not any(words in str(e) for words in ("out of memory", "DefaultCPUAllocator", "allocate memory")):
            raise
        sys.exit(f"error: out of memory ({first_line(e)}). A smaller --micro-batch or --batch takes less")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    run_main(main)
