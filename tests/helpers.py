"""What several test files share: a small model, released folders, and training runs that take a second."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from terdit import SIZES

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


# Training runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    """Make `tiny` smaller and the digits few, and give the test runner its signal handlers back.

    It applies to every test of a file that imports it.
    """
    digits = train.digits

    def few_digits(n, size, seed):
        return digits(min(n, 200), size, seed)

    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | dict(dim=64, n_layers=2, n_heads=2))
    monkeypatch.setattr(train, "digits", few_digits)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where the tests themselves run under nohup
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def run(out, *flags, image_size=8):
    """Run train.py into the folder `out` -> the state that it leaves there, as load_run gives it."""
    arguments = "--batch 4 --grid 0 --dtype fp32".split()
    if image_size:
        arguments += ["--image-size", str(image_size)]
    train.main([*arguments, "--out", str(out), *map(str, flags)])
    return load_run(out)


def load_run(out):
    """The newest state of a run folder: the entries of run.json, and `tensors`."""
    path = train.states(out)[-1]
    return json.loads((path / "run.json").read_text()) | {"tensors": train.read_state(path)}


def weights(state, kind):
    """The state dict of the model that is trained (kind "model") or of the averaged one ("ema")."""
    prefix = f"{kind}."
    return {k.removeprefix(prefix): v for k, v in state["tensors"].items() if k.startswith(prefix)}


def read_log(path):
    """log.csv -> one dict a row, without the empty fields."""
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
