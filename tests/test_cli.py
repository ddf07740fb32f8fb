"""sample.py as a user runs it: classes, guidance, seeds, the grid, and one line for each mistake."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from terdit import Config, DiT, GaussianDiffusion, load_model, pack_model, save_checkpoint
from tests.conftest import ROOT
from tests.helpers import SMALL, awake

NAMES = ["cat", "cafe\u0301", "007", "12", "x"]  # the accent is a letter of its own


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A packed file of a model that draws 8x8 pixels of these classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "packed.pt"
    save_checkpoint(path, pack_model(awake(DiT(Config(**SMALL, class_names=NAMES, prediction="v")))))
    return path


def draw(ckpt, out, *flags):
    sample.main(["--ckpt", str(ckpt), "--out", str(out), *map(str, flags)])


def test_classes_by_name_number_and_row():
    for names, wanted, rows in [
        (NAMES, ["12", "7", "caf\u00e9", "0012"], [3, 2, 1, 3]),
        (["1", "01", "0"], ["1", "01", "00"], [0, 1, 2]),  # a name itself comes first
        (sorted(str(i) for i in range(1000)), ["207", "2"], [121, 112]),  # a released TerDiT's
        (None, ["4", "0"], [4, 0]),  # rows, where classes have no names
        (NAMES, None, [0, 1, 2, 3, 4]),
        ([f"n{i}" for i in range(11)], None, list(range(8))),
    ]:
        config = Config(num_classes=len(names or NAMES), class_names=names)
        assert sample.pick_classes(wanted, config) == rows
    for names, wanted in [(NAMES, "1"), (NAMES, "dog"), (["1", "01"], "001"), (None, "5")]:
        config = Config(num_classes=len(names or NAMES), class_names=names)
        with pytest.raises(ValueError, match=f"class '{wanted}' is unknown or not the only one: the . are "):
            sample.pick_classes([wanted], config)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_sampling_is_guided_within_the_interval_with_noise_by_number(ckpt, sampler):
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
        guided = torch.cat([uncond[:, :2] + 3 * (cond - uncond)[:, :2], cond[:, 2:]], dim=1)
        return guided if 200 <= t[0] <= 799 else cond  # of 999, 799, 599, 400, 200, 0

    diffusion = GaussianDiffusion(6, "v")
    if sampler == "ddpm":
        want = diffusion.p_sample_loop(guided_model, noise(), clip_denoised=True, noise_fn=noise)
    else:
        loop = dict(ddim=diffusion.ddim_sample_loop, dpm=diffusion.dpm_sample_loop)[sampler]
        want = loop(guided_model, noise(), clip_denoised=True)
    got = sample.sample_latents(model, y, index, 5, 3.0, 6, sampler, guided_channels=2, guidance_interval=(200, 799))
    assert (got - want).abs().max() < 1e-4


def test_the_grid_has_a_column_a_class_and_white_where_no_image_is(ckpt, tmp_path, capsys):
    flags = ["--classes", "cat", 7, "x", "--steps", 3]
    draw(ckpt.parent, tmp_path / "x.png", "--n", 7, *flags)  # a run folder
    assert "7 images of the classes ['cat', '007', 'x']\n" in capsys.readouterr().out
    draw(ckpt, tmp_path / "x.npz", "--npz", 7, *flags, "--batch", 2)  # the same images, whatever the batch
    draw(ckpt, tmp_path / "y.npz", "--npz", 7, *flags, "--seed", 1)
    images = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (3 * 96, 3 * 96, 3)
    cells = grid[6::12, 6::12].reshape(3, 8, 3, 8, 3).swapaxes(1, 2).reshape(9, 8, 8, 3)
    assert np.abs(cells[:7] - images).max() <= 1  # a matmul of another height rounds the last bits otherwise
    assert (cells[7:] == 255).all()
    assert (np.load(tmp_path / "y.npz")["arr_0"] != images).mean() > 0.5


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--steps 0", 2, "argument --steps: got 0, expected at least 1"),
        ("--steps 1001", 1, "1001 steps, expected 1 to 1000"),
        ("--guidance-interval 990 998", 1, "--guidance-interval 990 998 guides nothing: none of the 16 timesteps"),
        ("--guided-channels -1", 2, "argument --guided-channels: got -1, expected at least 1"),
        ("--out x.txt", 2, "x.txt does not end as a picture that can be written"),
        ("--out x.mpg", 2, "x.mpg does not end as a picture that can be written"),
        ("--out /nowhere/x.png", 2, "/nowhere/x.png is a folder, or not in one that can be written to"),
        ("--npz 4 --out .", 2, ". is a folder, or not in one"),
        ("--npz 4 --n 4", 2, "argument --n: not allowed with argument --npz"),
        ("--vae x", 1, "draws pixels, there are no latents to decode"),
        ("--n-heads 7", 1, "n_heads=7"),
        ("--ckpt missing.pt", 1, "missing.pt: no such file"),
        ("two processes", 2, "for a grid start one"),
    ],
)
def test_a_mistake_is_said(ckpt, tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    if flags == "two processes":
        monkeypatch.setenv("WORLD_SIZE", "2")
        flags = ""
    with pytest.raises(SystemExit) as e:
        sample.run_main(lambda: draw(ckpt, "x.png", *flags.split()))
    said = capsys.readouterr().err
    if isinstance(e.value.code, str):  # sys.exit prints it and ends with code 1
        said = e.value.code
        assert (code, said.count("\n")) == (1, 0)
    assert message in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["sample.py --ckpt bad.pt", "train.py --init bad.pt"])
def test_a_bad_file_ends_in_one_line_and_code_1(tmp_path, command):
    shutil.copy(__file__, tmp_path / "bad.pt")
    script, *flags = command.split()
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: bad.pt: not a checkpoint of this project")
