"""The figures' machinery: tests/paper.py on models and data small enough for a test."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from terdit import Config, DiT, pack_model, save_checkpoint
from tests import paper
from tests.baselines import DiTConfig, DiTXL
from tests.bench_model import in_its_own_process, step_seconds
from tests.conftest import ROOT
from tests.test_baselines import TINY as DIT
from tests.test_cli import SMALL
from train import DEMO, Images, digits


@pytest.fixture
def two(tmp_path):
    """A full-precision and a packed checkpoint of the same shape."""
    paths = [tmp_path / "full.pt", tmp_path / "packed.pt"]
    full, ternary = DiT(Config(**SMALL, ternary=False)), DiT(Config(**SMALL))
    for model in (full, ternary):  # not zeros, which say nothing of classes and guidance
        for linear in (model.final_layer.linear, model.final_layer.adaLN_modulation[1]):
            torch.nn.init.normal_(linear.weight, std=0.1)
    save_checkpoint(paths[0], full)
    save_checkpoint(paths[1], pack_model(ternary))
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


def test_compare_starts_from_the_same_noise(two, tmp_path):
    args = SimpleNamespace(ckpt=[two[0], two[0]], classes=None, steps=2, cfg=0.0, seeds=[0], out=tmp_path)
    paper.compare(args)
    rows = np.split(np.asarray(Image.open(tmp_path / "compare.png"))[:, 290:], 4)
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[2], rows[3])
    assert not np.array_equal(rows[0], rows[2])
    args.cfg = 1.0
    paper.compare(args)
    assert not np.array_equal(np.split(np.asarray(Image.open(tmp_path / "compare.png"))[:, 290:], 4)[0], rows[0])


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
    state = DiTXL(DiTConfig(**DIT | dict(dim=48, n_heads=16))).state_dict()
    torch.save(state, tmp_path / "released.pt")
    torch.save(dict(ema=state, args=Namespace(lr=1e-4)), tmp_path / "trained.pt")
    for name in ("released.pt", "trained.pt"):
        assert paper.load_any(tmp_path / name, "cpu").config.dim == 48


def test_what_is_no_run_of_the_recipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "runs/demo/state-0000010"
    state.mkdir(parents=True)
    (tmp_path / "runs/demo-full").mkdir()
    paths = [Path("runs/demo-full/full.pt"), Path("runs/demo/packed.pt")]
    for path in paths:
        path.touch()
    about = dict(steps=4500, seed=0, decay=DEMO["decay"])
    for field, other in dict(steps=10, seed=1, decay=0.0).items():
        (state / "run.json").write_text(json.dumps(about | {field: other}))
        with pytest.raises(ValueError, match=f"demo was trained with {field}={other}, not {about[field]}: move it away"):
            paper.trained("tiny", 0)
    (state / "run.json").write_text(json.dumps(about))
    assert paper.trained("tiny", 0) == paths


def test_a_training_that_fails_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "ROOT", tmp_path)  # where there is no train.py
    with pytest.raises(
        ValueError, match="training of runs/paper-small-full-seed3 and runs/paper-small-seed3 did not end"
    ):
        paper.trained("small", 3)


def test_tables_of_several_seeds(tmp_path, monkeypatch):
    """Medians and ranges go to the row they belong to, whatever order the seeds were measured in."""
    kinds = {"full.pt": 1.0, "packed.pt": 2.0}
    fid_of = lambda p, seed, cfg: kinds[p.name] + 10 * (p.parent.name == "small") + 0.1 * seed + 100 * (cfg == 1.0)
    for size in ("tiny", "small"):
        (tmp_path / size).mkdir()
        for name, length in (("full.pt", 2_000_000), ("packed.pt", 1_000_000)):
            (tmp_path / size / name).write_bytes(bytes(length))
    monkeypatch.setattr(paper, "trained", lambda size, seed: [tmp_path / size / name for name in kinds])
    found = lambda p, n, seed, cfg=1.5: (
        torch.zeros(n, 3, 8, 8),
        dict(accuracy=1.0, fid=fid_of(p, seed, cfg), n=n, seed=seed, cfg=cfg),
    )
    monkeypatch.setattr(paper, "quality_of", found)
    args = SimpleNamespace(seeds=[2, 0, 1], n=20, out=tmp_path)
    paper.table1(args)
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in (tmp_path / "table1.md").read_text().splitlines()[4:]
    ]
    assert len(rows) == 8
    assert rows[0] == [
        "tiny",
        "full precision",
        "72,000",
        "2.00 MB",
        "1",
        "100.0 (100.0 to 100.0)",
        "101.10 (101.00 to 101.20)",
    ]
    assert rows[3][1:] == ["ternary", "72,000", "1.00 MB", "1.5", "100.0 (100.0 to 100.0)", "2.10 (2.00 to 2.20)"]
    assert rows[7][:3] == ["small", "ternary", "24,000"] and rows[7][-1] == "12.10 (12.00 to 12.20)"

    monkeypatch.setattr(paper, "load_model", lambda path: SimpleNamespace(path=path))
    quantized = lambda model, method, calibration: SimpleNamespace(bits_per_weight=2.25, method=method)
    monkeypatch.setattr(paper, "quantize_model", quantized)
    poor = lambda model, n, seed: (torch.zeros(n, 3, 8, 8), dict(accuracy=0.5, fid=50.0 + seed))
    monkeypatch.setattr(paper, "quality", poor)
    paper.fig2(args)
    rows = [line for line in (tmp_path / "fig2.md").read_text().splitlines()[4:]]
    assert len(rows) == 2 + 7 and (tmp_path / "fig2.png").is_file()
    assert rows[0] == "| full precision | 32.00 | 100.0 (100.0 to 100.0) | 1.10 (1.00 to 1.20) |"
    assert rows[-1] == "| ternary absmean | 2.25 | 50.0 (50.0 to 50.0) | 51.00 (50.00 to 52.00) |"


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
    assert at_first["ternary, RMS Norm with gain 1, alpha = 1"] == pytest.approx(1, abs=0.01)
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
    ours = torch.ones(1 << 30, dtype=torch.uint8)  # is not theirs
    packed, dense = (in_its_own_process("S", 256, mode, "cpu", 0) for mode in ("packed", "dense"))
    assert dense["peak_bytes"] < len(ours)
    assert packed["weight_bytes"] < dense["weight_bytes"] / 4 and packed["file_bytes"] < dense["file_bytes"] / 8
    assert packed["step_s"] > 0 and packed["run_s"] is None and packed["peak_bytes"] > packed["weight_bytes"]
    with pytest.raises(RuntimeError, match="KeyError"):
        in_its_own_process("no such size", 256, "packed", "cpu", 0)


def test_a_step_of_dit_is_timed():
    """One guided image: the class and no class, in the model's dtype."""
    model, calls = DiTXL(DiTConfig(**DIT | dict(num_classes=1000))).bfloat16().eval(), []
    guided = model.forward_with_cfg
    model.forward_with_cfg = lambda *args: calls.append((args, guided(*args)))
    start = time.perf_counter()
    assert 0 < step_seconds(model, "cpu") < time.perf_counter() - start
    ((x, t, y, cfg_scale), out), size = calls[0], model.config.input_size
    assert len(calls) == 1 and x.shape == (2, model.config.in_channels, size, size) and x.dtype == torch.bfloat16
    assert y.tolist() == [207, 1000] and cfg_scale == 4 and len(out) == 2 and out.isfinite().all()


def test_table2_goes_on_where_memory_ends(tmp_path, monkeypatch):
    def measured(size, image_size, mode, device, steps):
        if (size, mode) == ("4.2B", "dense"):
            raise RuntimeError("killed, probably out of memory")
        return dict(step_s=0.5, file_bytes=2e9, weight_bytes=1e9, peak_bytes=3e9)

    monkeypatch.setattr(paper, "in_its_own_process", measured)
    paper.table2(SimpleNamespace(out=tmp_path))
    rows = (tmp_path / "table2.md").read_text().splitlines()[4:]
    assert len(rows) == 8 and {row.count("|") for row in rows} == {9}
    assert [row.split("|")[1].strip() for row in rows if "out of memory" in row] == ["Large-DiT-4.2B"] * 2
    assert rows[0].endswith("| 0.50 | 125 |")
