"""The figures' machinery: tests/paper.py on models and data small enough for a test."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from terdit import Config, DiT, pack_model, save_checkpoint
from tests import paper
from tests.bench_model import in_its_own_process, step_seconds
from tests.conftest import ROOT
from tests.helpers import SMALL
from tests.test_dit import random_dit
from train import DEMO, Data, Images, digits


@pytest.fixture
def two(tmp_path):
    """A full-precision and a packed checkpoint of the same shape."""
    full = DiT(Config(**SMALL, ternary=False))
    ternary = DiT(Config(**SMALL))
    for model in (full, ternary):  # zeros would make class and guidance without effect
        for linear in (model.final_layer.linear, model.final_layer.adaLN_modulation[1]):
            torch.nn.init.normal_(linear.weight, std=0.1)
    paths = [tmp_path / "full.pt", tmp_path / "packed.pt"]
    save_checkpoint(paths[0], full)
    save_checkpoint(paths[1], pack_model(ternary))
    return paths


def call(*arguments):
    command = [sys.executable, ROOT / "tests/paper.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def read_png(path):
    return np.asarray(Image.open(path))


def read_table(path):
    """The cells of a table's rows, without its title and head."""
    lines = path.read_text().splitlines()[4:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def where(page, colour):
    """-> rows and columns of the pixels of about this colour, "#rrggbb"."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.nonzero((abs(page.astype(int) - rgb) < 8).all(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Two checkpoints side by side


def test_compare_any_two(two, tmp_path):
    done = call("compare", *two, "--steps", 2, "--classes", 2, 0, "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    page = read_png(tmp_path / "p/compare.png")
    assert page.shape == (4 * (96 + 4), 290 + 2 * 96, 3)  # two rows of each, two classes, 8 pixels enlarged to 96
    assert (page[:, :290] < 128).any(), "the rows have no titles"


def test_compare_starts_from_the_same_noise(two, tmp_path):
    args = SimpleNamespace(classes=None, steps=2, cfg=0.0, seeds=[0], out=tmp_path)
    paper.compare(args, [two[0], two[0]])
    rows = np.split(read_png(tmp_path / "compare.png")[:, 290:], 4)
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[2], rows[3])
    assert not np.array_equal(rows[0], rows[2])
    args.cfg = 1.0
    paper.compare(args, [two[0], two[0]])
    rows_of_another_cfg = np.split(read_png(tmp_path / "compare.png")[:, 290:], 4)
    assert not np.array_equal(rows_of_another_cfg[0], rows[0])


@pytest.mark.parametrize("arguments, code, message", [
    (["compare", "one.pt"], 2, "compare takes two checkpoints"),
    (["fig4", "one.pt", "two.pt"], 2, "nothing else takes any"),
    (["compare", "no.pt", "no.pt"], 1, "no.pt: no such file"),
    (["run", "no-folder"], 1, "no-folder: no such folder"),
    (["run", str(ROOT / "tests")], 1, "tests: no log.csv in it"),
])
def test_bad_arguments(arguments, code, message):
    done = call(*arguments)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_compare_wants_one_shape(two, tmp_path):
    save_checkpoint(two[1], DiT(Config(**SMALL | dict(input_size=4))))
    args = SimpleNamespace(classes=None, steps=1, cfg=None, seeds=[0], out=tmp_path)
    with pytest.raises(ValueError, match="expected the same"):
        paper.compare(args, two)
    assert not list(tmp_path.glob("*.png"))


def test_compare_takes_metas_files(tmp_path, monkeypatch):
    def load_decoder(name, latent_scale, device):
        return partial(torch.narrow, dim=1, start=0, length=3)  # three channels of the latents are the picture

    monkeypatch.setattr(paper, "load_decoder", load_decoder)
    torch.save(random_dit(dim=64, n_heads=16).state_dict(), tmp_path / "dit.pt")
    args = SimpleNamespace(classes=None, steps=1, cfg=None, seeds=[0], out=tmp_path)
    paper.compare(args, [tmp_path / "dit.pt", tmp_path / "dit.pt"])
    assert read_png(tmp_path / "compare.png").shape == (4 * (96 + 4), 290 + 5 * 96, 3)


# ----------------------------------------------------------------------------------------------------------------------
# The models that the figures train


def test_what_is_no_run_of_the_recipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "runs/demo/state-0000010"
    state.mkdir(parents=True)
    (tmp_path / "runs/demo-full").mkdir()
    paths = [Path("runs/demo-full/full.pt"), Path("runs/demo/packed.pt")]
    for path in paths:
        path.touch()
    metadata = dict(steps=4500, seed=0, decay=DEMO.decay)
    for field, other in dict(steps=10, seed=1, decay=0.0).items():
        (state / "run.json").write_text(json.dumps(metadata | {field: other}))
        message = f"demo was trained with {field}={other}, not {metadata[field]}: move it away"
        with pytest.raises(ValueError, match=message):
            paper.trained("tiny", 0)
    (state / "run.json").write_text(json.dumps(metadata))
    assert paper.trained("tiny", 0) == paths


def test_a_training_that_fails_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "ROOT", tmp_path)  # where there is no train.py
    message = "training of runs/paper-small-full-seed3 and runs/paper-small-seed3 did not end"
    with pytest.raises(ValueError, match=message):
        paper.trained("small", 3)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def fake_quality(path, n, seed, cfg=1.5):
    """Samples and quality of a checkpoint; the FID says whose it is, from which seed and with what guidance."""
    fid = {"full.pt": 1.0, "packed.pt": 2.0}[path.name] + 0.1 * seed
    if path.parent.name == "small":
        fid += 10
    if cfg == 1.0:
        fid += 100
    return torch.zeros(n, 3, 8, 8), dict(accuracy=1.0, fid=fid, n=n, seed=seed, cfg=cfg)


@pytest.fixture
def three_seeds(tmp_path, monkeypatch):
    """Arguments of three seeds, and fake checkpoints of two sizes."""
    for size in ("tiny", "small"):
        (tmp_path / size).mkdir()
        (tmp_path / size / "full.pt").write_bytes(bytes(2_000_000))
        (tmp_path / size / "packed.pt").write_bytes(bytes(1_000_000))

    def trained(size, seed):
        return [tmp_path / size / "full.pt", tmp_path / size / "packed.pt"]

    monkeypatch.setattr(paper, "trained", trained)
    monkeypatch.setattr(paper, "quality_of", fake_quality)
    return SimpleNamespace(seeds=[2, 0, 1], n=20, out=tmp_path)


def test_table1_of_several_seeds(three_seeds):
    """Medians and ranges go to the row they belong to, whatever order the seeds were measured in."""
    paper.table1(three_seeds)
    rows = read_table(three_seeds.out / "table1.md")
    assert len(rows) == 8
    right = "100.0 (100.0 to 100.0)"
    assert rows[0] == ["tiny", "full precision", "72,000", "2.00 MB", "1", right, "101.10 (101.00 to 101.20)"]
    assert rows[3] == ["tiny", "ternary", "72,000", "1.00 MB", "1.5", right, "2.10 (2.00 to 2.20)"]
    assert rows[7][:3] == ["small", "ternary", "24,000"] and rows[7][-1] == "12.10 (12.00 to 12.20)"


def test_fig2_of_several_seeds(three_seeds, monkeypatch):
    def poor_quality(model, n, seed):
        return torch.zeros(n, 3, 8, 8), dict(accuracy=0.5, fid=50.0 + seed)

    quantized = SimpleNamespace(bits_per_weight=2.25)
    monkeypatch.setattr(paper, "load_model", lambda path: None)
    monkeypatch.setattr(paper, "quantize_model", lambda model, method, calibration: quantized)
    monkeypatch.setattr(paper, "quality", poor_quality)
    paper.fig2(three_seeds)
    rows = read_table(three_seeds.out / "fig2.md")
    assert len(rows) == 2 + 7 and (three_seeds.out / "fig2.png").is_file()
    assert rows[0] == ["full precision", "32.00", "100.0 (100.0 to 100.0)", "1.10 (1.00 to 1.20)"]
    assert rows[-1] == ["ternary absmean", "2.25", "50.0 (50.0 to 50.0)", "51.00 (50.00 to 52.00)"]


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


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def test_plot_puts_larger_values_higher():
    lines = {"low": ([0, 1, 2], [1, 1, 1]), "high": ([0, 1, 2], [0, 1000, 1000])}
    page = np.asarray(paper.plot([paper.Panel("title", "x", lines)]))
    legend = 80
    low_rows, low_columns = where(page[legend:], paper.COLOURS[0])
    high_rows, high_columns = where(page[legend:], paper.COLOURS[1])
    assert np.median(high_rows) < np.median(low_rows) - 100
    assert high_columns.min() > low_columns.min() + 100, "a value of 0 was drawn"


def test_ticks():
    assert paper.linear_ticks(10, 4500).tolist() == [0, 1000, 2000, 3000, 4000, 5000]
    assert paper.log_ticks(0.003, 20).tolist() == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100])
    assert paper.log_ticks(0.08, 0.4).tolist() == pytest.approx([0.05, 0.1, 0.2, 0.5])


def test_picture_of_a_run(tmp_path):
    """Curves on the left, grids on the right. A run that has less gets a smaller picture."""
    run = tmp_path / "run"
    run.mkdir()
    log = ["step,loss,flipped,val_loss", "10,0.5,,", "20,0.4,0.3,0.45", "30,0.3,0.1,0.35"]
    (run / "log.csv").write_text("\n".join(log))
    Image.new("RGB", (960, 384), "#ff0000").save(run / "grid-0000015.png")
    Image.new("RGB", (960, 384), "#00ff00").save(run / "grid.png")
    done = call("run", run)
    assert done.returncode == 0 and done.stdout == f"wrote {run}/run.png\n", done.stderr
    page = read_png(run / "run.png")
    curves = page[:, :600]
    for colour in paper.COLOURS[:3]:  # loss, val_loss, flipped
        assert len(where(curves[92:], colour)[0]) > 100
    first_rows, first_columns = where(page, "#ff0000")
    last_rows, last_columns = where(page, "#00ff00")
    assert first_rows.max() < last_rows.min() and min(first_columns.min(), last_columns.min()) > 600

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "log.csv").write_text("step,loss,flipped,val_loss\n10,0.5,,\n")
    paper.plot_run(bare, tmp_path / "bare.png")
    bare_page = read_png(tmp_path / "bare.png")
    assert bare_page.shape[1] == 600 and bare_page.shape[0] < page.shape[0] / 2 + 50
    assert len(where(bare_page, paper.COLOURS[0])[0]) > 100 and not len(where(bare_page, paper.COLOURS[1])[0])


def test_activations_show_what_the_norm_does():
    x, y = digits(64)
    images = Images(((x + 1) * 127.5).byte()[:, None].numpy(), y.numpy(), {})
    data = Data(images, mirror=False, train_index=torch.arange(64), held_out=None)
    cfg = replace(DEMO, batch=4)
    found = {name: paper.activations(variant, [0, 2], data, cfg) for name, variant in paper.VARIANTS.items()}
    for name, (first, last) in found.items():
        assert (first["step"], last["step"]) == (0, 2) and len(first["adaln"]) == len(first["residual"]) == 4
        assert last["adaln"] != first["adaln"], name
    rms = {name: first["adaln"][0].rms for name, (first, _) in found.items()}
    assert rms["ternary, RMS Norm, alpha = 1"] == 0  # the gain starts there
    assert rms["ternary, RMS Norm with gain 1, alpha = 1"] == pytest.approx(1, abs=0.01)
    assert rms["ternary, no norm, alpha = 1"] > 10 * rms["ternary, no norm, alpha = absmean"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# The real sizes


def test_sizes_are_measured_in_a_process_of_their_own():
    ours = torch.ones(1 << 30, dtype=torch.uint8)  # this memory must not count as theirs
    packed = in_its_own_process("S", 256, "packed", "cpu", 0)
    dense = in_its_own_process("S", 256, "dense", "cpu", 0)
    assert dense["peak_bytes"] < len(ours)
    assert packed["weight_bytes"] < dense["weight_bytes"] / 4 and packed["file_bytes"] < dense["file_bytes"] / 8
    assert packed["step_s"] > 0 and packed["run_s"] is None and packed["peak_bytes"] > packed["weight_bytes"]
    with pytest.raises(RuntimeError, match="KeyError"):
        in_its_own_process("no such size", 256, "packed", "cpu", 0)


def test_a_step_of_dit_is_timed(monkeypatch):
    """One guided image: the class and no class, in the model's dtype."""
    model = random_dit(num_classes=1000).bfloat16()
    calls = []
    guided = model.forward_with_cfg

    def record(x, t, y, cfg_scale):
        out = guided(x, t, y, cfg_scale)
        calls.append((x, y, cfg_scale, out))

    monkeypatch.setattr(model, "forward_with_cfg", record)
    start = time.perf_counter()
    seconds = step_seconds(model, "cpu")
    assert 0 < seconds < time.perf_counter() - start
    assert len(calls) == 1
    x, y, cfg_scale, out = calls[0]
    size = model.config.input_size
    assert x.shape == (2, model.config.in_channels, size, size) and x.dtype == torch.bfloat16
    assert y.tolist() == [207, 1000] and cfg_scale == 4 and len(out) == 2 and out.isfinite().all()


def test_table2_goes_on_where_memory_ends(tmp_path, monkeypatch):
    def measured(size, image_size, mode, device, steps):
        if (size, mode) == ("4.2B", "dense"):
            raise RuntimeError("killed, probably out of memory")
        return dict(step_s=0.5, file_bytes=2e9, weight_bytes=1e9, peak_bytes=3e9)

    monkeypatch.setattr(paper, "in_its_own_process", measured)
    paper.table2(SimpleNamespace(out=tmp_path))
    rows = read_table(tmp_path / "table2.md")
    assert len(rows) == 8 and {len(row) for row in rows} == {8}
    assert [row[0] for row in rows if "out of memory" in row[2]] == ["Large-DiT-4.2B"] * 2
    assert rows[0][-2:] == ["0.50", "125"]
