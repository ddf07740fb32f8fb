"""sample.py as a user runs it: classes, guidance, seeds, the grid; what it survives and refuses."""

import io
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from terdit import Config, GaussianDiffusion, load_model
from tests.conftest import ROOT
from tests.helpers import save_model

NAMES = ["cat", "cafe\u0301", "007", "12", "x"]  # the accent is a letter of its own


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A packed file of a model that draws 8x8 pixels of these classes."""
    path = tmp_path_factory.mktemp("run") / "packed.pt"
    return save_model(path, class_names=NAMES, prediction="v")


def draw(ckpt, out, *flags):
    sample.main(["--ckpt", str(ckpt), "--out", str(out), *map(str, flags)])


def test_classes_by_name():
    for names, wanted, rows in [
        (NAMES, ["12", "caf\u00e9", "007", "12"], [3, 1, 2, 3]),
        (["1", "01", "0"], ["1", "01"], [0, 1]),
        (sorted(str(i) for i in range(1000)), ["207", "2"], [121, 112]),  # a released TerDiT's
        (None, ["4", "0"], [4, 0]),  # rows, where classes have no names
        (NAMES, None, [0, 1, 2, 3, 4]),
        ([f"n{i}" for i in range(11)], None, list(range(8))),
    ]:
        config = Config(num_classes=len(names or NAMES), class_names=names)
        assert sample.pick_classes(wanted, config) == rows
    for names, wanted in [(NAMES, "7"), (NAMES, "dog"), (None, "5")]:
        config = Config(num_classes=len(names or NAMES), class_names=names)
        with pytest.raises(ValueError, match=f"class '{wanted}' is not one of the 5: \\["):
            sample.pick_classes([wanted], config)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_sampling_is_guided_with_noise_by_number(ckpt, sampler):
    """Against guidance and noise that are written out here."""
    model = load_model(ckpt)
    y = torch.tensor([1, 0, 1])
    index = [4, 0, 7]
    generators = [sample.generator(5, i) for i in index]

    def noise(x=None):
        return torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])

    def guided_model(x, t):
        cond = model(x, t, y)
        uncond = model(x, t, torch.full_like(y, 5))
        return torch.cat([uncond[:, :2] + 3 * (cond - uncond)[:, :2], cond[:, 2:]], dim=1)

    diffusion = GaussianDiffusion(6, "v")
    if sampler == "ddpm":
        want = diffusion.p_sample_loop(guided_model, noise(), clip_denoised=True, noise_fn=noise)
    else:
        loop = dict(ddim=diffusion.ddim_sample_loop, dpm=diffusion.dpm_sample_loop)[sampler]
        want = loop(guided_model, noise(), clip_denoised=True)
    got = sample.sample_latents(model, y, index, 5, 3.0, 6, sampler, guided_channels=2)
    assert (got - want).abs().max() < 1e-4


def test_the_grid_has_a_column_a_class_and_white_where_no_image_is(ckpt, tmp_path, capsys):
    flags = ["--classes", "cat", "007", "x", "--steps", 3]
    draw(ckpt.parent, tmp_path / "x.png", "--n", 7, *flags)  # a run folder
    read = f"{ckpt}: 7 images of the classes ['cat', '007', 'x']\n"
    assert read in capsys.readouterr().out
    draw(ckpt, tmp_path / "x.npz", "--npz", 7, *flags, "--batch", 2)  # the same images
    draw(ckpt, tmp_path / "y.npz", "--npz", 7, *flags, "--seed", 2**32 - 1)
    images = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (3 * 96, 3 * 96, 3)
    cells = grid[6::12, 6::12].reshape(3, 8, 3, 8, 3).swapaxes(1, 2).reshape(9, 8, 8, 3)
    # A matmul of another height rounds the last bits otherwise.
    assert np.abs(cells[:7] - images).max() <= 1
    assert (cells[7:] == 255).all()
    assert (np.load(tmp_path / "y.npz")["arr_0"] != images).mean() > 0.5


LONG = "x" * 248  # with .png it is 252 letters


@pytest.mark.parametrize("flags, message", [
    ("--steps 1001", "argument --steps: got 1001, expected at least 1 and at most 1000"),
    ("--vae x", "draws pixels, there are no latents to decode"),
    # --out, before anything is drawn:
    ("--out x.txt", "--out x.txt: no picture can be written so (unknown file extension"),
    ("--out x.jpg --n 700 --classes x", "--out x.jpg: no picture can be written so ("),
    ("--out x.ico --n 4", "--out x.ico: its format cuts (384, 96) pixels down to ("),
    ("--out /nowhere/x.png", "/nowhere/x.png: cannot be written ([Errno 2] No such file"),
    (f"--out {LONG}xxxx.png", ".png: cannot be written ([Errno 36] File name too long"),
    (f"--out {LONG}.npz --npz 4", "File name too long"),
    ("two processes", "for a grid start one"),
])
def test_a_mistake_is_said(ckpt, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sample, "sample_latents", None)
    if flags == "two processes":
        flags = ""
        for name in sample.TORCHRUN:
            monkeypatch.setenv(name, "0" if name.endswith("RANK") else "2")
    with pytest.raises(SystemExit) as e:
        sample.run_main(lambda: draw(ckpt, "x.png", *flags.split()))
    said = capsys.readouterr().err
    if e.value.code != 2:  # argparse's; sys.exit prints a text and ends with code 1
        said = e.value.code
        assert "\n" not in said
    assert message in said
    assert os.listdir() == []
    assert os.listdir(tmp_path) == ["here"]


def test_two_models_in_a_folder_are_refused_by_name(ckpt, tmp_path):
    shutil.copy(ckpt, tmp_path / "packed.pt")
    shutil.copy(ckpt, tmp_path / "full.pt")
    with pytest.raises(ValueError, match="holds packed.pt and full.pt: name one of them$"):
        draw(tmp_path, tmp_path / "x.png")
    assert sample.find_checkpoint(tmp_path / "full.pt") == tmp_path / "full.pt"


@pytest.mark.parametrize("names", [["WORLD_SIZE"], sample.TORCHRUN[1:]])
def test_variables_that_are_no_whole_set_do_not_count(monkeypatch, names):
    monkeypatch.setenv("RANK", "")
    for name in names:
        monkeypatch.setenv(name, "2")
    assert sample.torchrun() == (0, 1, 0)


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


@pytest.mark.parametrize("width", [80, 40])
def test_progress_fits_the_terminal(monkeypatch, width):
    terminal = Terminal()
    seconds = iter(range(0, 10**6, 5000))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((width, 24)))
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = sample.Progress(1750)
    for _ in range(7):
        progress.add(250, "step 1234567/1750000, loss 0.1234")
    parts = terminal.getvalue().removesuffix("\n").removeprefix("\r").split("\r")
    assert [len(part) for part in parts] == 7 * [width - 1]
    want = "step 1234567/1750000, loss 0.1234: 14.3%, 0.05 images/s, 8:20:00 left"
    assert parts[0].rstrip() == want[: width - 1]


def test_sampling_goes_on_when_nobody_can_read_what_it_says(ckpt, tmp_path):
    command = f'"{sys.executable}" "{ROOT}/sample.py" --ckpt "{ckpt}" --n 5 --steps 1 --device cpu'
    script = f"""
        PYTHONIOENCODING=ascii {command} --out a.png 2>&- >stdout.txt &
        {command} --out b.png <&- >&- 2>stderr.txt &
        wait
    """
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    text = (tmp_path / "stdout.txt").read_text()
    assert r"'cafe\u0301'" in text
    assert "\nwrote a.png\n" in text
    assert (tmp_path / "stderr.txt").read_text().startswith("sampling: 100.0%, ")


def test_a_bad_file_ends_in_one_line_and_code_1(tmp_path):
    path = shutil.copy(__file__, tmp_path / "bad.pt")
    command = [sys.executable, ROOT / "sample.py", "--ckpt", path]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: {path}: not a checkpoint of this project")
