"""The figures' machinery: tests/paper.py on models and data small enough for a test."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from terdit import Config, DiT, pack_model, save_checkpoint
from tests import paper
from tests.baselines import DiTConfig, DiTXL
from tests.bench_model import in_its_own_process
from tests.conftest import ROOT
from tests.test_baselines import TINY as DIT
from tests.test_cli import SMALL
from train import Images, digits


@pytest.fixture
def two(tmp_path):
    """A full-precision and a packed checkpoint of the same shape."""
    paths = [tmp_path / "full.pt", tmp_path / "packed.pt"]
    save_checkpoint(paths[0], DiT(Config(**SMALL, ternary=False)))
    save_checkpoint(paths[1], pack_model(DiT(Config(**SMALL))))
    return paths


def call(*arguments):
    command = [sys.executable, ROOT / "tests/paper.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_compare_any_two(two, tmp_path):
    done = call("compare", *two, "--steps", 2, "--classes", 2, 0, "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    page = np.asarray(Image.open(tmp_path / "p/compare.png"))
    assert page.shape == (4 * (96 + 4), 290 + 2 * 96, 3)  # two rows of each, two classes, 8 pixels enlarged to 96
    assert (page[:, :290] < 128).any(), "the rows have no titles"


@pytest.mark.parametrize("arguments, code, message", [
    (["compare", "one.pt"], 2, "compare takes two checkpoints"),
    (["fig4", "one.pt", "two.pt"], 2, "nothing else takes any"),
    (["compare", "no.pt", "no.pt"], 1, "no.pt: no such file"),
])  # fmt: skip
def test_bad_arguments(arguments, code, message):
    done = call(*arguments)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_compare_wants_one_shape(two, tmp_path):
    save_checkpoint(two[1], DiT(Config(**SMALL | dict(input_size=4))))
    args = SimpleNamespace(ckpt=two, classes=None, steps=1, cfg=None, seeds=[0], out=tmp_path)
    with pytest.raises(ValueError, match="expected the same"):
        paper.compare(args)
    assert not list(tmp_path.glob("*.png"))


def test_load_any_takes_metas_files(tmp_path):
    torch.save(DiTXL(DiTConfig(**DIT | dict(dim=48, n_heads=16))).state_dict(), tmp_path / "dit.pt")
    assert paper.load_any(tmp_path / "dit.pt").config.dim == 48


def test_plot_puts_larger_values_higher(tmp_path):
    lines = {"low": ([0, 1, 2], [1, 1, 1]), "high": ([0, 1, 2], [0, 1000, 1000])}
    paper.plot([("title", "x", lines)], tmp_path / "p.png")
    page = np.asarray(Image.open(tmp_path / "p.png")).astype(int)
    where = []
    for colour in paper.COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        rows, columns = np.nonzero((abs(page - rgb) < 8).all(-1))
        below = rows > 80  # the legend is above
        where.append((np.median(rows[below]), columns[below].min()))
    (low, from_start), (high, from_second) = where
    assert high < low - 100
    assert from_second > from_start + 100, "a value of 0 was drawn"


def test_activations_show_what_the_norm_does():
    x, y = digits(64)
    args = SimpleNamespace(batch=4, seed=0)
    data = Images(((x + 1) * 127.5).byte()[:, None].numpy(), y.numpy(), {}), False, torch.arange(64), None
    seen = {name: paper.activations(*variant, [0, 2], data, args) for name, variant in paper.VARIANTS.items()}
    for name, (first, last) in seen.items():
        assert (first["step"], last["step"]) == (0, 2) and len(first["adaln"]) == len(first["residual"]) == 4
        assert last["adaln"] != first["adaln"], name
    at_first = {name: first["adaln"][0][0] for name, (first, _) in seen.items()}
    assert at_first["ternary, RMS Norm, alpha = 1"] == 0  # the gain starts there
    assert at_first["ternary, no norm, alpha = 1"] > 10 * at_first["ternary, no norm, alpha = absmean"] > 0


def test_tables_are_joined(tmp_path):
    args = SimpleNamespace(out=tmp_path / "p")
    paper.publish(args, "b", "B", ["", "x"], [["row", "1"]], [1])
    paper.publish(args, "a", "A", ["", "y"], [["row", "2"]], [2])
    paper.publish(args, "a", "A", ["", "y"], [["row", "3"]], [3])
    text = (tmp_path / "p/results.md").read_text()
    assert text.index("## A") < text.index("## B") and "| row | 3 |" in text and "| row | 2 |" not in text
    assert (tmp_path / "p/a.json").read_text() == "[\n 3\n]"


def test_spread():
    assert paper.spread([3.0], "{:.1f}") == "3.0"
    assert paper.spread([3.0, 1.0, 2.5], "{:.1f}") == "2.5 (1.0 to 3.0)"


def test_sizes_are_measured_in_a_process_of_their_own():
    packed, dense = (in_its_own_process("S", 256, mode, "cpu", 0) for mode in ("packed", "dense"))
    assert packed["weight_bytes"] < dense["weight_bytes"] / 4 and packed["file_bytes"] < dense["file_bytes"] / 8
    assert packed["step_s"] > 0 and packed["run_s"] is None and packed["peak_bytes"] > packed["weight_bytes"]
    with pytest.raises(RuntimeError, match="KeyError"):
        in_its_own_process("no such size", 256, "packed", "cpu", 0)
