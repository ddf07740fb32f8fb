"""Latents: a VAE encodes the images once, into a cache. Training reads it, and sampling decodes."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from terdit import load_model, save_checkpoint
from tests.helpers import run, short_training, shorten  # noqa: F401

diffusers = pytest.importorskip("diffusers", reason="it is missing: pip install diffusers")
SCALE = 0.5  # not the SD VAE's, so that a scale written in the code would be noticed


def make_vae(folder, channels=4, widths=(8, 8, 8)):
    """A small VAE in diffusers' format. Each width after the first halves the size."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * len(widths))
    blocks |= dict(up_block_types=["UpDecoderBlock2D"] * len(widths), block_out_channels=widths)
    shape = dict(latent_channels=channels, norm_num_groups=4, scaling_factor=SCALE)
    diffusers.AutoencoderKL(**shape, **blocks).save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `vae`, `photos` (17 of two classes, and one that is none) and `run`, a step on
    their latents."""
    home = tmp_path_factory.mktemp("home")
    make_vae(home / "vae")
    for name in "ab":
        (home / "photos" / name).mkdir(parents=True)
    for i in range(17):
        photo = Image.effect_noise((40, 32), 50 + i)
        photo.save(home / "photos" / "ab"[i % 2] / f"{i:02d}.png")
    (home / "photos/a/broken.jpg").write_bytes(b"no")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        run(home / "run", *flags(home), "--steps", 1, image_size=32)
    return home


def flags(home, vae="vae"):
    return ["--data", home / "photos", "--vae", home / vae]


def test_the_cache_holds_scaled_means_plain_and_mirrored(home):
    header = json.loads((home / "run/latents-32/header.json").read_text())
    x = np.load(home / "run/latents-32/x.npy")
    assert (x.shape, x.dtype) == ((18, 2, 4, 8, 8), np.float16)
    vae = diffusers.AutoencoderKL.from_pretrained(home / "vae")
    for row in (0, 15):
        path = home / "photos" / header["files"][row][0]
        image = torch.tensor(train.load_image(path, 32)) / 127.5 - 1
        with torch.no_grad():
            means = vae.encode(torch.stack([image, image.flip(-1)])).latent_dist.mean
        assert np.abs(x[row] - SCALE * means.numpy()).max() < 2e-3
    config = load_model(home / "run/packed.pt").config
    assert (config.vae, config.latent_scale) == (str(home / "vae"), SCALE)
    assert (config.in_channels, config.input_size, config.class_names) == (4, 8, ["a", "b"])


def test_images_are_decoded_one_at_a_time_with_the_files_scale(home, tmp_path, monkeypatch):
    decode = diffusers.AutoencoderKL.decode
    sizes = []

    def watched_decode(self, z):
        sizes.append(len(z))
        return decode(self, z)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", watched_decode)
    out = str(tmp_path / "x.npz")
    flags = "--npz 3 --steps 2 --dtype fp32 --out".split()
    sample.main(["--ckpt", str(home / "run"), *flags, out])
    assert sizes == [1] * 3
    model = load_model(home / "run/packed.pt")
    x = sample.sample_latents(model, [0, 1, 0], range(3), steps=2, sampler="ddpm")
    with torch.no_grad():
        want = decode(diffusers.AutoencoderKL.from_pretrained(home / "vae"), x / SCALE).sample
    want = sample.to_uint8(want.clamp(-1, 1)).permute(0, 2, 3, 1).int().numpy()
    assert np.abs(np.load(out)["arr_0"] - want).max() <= 1


def test_a_finished_cache_needs_neither_vae_nor_images(home, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers, "AutoencoderKL", None)
    monkeypatch.setattr(train, "load_image", None)
    run(home / "run", *flags(home), "--steps", 2, image_size=32)
    run(tmp_path / "run", "--data", home / "run/latents-32", "--steps", 1, image_size=None)
    first, second = [load_model(folder / "run/packed.pt").config for folder in (home, tmp_path)]
    assert first == second


def test_a_vae_that_has_moved_is_named_with_the_flag_that_finds_it(home, tmp_path):
    model = load_model(home / "run/packed.pt")
    model.config.vae = str(tmp_path / "gone")
    save_checkpoint(tmp_path / "full.pt", model)
    draw = ["--ckpt", tmp_path, "--n", 2, "--steps", 1, "--out", tmp_path / "grid.png"]
    draw = [str(word) for word in draw]
    message = f"VAE {tmp_path}/gone cannot be loaded .* name it with --vae"
    with pytest.raises(ValueError, match=message):
        sample.main(draw)
    sample.main([*draw, "--vae", str(home / "vae")])
    assert Image.open(tmp_path / "grid.png").size == (2 * 96, 96)


def test_a_vae_of_another_shape_makes_the_models_shape(home, tmp_path):
    make_vae(tmp_path / "vae", channels=16, widths=(8, 8))
    wide = ["--data", home / "photos", "--vae", tmp_path / "vae", "--steps", 1]
    run(tmp_path / "run", *wide, image_size=16)
    config = load_model(tmp_path / "run/packed.pt").config
    assert (config.in_channels, config.input_size) == (16, 8)
    message = f"made with vae='{tmp_path}/vae', this command says '{home}/vae'"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", *flags(home), "--fresh", image_size=16)


@pytest.mark.parametrize("wrong, size, message", [
    ("size", 30, "--image-size 30: the VAE gives back 28 pixels"),
    ("VQModel", 32, "vae cannot be loaded .*VQModel, expected an AutoencoderKL"),
    ("missing weights", 32, "vae is not whole: it lacks decoder.conv_in.weight"),
    ("no diffusers", 32, "the latents of the VAE .* need: pip install diffusers"),
])
def test_a_vae_that_does_not_fit_is_refused(home, tmp_path, monkeypatch, wrong, size, message):
    """...before images are read."""
    vae = shutil.copytree(home / "vae", tmp_path / "vae")
    if wrong == "no diffusers":
        monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    elif wrong == "missing weights":
        safetensors = pytest.importorskip("safetensors.torch")
        path = vae / "diffusion_pytorch_model.safetensors"
        state = safetensors.load_file(path)
        del state["decoder.conv_in.weight"]
        safetensors.save_file(state, path)
    elif wrong != "size":
        (vae / "config.json").write_text(json.dumps(dict(_class_name=wrong)))
    wrong_flags = ["--data", home / "photos", "--vae", vae, "--steps", 1]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", *wrong_flags, image_size=size)
    assert not (tmp_path / f"run/latents-{size}").exists()
