"""What test files share: a small model, released folders, and training that takes a second."""

import csv
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from terdit import SIZES, Config, DiT, pack_model, read_checkpoint, save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
RELEASED = {"terdit": GOLDEN / "terdit/tiny", "large": GOLDEN / "large/tiny"}  # upstream's format

SMALL = dict(input_size=8, patch_size=2, in_channels=3, dim=32, n_layers=2, n_heads=4)
SMALL |= dict(multiple_of=16, num_classes=5)


def awake(model):
    """Give every parameter a value that matters. A fresh model's blocks change nothing, and its
    output is 0."""
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
        else:
            torch.nn.init.uniform_(p, 0.1, 0.5)
    return model.eval()


def save_model(path, seed=0, **changes):
    """A checkpoint of SMALL, with changes, whose outputs are not 0; packed if it is ternary."""
    torch.manual_seed(seed)
    model = awake(DiT(Config(**SMALL | changes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, pack_model(model) if model.config.ternary else model)
    return path


def same(a, b):
    """Equality of nested dicts, lists and tensors, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def save_image(path, mode="RGB", size=(20, 30), colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def shorten(monkeypatch):
    """Make `tiny` smaller and the digits few."""
    digits = train.digits
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | dict(dim=64, n_layers=2, n_heads=2))
    monkeypatch.setattr(train, "digits", lambda n, size, seed: digits(min(n, 200), size, seed))


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    """For each test of a file that imports this: shorten, and restore pytest's signal handlers."""
    shorten(monkeypatch)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for s in handlers:
        signal.signal(s, signal.SIG_DFL)  # some are ignored if the tests run under nohup, or with &
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def run(out, *flags, image_size=8):
    """Run train.py into the folder `out` -> the state that it leaves there, see load_run."""
    arguments = "--batch 4 --grid 0 --dtype fp32 --device cpu".split()
    if image_size:
        arguments += ["--image-size", str(image_size)]
    train.main([*arguments, "--out", str(out), *map(str, flags)])
    return load_run(out)


def load_run(out):
    """The newest state of a run folder: its settings, and `step`, `config` and `tensors`."""
    state = read_checkpoint(train.states(out)[-1], "a state")
    return state["settings"] | {name: state[name] for name in ("step", "config", "tensors")}


def weights(state, kind):
    """The weights of the trained model (kind "model") or of the averaged one ("ema")."""
    tensors = state["tensors"].items()
    return {k.removeprefix(f"{kind}."): v for k, v in tensors if k.startswith(f"{kind}.")}


def model_of(state, kind):
    """The DiT with these weights."""
    model = DiT(Config(**state["config"]))
    model.load_state_dict(weights(state, kind))
    return model


def read_log(path):
    """log.csv -> one dict a row, without the empty fields."""
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
