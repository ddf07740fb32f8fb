"""Sample images from a checkpoint: noise -> guided denoising loop -> a PNG grid, or an .npz for FID.

python sample.py --ckpt runs/demo/packed.pt                          a grid of every class
python sample.py --ckpt runs/demo/packed.pt --classes 7 3 --n 20     20 images of two classes
python sample.py --ckpt runs/demo/packed.pt --npz 1000 --out x.npz   uint8 NHWC, as the ADM evaluation suite reads
torchrun --nproc-per-node=8 sample.py --ckpt runs/600M --npz 50000   on many GPUs; after a stop, repeat the command
python sample.py --ckpt runs/photos                                  what a run has learned, ended or not
python sample.py --ckpt TerDiT-600M/ --classes 207 --cfg 4           a released folder
python sample.py --ckpt DiT-XL-2-256x256.pt --classes 207 --cfg 4    a file of Meta's DiT
"""

import argparse
import fcntl
import json
import os
import resource
import shutil
import socket
import sys
import time
import unicodedata
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from terdit import GaussianDiffusion, atomic_write, first_line, in_dtype, load_model, packed_path

SAMPLER = "dpm"
STEPS = 16  # of dpm: tests/bench_samplers.py has DDPM's toy FID at 25 steps in these
PAPER_STEPS = 250  # of ddpm
IMAGENET = ["207", "360", "387", "974", "88", "979", "417", "279"]  # the eight classes that DiT papers show
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", "": "PNG"}  # of a grid, by its ending


def main(argv=None):
    args = parse_args(argv)
    init_distributed(args.device)
    path = from_rank_0(find_checkpoint(args.ckpt))  # a run that is still training may save a newer one meanwhile
    model = load(path, args)
    config = model.config
    classes = pick_classes(args.classes, config, everything=bool(args.npz))
    n = args.npz or args.n or 4 * len(classes)
    y = torch.tensor([classes[i % len(classes)] for i in range(n)])
    sampler = args.sampler or ("ddpm" if config.vae else SAMPLER)
    steps = args.steps or (PAPER_STEPS if config.vae and sampler != "dpm" else STEPS)
    if args.guidance_interval:
        check_interval(args.guidance_interval, steps)
    if path.is_dir() and not is_state(path):
        name = config.class_names[classes[0]]
        print(f"released checkpoint: class names are ImageNet's indices ({name} is row {classes[0]})")
    decode = load_decoder(config.vae, config.latent_scale, args.device) if config.vae else None

    options = dict(seed=args.seed, cfg_scale=args.cfg, steps=steps, sampler=sampler, batch=args.batch,
                   guided_channels=args.guided_channels, guidance_interval=args.guidance_interval)  # fmt: skip

    def draw(y, progress, index=None):
        images = sample_images(model, y, decode=decode, progress=progress, index=index, **options)
        if not images.isfinite().all():
            raise ValueError(f"{path}: the samples are not finite; is the checkpoint damaged?")
        return images

    start = time.time()
    if args.npz:
        settings = options | model_settings(model, args.device) | dict(npz=n, classes=classes)
        n_drawn = sample_npz(args.out, draw, y, steps, settings, bytes_of_image(config))
        seconds = time.time() - start
    else:
        n_drawn = n
        images = draw(y, Progress(n * steps))
        seconds = time.time() - start
        save_grid(images, min(len(classes), n), args.out)
    report(path, model, args.device, seconds, n_drawn, steps)
    print(f"wrote {args.out}")
    leave_distributed()


def is_state(path):
    """Whether this is a folder state-NNNNNNN of train.py."""
    return (path / "run.json").is_file()


def find_checkpoint(path):
    """A run folder of train.py -> the newest of packed.pt, full.pt and its last state; other paths stay as they are."""
    path = Path(path)
    found = [path / name for name in ("packed.pt", "full.pt") if (path / name).is_file()]
    states = [state for state in path.glob("state-*") if state.suffix != ".tmp" and is_state(state)]
    if states:
        found.append(max(states, key=lambda state: (len(state.name), state.name)))  # seven digits, or more
    return max(found, key=os.path.getmtime, default=path)


def load(path, args):
    """The model that find_checkpoint found, in eval mode."""
    overrides = {}
    if args.n_heads is not None:
        overrides["n_heads"] = args.n_heads
    if is_state(path):
        from train import load_average  # not above: train.py imports this file

        warnings.filterwarnings("ignore", module=r"torch\.distributed")  # states that a single process reads
        print(f"{path}: the averaged weights of a training state")
        model = load_average(path, args.device, **overrides)
    else:
        model = load_model(path, args.device, **overrides)
    if args.vae is not None:
        if model.config.vae is None:
            raise ValueError(f"--vae {args.vae}: {args.ckpt} draws pixels, there are no latents to decode")
        model.config.vae = args.vae
    dtype = args.dtype or default_dtype(args.device, model.config)
    return in_dtype(model, DTYPES[dtype])


def default_dtype(device, config):
    """bf16 on a GPU. On a CPU int8 for ternary models of latents, which are large, if it has instructions for it."""
    if device == "cuda":
        return "bf16"
    has_int8 = cpu_has("avx512_vnni", "avx_vnni", "amx_int8")
    return "int8" if config.ternary and config.vae and has_int8 else "fp32"


def sample_images(model, y, seed=0, cfg_scale=1.5, steps=STEPS, sampler=SAMPLER, batch=100, decode=None, progress=None,
                  guided_channels=None, guidance_interval=None, index=None):  # fmt: skip
    """Labels y (n,) -> images (n, 3, H, W) fp32 in [-1, 1] on the CPU, computed `batch` at a time.

    index (n,): the images' numbers in the run, 0 to n - 1 if None; the other arguments are sample_latents'.
    """
    y = torch.as_tensor(y)
    if index is None:
        index = torch.arange(len(y))
    images = []
    for numbers, labels in zip(index.split(batch), y.split(batch)):
        x = sample_latents(model, labels, numbers.tolist(), seed, cfg_scale, steps, sampler, progress, guided_channels,
                           guidance_interval)  # fmt: skip
        if decode:
            x = decode(x)
        images.append(x.float().clamp(-1, 1).cpu())
    return torch.cat(images)


@torch.no_grad()
def sample_latents(model, y, index, seed=0, cfg_scale=1.5, steps=STEPS, sampler=SAMPLER, progress=None,
                   guided_channels=None, guidance_interval=None):  # fmt: skip
    """The guided denoising loop: labels y (n,) -> x_0 (n, C, H, W) fp32.

    index: each image's number in the run. Its noise is a function of the seed and this number, so an image is the same
    whatever batch it is computed in (a matmul of another height may round its last bits otherwise).
    guidance_interval: the lowest and the highest timestep of 0..999 that are guided; None guides all. At the others the
    model runs without its unconditional half (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """
    config = model.config
    device = next(model.parameters()).device
    diffusion = GaussianDiffusion(str(steps), config.prediction)
    shape = (config.in_channels, config.input_size, config.input_size)
    generators = [generator(seed, i) for i in index]

    def draw_noise(x=None):  # the sampler passes x, which is not needed
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    y = torch.as_tensor(y).to(device)
    null = torch.full_like(y, config.num_classes)

    def model_fn(x, t):
        guided = cfg_scale != 1
        if guided and guidance_interval:
            low, high = guidance_interval
            guided = low <= int(t[0]) <= high  # all images are at the same timestep
        if not guided:
            out = model(x, t, y)
        else:
            twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
            out = model.forward_with_cfg(*twice, cfg_scale, guided_channels)[: len(x)]
        if progress:
            progress(len(x))
        return out

    clip = config.vae is None  # pixels lie in [-1, 1], latents do not
    if sampler == "dpm":
        return diffusion.dpm_sample_loop(model_fn, draw_noise(), clip_denoised=clip)
    if sampler == "ddim":  # eta = 0: deterministic after the first draw
        return diffusion.ddim_sample_loop(model_fn, draw_noise(), clip_denoised=clip, noise_fn=torch.zeros_like)
    return diffusion.p_sample_loop(model_fn, draw_noise(), clip_denoised=clip, noise_fn=draw_noise)


def pick_classes(wanted, config, everything=False):
    """Class names or indices -> indices. Names come first: in a released TerDiT "207" is the name of row 121.

    None takes every class of up to ten, or if there are more, eight (everything=True: all of them).
    """
    # One letter may be written in two ways, é or e + accent. Compared is the form NFC, which keyboards type.
    names = [unicodedata.normalize("NFC", str(name)) for name in config.class_names or range(config.num_classes)]
    if wanted is None:
        if everything or config.num_classes <= 10:
            return list(range(config.num_classes))
        wanted = IMAGENET if set(IMAGENET) <= set(names) else range(8)
    picked = []
    for w in wanted:
        w = unicodedata.normalize("NFC", str(w))
        if w in names:
            picked.append(names.index(w))
        elif not w.lstrip("-").isdigit():
            some = printable(", ".join(names[:10]))
            if len(names) > 10:
                some += ", ..."
            raise ValueError(f"class {w!r} is unknown: this checkpoint has {config.num_classes} classes, {some}")
        elif 0 <= int(w) < config.num_classes:
            picked.append(int(w))
        else:
            last = config.num_classes - 1
            raise ValueError(f"class {w} is out of range: this checkpoint has {last + 1} classes, 0-{last}")
    return picked


# ----------------------------------------------------------------------------------------------------------------------
# An .npz of many images, drawn by any number of processes that may be stopped at any time


def sample_npz(out, draw, y, steps, settings, image_bytes):
    """Draw images of the labels y (n,), in batches that the processes share, and write them to the .npz file `out`.

    draw(y, progress, index) -> images (b, 3, H, W) fp32, whose numbers are index (b,). settings: all that the images
    depend on. image_bytes: of one image in uint8. -> how many images were drawn now, by all processes together.

    Each batch goes to a file of its own in the folder OUT.part, so memory holds a batch, however many there are. A run
    that was stopped, even by a power cut, goes on with the batches that have no file, on any number of processes. The
    batches do not depend on the number of processes, so the images are equal to the bit. (On CPUs each process must
    have the same number of threads, too.)
    ValueError: OUT.part holds other images, or another run is at work there. OSError: the disk is too small.
    """
    rank, world = ranks()
    part = Path(os.path.realpath(out) + ".part")
    batches = torch.arange(len(y)).split(settings["batch"])
    files = [part / f"images-{number:07d}.npy" for number in range(len(batches))]
    with locked(part, "draws"):
        missing = None
        if rank == 0:
            missing = missing_batches(part, files, batches, settings, image_bytes)
            if len(missing) < len(batches):
                print(f"{part}: {len(batches) - len(missing)} of {len(batches)} batches are drawn already")
        missing = from_rank_0(missing)
        own = missing[rank::world]
        # Rank 0 has the largest share: when it is done, all are, to within a batch. So its time left stands for theirs.
        progress = Progress(steps * sum(len(batches[i]) for i in own)) if rank == 0 else None
        try:
            for i in own:
                if launcher_has_ended():
                    sys.exit("stopped: the launcher has ended")
                images = to_uint8(draw(y[batches[i]], progress, batches[i]))
                # Flushed to the disk before it gets its name: a file that exists is whole.
                atomic_write(files[i], lambda file: np.save(file, images))
            barrier()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {part} keeps what is drawn: the same command goes on") from None
        if rank == 0:
            atomic_write(out, lambda file: write_npz(file, files, y.numpy()))
            (part / "settings.json").unlink()  # first: without it, what a kill leaves of the folder counts for nothing
            shutil.rmtree(part, ignore_errors=True)  # NFS keeps a folder with an open file, the lock
    return sum(len(batches[i]) for i in missing)


def missing_batches(part, files, batches, settings, image_bytes):
    """Numbers of the batches that have no file in the folder `part` yet, which is prepared if it is new.

    Raises as sample_npz says.
    """
    settings_file = part / "settings.json"
    is_new = not settings_file.is_file()
    if is_new:
        for file in part.glob("*.npy"):  # of a folder that was being removed
            file.unlink()
    else:
        theirs = json.loads(settings_file.read_text())
        if theirs.get("weights") != settings.get("weights"):
            raise ValueError(f"{part} holds images of another checkpoint, or of this one before it changed: delete the "
                             "folder, or take another --out")  # fmt: skip
        for name, value in settings.items():
            if theirs.get(name) != value:
                raise ValueError(f"{part} holds images drawn with {name}={theirs.get(name)!r:.99}, this command says "
                                 f"{value!r:.99}: repeat the command that drew them to go on, delete the folder, or "
                                 "take another --out")  # fmt: skip
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    for_batches = image_bytes * sum(len(batches[i]) for i in missing)
    for_npz = image_bytes * sum(map(len, batches))
    free = shutil.disk_usage(part).free
    if for_batches + for_npz > free:
        if is_new:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{part.parent} has too little space: the images yet to draw take {in_mb(for_batches)}, and the "
                      f".npz at the end {in_mb(for_npz)}; {in_mb(free)} are free")  # fmt: skip
    if is_new:
        atomic_write(settings_file, lambda file: file.write(json.dumps(settings).encode()))
    return missing


def write_npz(file, parts, labels):
    """np.savez(file, images, labels), where the files `parts` hold the images: one part is in memory at a time."""
    image_shape = np.load(parts[0], mmap_mode="r").shape[1:]
    header = dict(descr="|u1", fortran_order=False, shape=(len(labels), *image_shape))
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:  # may be larger than 2 GB
            np.lib.format.write_array_header_1_0(member, header)
            n_left = len(labels)
            for path in parts:
                try:
                    images = np.load(path)
                except (ValueError, EOFError) as e:
                    raise ValueError(f"{path} is damaged ({first_line(e)}): delete it and repeat the command") from None
                n_left -= len(images)
                member.write(images.tobytes())
            if n_left != 0:
                raise ValueError(f"{parts[0].parent} holds {len(labels) - n_left} images, not {len(labels)}: delete it")
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels)


def check_interval(interval, steps):
    """ValueError: none of the sampler's timesteps is guided."""
    low, high = interval
    visited = GaussianDiffusion(str(steps)).timestep_map
    if not any(low <= t <= high for t in visited):
        some = ", ".join(str(t) for t in visited[:5])
        raise ValueError(f"--guidance-interval {low} {high}: none of the timesteps of --steps {steps} lies in it "
                         f"({some}{', ...' if steps > 5 else ''}), so nothing would be guided")  # fmt: skip


def bytes_of_image(config):
    """Bytes of an image in uint8. The VAEs of released models have 8 x 8 pixels a latent."""
    side = config.input_size * (8 if config.vae else 1)
    return 3 * side**2


def model_settings(model, device):
    """What tells this model's images from another one's, wherever its file lies."""
    dtype = model.product_dtype if model.config.ternary else next(model.parameters()).dtype
    return dict(weights=fingerprint(model.state_dict()), vae=model.config.vae, n_heads=model.config.n_heads,
                device=device, dtype=str(dtype), torch=torch.__version__)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The command line, and what is printed at the end


def count_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def in_mb(n_bytes):
    return f"{n_bytes / 1e6:,.2f} MB"


def peak_memory(device):
    """Bytes: the most that torch took of the GPU's memory, or the most resident memory that this process had."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: on Linux it begins with the peak of the process that started this one.
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def report(path, model, device, seconds, n, steps):
    """Print what the paper's efficiency table (table 2) reports."""
    if model.config.ternary:
        how = packed_path(device, model.product_dtype)
        if how == "kernel":
            how = "kernel.cu"
        elif how == "int8":
            how = "torch's integer matmul and kernel.cu's C++"
        elif how == "blocks":
            how = "blocks, unpacked by kernel.cu's C++"
        else:
            how = "unpacking at every call in PyTorch"
        print(f"packed layers run by {how}, {str(model.product_dtype).removeprefix('torch.')}")
    if not is_state(path):
        codes = model.stored_bytes["codes"]
        rest = model.stored_bytes["rest"]
        file = path if path.is_file() else sorted(path.glob("consolidated*"))[-1]
        on_disk = file.stat().st_size
        print(f"checkpoint {in_mb(on_disk)} on disk: 2-bit codes {in_mb(codes)}, full-precision rest {in_mb(rest)}, "
              f"container {in_mb(on_disk - codes - rest)}")  # fmt: skip
    in_memory = count_bytes([*model.buffers(), *model.parameters()])
    kind = "GPU memory" if device == "cuda" else "resident memory"
    print(f"weights in memory {in_mb(in_memory)}; peak {kind} {in_mb(peak_memory(device))}")
    if n > 0:  # else an earlier run has drawn them all
        print(f"{n} images in {seconds:.1f} s: {seconds / n:.3f} s an image, {steps} steps")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--ckpt", required=True, help="packed.pt, a run folder of train.py, a released TerDiT or Large-DiT folder, "
         "or Meta's DiT-XL-2-256x256.pt")
    flag("--classes", nargs="+", help="names or indices; all classes by default (eight of more than ten)")
    flag("--n", type=positive, help="images in all, the classes taking turns; four a class by default")
    flag("--cfg", type=number_of(0, 100), default=1.5, help="guidance scale; 1 is none (default 1.5)")
    flag("--guided-channels", type=positive, metavar="N", help="guide the first N channels; default all; upstream 3")
    flag("--guidance-interval", type=timestep, nargs=2, metavar=("LOW", "HIGH"), help="guide only at timesteps LOW to "
         "HIGH, of 0 (least noise) to 999; default all")
    flag("--steps", type=positive, help=f"denoising steps; default {STEPS}, for latents without dpm {PAPER_STEPS}")
    flag("--sampler", choices=["ddpm", "ddim", "dpm"], help="default dpm (DPM-Solver++), which takes the fewest steps; "
         "for latents ddpm, as in the paper")
    flag("--seed", type=int, default=0)
    flag("--batch", type=positive, default=100, help="images at a time, of each process; changes speed and "
         "memory, not images")
    flag("--npz", type=positive, metavar="N", help="write N images of classes in turn as .npz instead of a grid")
    flag("--out", help="default grid.png or samples.npz")
    flag("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--dtype", choices=DTYPES, help="of products with ternary weights; default bf16 on a GPU; on a CPU int8 for "
         "latents, if it has instructions for it, else fp32")
    flag("--vae", help="use this VAE (name or folder) instead of the one that the checkpoint names")
    flag("--n-heads", type=positive, help="of a released model, if they are not 32 (folders) or 16 (Meta's DiT)")
    args = parser.parse_args(argv)
    check_common(parser, args)
    if args.steps and args.steps > 1000:
        parser.error(f"argument --steps: got {args.steps}, expected at most 1000")
    if args.guidance_interval and args.guidance_interval[0] > args.guidance_interval[1]:
        low, high = args.guidance_interval
        parser.error(f"argument --guidance-interval: got {low} {high}, expected LOW of at most HIGH")
    if args.guidance_interval and args.cfg == 1:
        parser.error("argument --guidance-interval: --cfg 1 guides nowhere")
    if not args.npz and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # One process draws a grid in seconds to minutes. Refused, so that nobody believes that many draw it faster.
        parser.error("several processes share the batches of --npz N; for a grid start one: python sample.py ...")
    if args.npz and args.n:
        parser.error("--npz N says how many images: leave out --n")
    if args.out is None:
        args.out = "samples.npz" if args.npz else "grid.png"
    target = Path(os.path.realpath(args.out))
    folder = target.parent
    if target.is_dir():
        parser.error(f"argument --out: {args.out} is a folder, expected a file")
    ending = Path(args.out).suffix.lower()
    endings = {".npz", ""} if args.npz else FORMATS.keys()
    if ending not in endings:
        parser.error(f"argument --out: {args.out} ends in {ending}, expected {', '.join(sorted(endings - {''}))}"
                     f"{'; --npz N writes .npz' if ending == '.npz' else ''}")  # fmt: skip
    if target.exists() and not target.is_file():
        if args.npz:  # its batches are kept in a folder beside it
            parser.error(f"argument --out: {args.out} is a device or a pipe, expected a file for --npz")
        return args  # a device or a pipe, in a folder that need not be writable
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"argument --out: {folder} is not a folder that can be written to")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Shared with train.py, which draws sample grids too and answers wrong flags in the same words


PARENT = os.getppid()  # with many processes: their launcher


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


def launcher_has_ended():
    """Whether the launcher of many processes was killed, and left them."""
    return ranks()[1] > 1 and os.getppid() != PARENT


def from_rank_0(value):
    """The value that rank 0 has, on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def leave_distributed():
    """End a process that has taken part in a group, if this is one: all that it had to write is written.

    torch's own teardown sometimes aborts it ("terminate called without an active exception"), and the launcher then
    kills the others, rank 0 at its files included.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


@contextmanager
def locked(out, doing="trains"):
    """Make the run folder, and keep other runs out of it: two would mix their states and logs.

    The lock is the operating system's, so a killed run leaves none behind. Of many processes the first one holds it.
    """
    if ranks()[0] > 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise ValueError(f"--out {out}: {holder} {doing} there: wait, stop it, or take another --out") from None
        except OSError as e:
            print(f"note: {out} cannot be locked ({first_line(e)}): start no second run there")
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def generator(*numbers):
    """A random generator seeded by these whole numbers.

    train.py: (seed, 0, epoch) order of the images, (seed, 1, step) batches, (seed, 2) which images are held out,
    (seed, 3) validation. sample.py: (seed, number of the image).
    """
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def fingerprint(state):
    """A number that tells these weights from others, wherever their file lies."""
    crc = 0
    for name in sorted(state):
        crc = zlib.crc32(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


def cpu_has(*flags):
    """Whether the CPU has one of these instruction sets, by the names that Linux gives them."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and not set(flags).isdisjoint(cpuinfo.read_text().split())


def load_vae(name, device):
    """The VAE between images and latents; `name` is a diffusers model or a local folder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError(f"the latents of the VAE {name} need: pip install diffusers") from None
    return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)


def load_decoder(name, latent_scale, device):
    """-> function of latents (n, C, h, w) to images (n, 3, H, W), one after the other to spare memory."""
    vae = load_vae(name, device)

    def decode(latents):
        return torch.cat([vae.decode(z / latent_scale).sample for z in latents.split(1)])

    return decode


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> (n, H, W, 3) uint8 numpy."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return x.expand(-1, -1, -1, 3).contiguous().numpy()


def save_grid(x, columns, path):
    """Images (n, 3, H, W) row by row into one picture, in the format of the path's ending.

    It is enlarged to a width that a person can see (at most 1600 pixels).
    """
    images = to_uint8(x)
    n, h, w, _ = images.shape
    rows = -(-n // columns)  # rounded up
    sheet = np.full((rows * columns, h, w, 3), 255, np.uint8)  # empty places stay white
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    picture = Image.fromarray(sheet)
    zoom = max(1, min(96 // w, 1600 // picture.width))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    picture_format = FORMATS[Path(path).suffix.lower()]
    atomic_write(path, lambda file: picture.save(file, picture_format, quality=95))


def say(text, stream, end="\n"):
    """print to stdout or stderr -> whether it can be read. A closed pipe or terminal is no error from then on."""
    try:
        print(text, end=end, file=stream, flush=True)
        return True
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False


class Progress:
    """The share of `total` that is done, and the time left: one live line, or where stderr is no terminal a line every
    LINE_SECONDS."""

    LINE_SECONDS = 15

    def __init__(self, total, what="sampling"):
        self.total = total
        self.what = what
        self.done = 0
        self.start = time.time()
        self.shown = self.start

    def __call__(self, n):
        self.done += n
        live = sys.stderr.isatty()
        if not live and (time.time() - self.shown < self.LINE_SECONDS or int(os.environ.get("RANK", 0)) > 0):
            return
        self.shown = time.time()
        seconds_left = (time.time() - self.start) * (self.total - self.done) / self.done
        line = f"{self.what} {self.done / self.total:4.0%}, {seconds_left:.0f} s left"
        if live:
            say(f"\r{line}   ", sys.stderr, end="\n" if self.done >= self.total else "")
        else:
            say(line, sys.stderr)


def printable(text):
    """Text that holds names of files or classes, with control characters escaped: they could drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def positive(text):
    """argparse type: a whole number of at least 1."""
    if not text.isdigit() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1 (and at most 10^9)")
    return int(text)


def timestep(text):
    """argparse type: a timestep of the 1000 that the model is trained at."""
    if not text.isdigit() or int(text) > 999:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of 0 to 999")
    return int(text)


def number_of(low, high):
    """argparse type: a number of low to high; nan is none."""

    def number(text):
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text}, expected a number of {low} to {high}")
        return value

    return number


def check_common(parser, args):
    """Flags that both scripts refuse."""
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: got {args.seed}, expected 0 or more (and below 2^63)")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got cuda, but torch finds no GPU here")


def run_main(main):
    """main() with one line instead of a traceback for what a user can mend; exit code 1 (argparse's own is 2)."""
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except (MemoryError, RuntimeError) as e:
        if "Connection closed by peer" in str(e):  # gloo's words
            sys.exit("stopped: another process has ended")
        if not is_out_of_memory(e):
            raise
        sys.exit(f"error: out of memory ({first_line(e)}). Try a smaller --micro-batch, --image-size or --size, or "
                 "--checkpointing (train.py); a smaller --batch (sample.py)")  # fmt: skip
    except KeyboardInterrupt as e:
        sys.exit(str(e) or "stopped")


def is_out_of_memory(e):
    """Of a GPU it is torch.OutOfMemoryError, of a CPU a plain RuntimeError, of numpy or C++ something else again."""
    words = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "bad_alloc")
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(w in str(e) for w in words)


if __name__ == "__main__":
    run_main(main)
