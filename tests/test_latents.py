"""Latents: a VAE encodes the images once, into a memory-mapped cache. Training reads that, and sampling decodes."""

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
from sample import MISSING
from terdit import load_model, save_checkpoint
from tests.helpers import run, short_training, shorten  # noqa: F401

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
SCALE = 0.5  # not the SD VAE's, so that a scale written in the code would be noticed


def make_vae(folder, channels=4, widths=(8, 8, 8)):
    """A small VAE with random weights, in diffusers' format. Each width after the first halves the size."""
    torch.manual_seed(0)
    down = ["DownEncoderBlock2D"] * len(widths)
    up = ["UpDecoderBlock2D"] * len(widths)
    model = diffusers.AutoencoderKL(latent_channels=channels, block_out_channels=widths, norm_num_groups=4,
                                    down_block_types=down, up_block_types=up, scaling_factor=SCALE)  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `vae`, `photos` (17 of two classes, and a file that is none) and `run`, a step on their latents."""
    home = tmp_path_factory.mktemp("home")
    make_vae(home / "vae")
    for name in "ab":
        (home / "photos" / name).mkdir(parents=True)
    for i in range(17):
        Image.effect_noise((40, 32), 50 + i).save(home / "photos" / "ab"[i % 2] / f"{i:02d}.png")
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
        image = torch.tensor(train.load_image(home / "photos" / header["files"][row][0], 32)) / 127.5 - 1
        with torch.no_grad():
            means = vae.encode(torch.stack([image, image.flip(-1)])).latent_dist.mean
        assert np.abs(x[row] - SCALE * means.numpy()).max() < 2e-3
    config = load_model(home / "run/packed.pt").config
    assert (config.vae, config.latent_scale) == (str(home / "vae"), SCALE)
    assert (config.in_channels, config.input_size, config.class_names) == (4, 8, ["a", "b"])


def test_images_are_decoded_one_at_a_time_with_the_scale_of_the_checkpoint(home, tmp_path, monkeypatch):
    decode = diffusers.AutoencoderKL.decode
    sizes = []

    def watched_decode(self, z):
        sizes.append(len(z))
        return decode(self, z)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", watched_decode)
    out = str(tmp_path / "x.npz")
    sample.main(["--ckpt", str(home / "run"), "--npz", "3", "--steps", "2", "--dtype", "fp32", "--out", out])
    assert sizes == [1] * 4  # the first one, a blank, asks for the size of the images
    x = sample.sample_latents(load_model(home / "run/packed.pt"), [0, 1, 0], range(3), steps=2, sampler="ddpm")
    with torch.no_grad():
        want = decode(diffusers.AutoencoderKL.from_pretrained(home / "vae"), x / SCALE).sample
    assert np.abs(np.load(out)["arr_0"].astype(int) - sample.to_uint8(want.clamp(-1, 1))).max() <= 1


def test_a_finished_cache_needs_neither_vae_nor_images(home, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers, "AutoencoderKL", None)
    monkeypatch.setattr(train, "load_image", None)
    run(home / "run", *flags(home), "--steps", 2, image_size=32)
    run(tmp_path / "run", "--data", home / "run/latents-32", "--steps", 1, image_size=None)
    assert load_model(tmp_path / "run/packed.pt").config == load_model(home / "run/packed.pt").config
    with pytest.raises(ValueError, match="works on latents of .*/vae: add --data and --vae"):
        run(tmp_path / "no", "--init", home / "run", "--steps", 1, image_size=None)


def test_a_vae_that_has_moved_is_named_with_the_flag_that_finds_it(home, tmp_path):
    model = load_model(home / "run/packed.pt")
    model.config.vae = str(tmp_path / "gone")
    save_checkpoint(tmp_path / "full.pt", model)
    draw = ["--ckpt", str(tmp_path), "--n", "2", "--steps", "1", "--out", str(tmp_path / "grid.png")]
    with pytest.raises(ValueError, match=f"VAE {tmp_path}/gone cannot be loaded .* name it with --vae; latents"):
        sample.main(draw)
    sample.main([*draw, "--vae", str(home / "vae")])
    assert Image.open(tmp_path / "grid.png").size == (2 * 96, 96)


def test_a_vae_of_another_shape_makes_the_models_shape(home, tmp_path):
    make_vae(tmp_path / "vae", channels=16, widths=(8, 8))
    wide = ["--data", home / "photos", "--vae", tmp_path / "vae", "--steps", 1]
    run(tmp_path / "run", *wide, image_size=16)
    config = load_model(tmp_path / "run/packed.pt").config
    assert (config.in_channels, config.input_size) == (16, 8)
    with pytest.raises(ValueError, match="--init .*/run has in_channels=4, the student 16"):
        run(tmp_path / "tuned", *wide, "--init", home / "run", image_size=16)
    with pytest.raises(ValueError, match="--teacher .*/run has in_channels=4, the student 16"):
        run(tmp_path / "taught", *wide, "--teacher", home / "run", image_size=16)
    with pytest.raises(ValueError, match=f"made with vae='{tmp_path}/vae', this command says '{home}/vae'"):
        run(tmp_path / "run", *flags(home), image_size=16)


@pytest.mark.parametrize(
    "wrong, size, message",
    [
        ("size", 30, "--image-size 30: the VAE .* gives back 28 pixels"),
        ("size", 8, "2 is not a multiple of the patch size 4"),
        ("VQModel", 32, "vae cannot be loaded .*VQModel, expected an AutoencoderKL"),
        ("AutoencoderTiny", 32, "vae cannot be loaded .*AutoencoderTiny, expected an AutoencoderKL"),
        ("missing weights", 32, "vae is not whole: it lacks decoder.conv_in.weight"),
        ("no diffusers", 32, "the latents of the VAE .* need: pip install diffusers"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused_before_images_are_read(home, tmp_path, monkeypatch, wrong, size, message):
    vae = shutil.copytree(home / "vae", tmp_path / "vae")
    if wrong == "no diffusers":
        monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    elif wrong == "missing weights":
        safetensors = pytest.importorskip("safetensors.torch")
        state = safetensors.load_file(vae / "diffusion_pytorch_model.safetensors")
        del state["decoder.conv_in.weight"]
        safetensors.save_file(state, vae / "diffusion_pytorch_model.safetensors")
    elif wrong != "size":
        (vae / "config.json").write_text(json.dumps(dict(_class_name=wrong)))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "--data", home / "photos", "--vae", vae, "--steps", 1, image_size=size)
    assert not (tmp_path / f"run/latents-{size}").exists()


def test_latents_that_are_not_finite_are_never_there(home, tmp_path, monkeypatch):
    encode = diffusers.AutoencoderKL.encode

    def failing_encode(self, x):
        out = encode(self, x)
        if len(x) == 4:  # the last two images, plain and mirrored
            out.latent_dist.mean[3] = torch.nan
        return out

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", failing_encode)
    with pytest.raises(ValueError, match="the VAE .*/vae puts out values that are not finite for b/15.png"):
        run(tmp_path / "run", *flags(home), "--steps", 1, image_size=32)
    assert np.load(tmp_path / "run/latents-32/status.npy")[16:].tolist() == [MISSING] * 2
