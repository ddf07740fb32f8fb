"""Sample images from a checkpoint: noise -> guided denoising loop -> a PNG grid, or an .npz for FID.

python sample.py --ckpt runs/demo/packed.pt                          a grid of every class
python sample.py --ckpt runs/demo/packed.pt --classes 7 3 --n 20     20 images of two classes
python sample.py --ckpt runs/demo/packed.pt --npz 1000 --out x.npz   uint8 NHWC, as the ADM evaluation suite reads
python sample.py --ckpt TerDiT-600M/ --classes 207 --cfg 4           a released folder
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from terdit import GaussianDiffusion, atomic_write, cpu_kernel, load_model, packed_path, read_model

AHEAD = 8  # steps: more would save nothing that shows, and hold 2 MB a step at 4.2B
STEPS = 25  # enough for the demo's digits; the paper takes 250
IMAGENET = ["207", "360", "387", "974", "88", "979", "417", "279"]  # the eight classes that DiT papers show


def generator(*numbers):
    """Random numbers that are a function of these numbers alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def graphed(f, *inputs):
    """f, which takes and returns tensors of fixed shapes, as a CUDA graph: its hundreds of launches become one."""
    inputs = [z.clone() for z in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f(*inputs)  # whatever is built or allocated on first use, before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f(*inputs)

    def replay(*new):
        for old, z in zip(inputs, new):
            old.copy_(z)
        graph.replay()
        return out

    return replay


@torch.no_grad()
def sample_latents(model, y, seed, cfg, steps, sampler, progress=None, graphs=None):
    """Run the guided loop for the labels y [(place, label), ...] -> x_0 (n, C, H, W) fp32.

    graphs: a dict to keep CUDA graphs in, from batch to batch of one model and cfg.
    """
    graphs = {} if graphs is None else graphs
    config, device = model.config, next(model.parameters()).device
    diffusion = GaussianDiffusion(str(steps), config.prediction)
    # By the seed and the image's place, never by the batch it is in.
    generators = [generator(seed, place) for place, _ in y]
    shape = (config.in_channels, config.input_size, config.input_size)
    draw = lambda x: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    labels = torch.tensor([label for _, label in y], device=device)
    if cfg != 1:
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    seen, row = labels.unique(return_inverse=True)
    todo = list(reversed(diffusion.timestep_map.tolist()))  # timesteps to come
    ahead = []  # of the next ones, condition() of each label

    def step(x, c, *modulations):
        if cfg == 1:
            return model(x, None, None, (c, modulations))
        return model.forward_with_cfg(torch.cat([x, x]), None, None, cfg, condition=(c, modulations))[: len(x)]

    def model_fn(x, t):
        if not ahead:
            # What depends on the timestep and the label alone, a quarter of the weights at 600M, in one go for AHEAD
            # steps: a packed layer widens its weights as long for one row as for a hundred.
            n = max(1, min(AHEAD, 128 // len(seen)))
            times, todo[:n] = torch.tensor(todo[:n], device=device), []
            c, modulations = model.condition(times.repeat_interleave(len(seen)), seen.repeat(len(times)))
            ahead.extend(zip(*(z.split(len(seen)) for z in (c, *modulations))))
        condition = [z[row] for z in ahead.pop(0)]
        if device.type == "cuda" and len(x) not in graphs:
            graphs[len(x)] = graphed(step, x, *condition)
        out = graphs.get(len(x), step)(x, *condition)
        if progress:
            progress(len(x))
        return out

    if sampler == "ddim":  # eta = 0: deterministic after the first draw
        return diffusion.ddim_sample_loop(
            model_fn, draw(None), clip_denoised=config.vae is None, noise_fn=torch.zeros_like
        )
    return diffusion.p_sample_loop(model_fn, draw(None), clip_denoised=config.vae is None, noise_fn=draw)


def sample_images(model, y, seed=0, cfg=1.5, steps=STEPS, sampler="ddpm", batch=100, decode=None, progress=None):
    """Labels y (n,) -> images (n, 3, H, W) fp32 in [-1, 1] on the CPU."""
    places = list(enumerate(torch.as_tensor(y).tolist()))
    parts, graphs = [], {}
    for i in range(0, len(places), batch):
        x = sample_latents(model, places[i : i + batch], seed, cfg, steps, sampler, progress, graphs)
        parts.append((decode(x) if decode else x).float().clamp(-1, 1).cpu())
    return torch.cat(parts)


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
    return lambda x: torch.cat([vae.decode(part / latent_scale).sample for part in x.split(1)])


def load_encoder(name, device):
    """-> function of images (n, 3, H, W) uint8 to rows of train.py's cache, and the latents' scale.

    Rows are the images themselves, (n, 1, 3, H, W), or with a VAE scaled latents, plain and mirrored, (n, 2, C, h, w)
    fp16: the means that the VAE gives, whose own spread is small against theirs.
    """
    if not name:
        return lambda images: images[:, None], 1.0
    vae = load_vae(name, device)
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(f"--vae {name} shifts its latents, which a checkpoint here cannot say")

    def encode(images):
        x = torch.from_numpy(np.stack([images, images[..., ::-1]], 1)).to(device).float() / 127.5 - 1
        z = vae.encode(x.flatten(0, 1)).latent_dist.mode() * vae.config.scaling_factor
        return z.half().cpu().numpy().reshape(*x.shape[:2], *z.shape[1:])

    return encode, vae.config.scaling_factor


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> (n, H, W, 3) uint8 numpy."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return x.expand(-1, -1, -1, 3).contiguous().numpy()


def save_grid(x, columns, path):
    """Images (n, 3, H, W) row by row into one PNG, enlarged to a width that a person can see (at most 1600 pixels)."""
    images = to_uint8(x)
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, 3), 255, np.uint8)
    sheet[:n] = images
    sheet = Image.fromarray(sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3))
    zoom = max(1, min(96 // w, 1600 // sheet.width))
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
    atomic_write(path, lambda file: sheet.save(file, "PNG"))


class Progress:
    """One live line: images x steps done, and the time left."""

    def __init__(self, total, what="sampling"):
        self.total, self.what, self.done, self.start = total, what, 0, time.time()

    def __call__(self, n):
        self.done += n
        if sys.stderr.isatty():
            left = (time.time() - self.start) * (self.total - self.done) / self.done
            end = "\n" if self.done >= self.total else ""
            print(
                f"\r{self.what} {self.done / self.total:4.0%}, {left:.0f} s left   ",
                end=end,
                file=sys.stderr,
                flush=True,
            )


def pick_classes(wanted, config):
    """Class names or indices -> indices. Names come first: in a released checkpoint "207" is a name, of row 121."""
    names = [str(n) for n in config.class_names or range(config.num_classes)]
    if wanted is None:
        if config.num_classes <= 10:
            return list(range(config.num_classes))
        wanted = IMAGENET if set(IMAGENET) <= set(names) else range(8)
    picked = []
    for w in wanted:
        if w in names:
            picked.append(names.index(w))
        elif str(w).lstrip("-").isdigit():
            if not 0 <= int(w) < config.num_classes:
                last = config.num_classes - 1
                raise ValueError(f"class {w} is out of range: this checkpoint has {last + 1} classes, 0-{last}")
            picked.append(int(w))
        else:
            some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(f"class {w!r} is unknown: this checkpoint has {config.num_classes} classes, {some}")
    return picked


def peak_memory(device):
    """Bytes: of the GPU's memory that torch took at most, or of this process's resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux's ru_maxrss starts from that of the process that started this one.
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def report(path, model, device, seconds, n, steps):
    """What the paper's efficiency table (table 2) reports."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    tensors = read_model(path)[1].values()
    codes, rest = size(t for t in tensors if t.dtype == torch.uint8), size(t for t in tensors if t.dtype != torch.uint8)
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("consolidated*"))[-1:]
    on_disk = sum(f.stat().st_size for f in files)
    peak, where = peak_memory(device), "GPU memory" if device == "cuda" else "resident memory"
    mb = lambda b: f"{b / 1e6:,.2f} MB"
    if model.config.ternary:
        dtype = model.x_embedder.weight.dtype
        how = {"kernel": "kernel.cu", "blocks": "blocks widened in the CPU's cache", "plain": "unpacking at every call"}
        layers = packed_path(device, dtype)
        by = f" by {'kernel.cu' if cpu_kernel() else 'PyTorch'}" if layers == "blocks" else ""
        print(f"packed layers run by {how[layers]}{by}, {str(dtype)[6:]}")
    print(f"checkpoint {mb(on_disk)} on disk: 2-bit codes {mb(codes)}, full-precision rest {mb(rest)}, "
          f"container {mb(on_disk - codes - rest)}")  # fmt: skip
    print(f"weights in memory {mb(size([*model.buffers(), *model.parameters()]))}; peak {where} {mb(peak)}")
    print(f"{n} images in {seconds:.1f} s: {seconds / n:.3f} s an image, {steps} steps")


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return int(text)


def check_common(parser, args):
    """What train.py and sample.py both refuse."""
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: got {args.seed}, expected 0 or more (and below 2^63)")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got cuda, but torch finds no GPU here")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="packed.pt, or a released TerDiT or Large-DiT folder")
    p.add_argument("--classes", nargs="+", help="names or indices; all classes by default (eight of more than ten)")
    p.add_argument("--n", type=positive, help="images in all, the classes taking turns; four a class by default")
    p.add_argument("--cfg", type=float, default=1.5, help="guidance scale; 1 is none (default 1.5)")
    p.add_argument(
        "--steps", type=positive, help=f"denoising steps; default {STEPS}, of a latent model the paper's 250"
    )
    p.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddpm")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=positive, default=100, help="images at a time; changes speed and memory, not images")
    p.add_argument(
        "--npz", type=positive, metavar="N", help="write N images of classes in turn as .npz instead of a grid"
    )
    p.add_argument("--out", help="default grid.png or samples.npz")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["fp32", "bf16"], help="default fp32 on a CPU, bf16 on a GPU")
    p.add_argument("--vae", help="use this VAE (name or folder) instead of the one that the checkpoint names")
    p.add_argument("--n-heads", type=positive, help="for released folders whose model has not 32 heads")
    args = p.parse_args(argv)
    if args.steps and args.steps > 1000:
        p.error(f"argument --steps: got {args.steps}, expected at most 1000")
    check_common(p, args)
    if args.npz and args.n:
        p.error("--npz N says how many images: leave out --n")
    args.out = args.out or ("samples.npz" if args.npz else "grid.png")
    parent = Path(args.out).absolute().parent
    if Path(args.out).is_dir():
        p.error(f"argument --out: {args.out} is a folder, expected a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        p.error(f"argument --out: {parent} is not a folder that can be written to")
    return args


def main(argv=None):
    args = parse_args(argv)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype or ("bf16" if args.device == "cuda" else "fp32")]
    overrides = {k: v for k, v in (("vae", args.vae), ("n_heads", args.n_heads)) if v is not None}
    if args.vae and read_model(args.ckpt)[0].get("vae") is None:
        raise ValueError(f"--vae {args.vae}: {args.ckpt} draws pixels, there are no latents to decode")
    model = load_model(args.ckpt, args.device, dtype, **overrides)
    config = model.config
    if args.npz and not args.classes:
        classes = list(range(config.num_classes))
    else:
        classes = pick_classes(args.classes, config)
    if Path(args.ckpt).is_dir():
        name, row = config.class_names[classes[0]], classes[0]
        print(f"released checkpoint: classes are ImageNet's indices, which it orders as strings ({name} is row {row})")
    decode = load_decoder(config.vae, config.latent_scale, args.device) if config.vae else None

    args.steps = args.steps or (250 if config.vae else STEPS)
    n = args.npz or args.n or 4 * len(classes)
    y = torch.tensor([classes[i % len(classes)] for i in range(n)])
    start = time.time()
    progress = Progress(n * args.steps)
    images = sample_images(model, y, args.seed, args.cfg, args.steps, args.sampler, args.batch, decode, progress)
    seconds = time.time() - start
    if not images.isfinite().all():
        raise ValueError(f"{args.ckpt}: the samples are not finite; is the checkpoint damaged?")
    if args.npz:
        atomic_write(args.out, lambda file: np.savez(file, to_uint8(images), y.numpy()))
    else:
        save_grid(images, min(len(classes), n), args.out)
    report(args.ckpt, model, args.device, seconds, n, args.steps)
    print(f"wrote {args.out}")


def run(main):
    """main() with one line instead of a traceback for what a user can mend; exit code 1 (argparse's own is 2)."""
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except (MemoryError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: out of memory, try a smaller batch ({str(e).splitlines()[0] if str(e) else 'no details'})")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    run(main)
