"""The two scripts as a user runs them: exit codes, messages, files."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from terdit import Config, DiT, GaussianDiffusion, load_model, pack_model, save_checkpoint
from tests.conftest import ROOT
from tests.test_golden import FOLDERS
from tests.test_ternary import awake

SMALL = dict(input_size=8, patch_size=2, in_channels=3, dim=32, n_layers=2, n_heads=4, multiple_of=16, num_classes=3)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "packed.pt"
    save_checkpoint(path, pack_model(awake(DiT(Config(**SMALL, class_names=["cat", "dog", "0"], prediction="v")))))
    return path


def call(script, *flags, cwd=None):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


def test_sample_as_a_user(ckpt, tmp_path):
    done = call("sample.py", "--ckpt", ckpt, "--n", 7, "--steps", 3, "--out", tmp_path / "g.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "g.png").size == (3 * 96, 3 * 96)  # three classes, three rows
    for word in (
        "on disk",
        "2-bit codes",
        "full-precision rest",
        "container",
        "peak resident memory",
        "s an image",
        "wrote",
    ):
        assert word in done.stdout
    assert os.listdir(tmp_path) == ["g.png"]


def images(model, y, **kwargs):
    return sample.to_uint8(sample.sample_images(model, y, **{"steps": 5, **kwargs}))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_seed_decides_not_batch(ckpt, sampler):
    model, y = load_model(ckpt), [0, 1, 2, 0, 1]
    want = images(model, y, seed=3, sampler=sampler)
    for batch in (1, 2, 3):
        got = images(model, y, seed=3, sampler=sampler, batch=batch)
        assert np.abs(got.astype(int) - want).max() <= 1  # matmuls of another height may round otherwise
    assert (images(model, y, seed=4, sampler=sampler) != want).mean() > 0.5
    assert (want[0] != want[3]).mean() > 0.5  # two images of one class


@pytest.mark.parametrize("cfg", [1, 3.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_against_the_plain_loop(ckpt, sampler, cfg):
    """sample_latents computes adaLN for many steps at once; more steps than that here. This is the loop it stands for."""
    model, y, steps = load_model(ckpt), [1, 0, 1], sample.AHEAD + 4
    generators = [sample.generator(5, place) for place in range(3)]
    shape = (model.config.in_channels, *[model.config.input_size] * 2)
    draw = lambda x: torch.stack([torch.randn(shape, generator=g) for g in generators])
    null = torch.full((3,), model.config.num_classes)

    def model_fn(x, t):
        cond, uncond = model(x, t, torch.tensor(y)), model(x, t, null)
        pred, guided = uncond[:, :3] + cfg * (cond[:, :3] - uncond[:, :3]), cond.clone()
        guided[:, :3] = pred
        return guided

    diffusion = GaussianDiffusion(str(steps), model.config.prediction)
    loop = diffusion.p_sample_loop if sampler == "ddpm" else diffusion.ddim_sample_loop
    want = loop(model_fn, draw(None), clip_denoised=True, noise_fn=draw if sampler == "ddpm" else torch.zeros_like)
    got = sample.sample_latents(model, list(enumerate(y)), 5, cfg, steps, sampler)
    assert (got - want).abs().max() < 1e-4


def test_guidance_of_one_is_none(ckpt):
    model = load_model(ckpt)
    near = images(model, [0, 1], cfg=1.0001).astype(int)
    assert np.abs(images(model, [0, 1], cfg=1.0) - near).max() <= 1
    assert np.abs(images(model, [0, 1], cfg=4.0) - near).max() > 5


def test_npz_is_what_adm_reads(ckpt, tmp_path, monkeypatch, capsys):
    sample.main(["--ckpt", str(ckpt), "--npz", "8", "--steps", "2", "--batch", "3", "--out", str(tmp_path / "x.npz")])
    data = np.load(tmp_path / "x.npz")
    assert data["arr_0"].shape == (8, 8, 8, 3) and data["arr_0"].dtype == np.uint8
    assert data["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with zipfile.ZipFile(tmp_path / "x.npz") as z:
        assert z.namelist() == ["arr_0.npy", "arr_1.npy"]


def test_classes_by_name_and_index():
    config = Config(**SMALL, class_names=["cat", "dog", "0"])
    assert sample.pick_classes(["dog", "1", "2", "0"], config) == [1, 1, 2, 2]  # a name comes before an index
    assert sample.pick_classes(None, config) == [0, 1, 2]
    released = load_model(FOLDERS["terdit"], n_heads=4).config
    assert sample.pick_classes(["7"], released) == [7]
    imagenet = Config(class_names=sorted(str(i) for i in range(1000)))
    assert sample.pick_classes(["207", "2"], imagenet) == [121, 112]
    assert len(sample.pick_classes(None, imagenet)) == 8


def test_npz_covers_every_class(tmp_path):
    save_checkpoint(tmp_path / "m.pt", DiT(Config(**SMALL | {"num_classes": 12})))
    sample.main(["--ckpt", str(tmp_path / "m.pt"), "--npz", "13", "--steps", "1", "--out", str(tmp_path / "x.npz")])
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [*range(12), 0]


def usage(*flags):
    return ["--ckpt", "CKPT", *flags]


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (usage("--classes", "3"), 1, "class 3 is out of range: this checkpoint has 3 classes, 0-2"),
        (usage("--classes", "-1"), 1, "class -1 is out of range"),
        (usage("--classes", "bird"), 1, "class 'bird' is unknown: this checkpoint has 3 classes, cat, dog, 0"),
        (usage("--steps", "0"), 2, "argument --steps: got 0, expected a whole number of at least 1"),
        (usage("--steps", "1001"), 2, "got 1001, expected at most 1000"),
        (usage("--n", "-4"), 2, "argument --n: got -4"),
        (usage("--batch", "0"), 2, "argument --batch: got 0"),
        (usage("--npz", "4", "--n", "4"), 2, "leave out --n"),
        (usage("--out", "/nowhere/x.png"), 2, "/nowhere is not a folder that can be written to"),
        (usage("--seed", "-1"), 2, "--seed"),
        (usage("--vae", "x"), 1, "draws pixels, there are no latents to decode"),
        (usage("--out", "."), 2, "is a folder, expected a file"),
        (["--ckpt", "missing.pt"], 1, "missing.pt: no such file"),
        (["--ckpt", str(FOLDERS["terdit"])], 1, "n_heads"),
        ([], 2, "--ckpt"),
    ],
)
def test_sample_refuses(ckpt, tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    flags = [str(ckpt) if f == "CKPT" else f for f in flags]
    if "n_heads" in message:
        flags += ["--n-heads", "7"]
    with pytest.raises(SystemExit) as e:
        sample.run(lambda: sample.main(flags))
    shown = capsys.readouterr().err + str(e.value.code if isinstance(e.value.code, str) else "")
    assert (1 if isinstance(e.value.code, str) else e.value.code) == code and message in shown, shown
    assert os.listdir(tmp_path) == []


def test_one_line_errors_from_the_shell(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    done = call("sample.py", "--ckpt", tmp_path / "bad.pt", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "bad.pt" in done.stderr and not done.stdout
    done = call("train.py", "--image-size", 26, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 1 and "image size 26 is not a multiple of the patch size 4" in done.stderr
    done = call("train.py", "--steps", 0, cwd=tmp_path)
    assert done.returncode == 2 and "argument --steps: got 0" in done.stderr
    done = call("train.py", "--out", tmp_path / "bad.pt", cwd=tmp_path)
    assert done.returncode == 1 and "bad.pt" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "run"] or os.listdir(tmp_path) == ["bad.pt"]


def test_latent_checkpoint_names_what_is_missing(tmp_path, capsys):
    try:
        import diffusers  # noqa: F401

        pytest.skip("diffusers is installed")
    except ImportError:
        pass
    with pytest.raises(ValueError, match="pip install diffusers"):
        sample.main(["--ckpt", str(FOLDERS["terdit"]), "--n-heads", "4", "--out", str(tmp_path / "x.png")])
    assert "orders as strings" in capsys.readouterr().out and os.listdir(tmp_path) == []
