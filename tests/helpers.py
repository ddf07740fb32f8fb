"""What several test files share: a small model, released folders, and training runs that take a second."""

import csv
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from terdit import SIZES, Config, DiT, read_checkpoint

GOLDEN = Path(__file__).parent / "golden"
RELEASED = {"terdit": GOLDEN / "terdit/tiny", "large": GOLDEN / "large/tiny"}  # folders in upstream's format

SMALL = dict(input_size=8, patch_size=2, in_channels=3, dim=32, n_layers=2, n_heads=4, multiple_of=16, num_classes=5)


def awake(model):
    """Give every parameter a value that matters: a fresh model's blocks are the identity and its output is 0."""
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
        else:
            torch.nn.init.uniform_(p, 0.1, 0.5)
    return model.eval()


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
    """For every test of a file that imports this: shorten, and give the test runner its signal handlers back."""
    shorten(monkeypatch)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for s in handlers:
        signal.signal(s, signal.SIG_DFL)  # some are ignored where the tests themselves run under nohup, or with &
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def run(out, *flags, image_size=8):
    """Run train.py into the folder `out` -> the state that it leaves there, as load_run gives it."""
    arguments = "--batch 4 --grid 0 --dtype fp32 --device cpu".split()
    if image_size:
        arguments += ["--image-size", str(image_size)]
    train.main([*arguments, "--out", str(out), *map(str, flags)])
    return load_run(out)


def load_run(out):
    """The newest state of a run folder as one dict: its settings and its model's Config, `step`, and `tensors`."""
    state = read_checkpoint(train.states(out)[-1], "a state")
    return state["run"] | dict(step=state["step"], tensors=state["tensors"])


def weights(state, kind):
    """The state dict of the model that is trained (kind "model") or of the averaged one ("ema")."""
    return {k.removeprefix(f"{kind}."): v for k, v in state["tensors"].items() if k.startswith(f"{kind}.")}


def model_of(state, kind):
    """The DiT with these weights."""
    model = DiT(Config(**{f.name: state[f.name] for f in fields(Config)}))
    model.load_state_dict(weights(state, kind))
    return model


def read_log(path):
    """log.csv -> one dict a row, without the empty fields."""
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
