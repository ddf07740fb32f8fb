"""Latents: encoded once into a memory-mapped cache, trained on and sampled without touching the VAE again until decoding."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from terdit import load_model
from tests.test_train import FAST, few_digits, load, save_image  # noqa: F401

SCALE = 0.5  # not the SD VAE's, so that a scale written in the code would be noticed


@pytest.fixture
def photos(tmp_path):
    for i in range(20):
        save_image(tmp_path / f"photos/{'ab'[i % 2]}/{i:02d}.png", size=(40, 32), colour=(12 * i, 255 - 12 * i, 100))
    (tmp_path / "photos/a/broken.jpg").write_bytes(b"no")
    return tmp_path / "photos"


@pytest.fixture
def vae(tmp_path):
    """A small VAE with random weights, in diffusers' format: 8x smaller, 4 channels."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, layers_per_block=1, scaling_factor=SCALE)  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def run(out, *flags):
    train.main([*FAST[:-2], "--out", str(out), *map(str, flags)])


def test_train_and_sample(photos, vae, tmp_path, monkeypatch, capsys):
    flags = ["--image-size", 64, "--data", photos, "--vae", vae]
    run(tmp_path / "run", *flags, "--steps", 2)
    shown = capsys.readouterr()
    assert "broken.jpg: left out" in shown.err and "20 images of 2 classes" in shown.out
    config = load_model(tmp_path / "run/packed.pt").config
    assert (config.vae, config.latent_scale, config.in_channels, config.input_size) == (str(vae), SCALE, 4, 8)

    # What is in the cache: the VAE's mean, scaled, as it is and mirrored.
    cache = train.open_cache(tmp_path / "run/latents-64")
    from diffusers import AutoencoderKL

    images = np.stack([train.load_image(photos / name, 64) for name, _ in cache.header["files"][:2]])
    x = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        want = AutoencoderKL.from_pretrained(vae).encode(torch.cat([x, x.flip(-1)])).latent_dist.mean * SCALE
    got = cache[torch.tensor([0, 1, 0, 1]), torch.tensor([False, False, True, True])]
    assert torch.allclose(got[0], want, atol=2e-3) and got[1].tolist() == [0, 0, 0, 0]

    # Later runs never touch the VAE, nor the images: here, or from the cache alone.
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", None)
    photos.rename(tmp_path / "gone")
    run(tmp_path / "run", *flags, "--steps", 3)
    run(tmp_path / "other", "--data", tmp_path / "run/latents-64", "--steps", 3)
    assert load(tmp_path / "run")["step"] == 3 and load_model(tmp_path / "other/packed.pt").config == config
    run(tmp_path / "tuned", "--data", tmp_path / "run/latents-64", "--init", tmp_path / "run/packed.pt", "--steps", 1)
    with pytest.raises(ValueError, match="works on 4 channels, latents of .*: add --vae"):
        run(tmp_path / "no", "--init", tmp_path / "run/packed.pt", "--steps", 1)
    monkeypatch.undo()
    out = tmp_path / "grid.png"
    sample.main(["--ckpt", str(tmp_path / "run/packed.pt"), "--n", "2", "--steps", "2", "--out", str(out)])
    assert Image.open(out).size == (128, 64)


def test_refused(photos, vae, tmp_path):
    flags = ["--image-size", 64, "--data", photos, "--vae", vae]
    run(tmp_path / "run", *flags, "--steps", 1)
    cache = tmp_path / "run/latents-64"
    for extra, message in (
        (["--vae", "another"], "made with vae='.*vae', this command says 'another'"),
        (["--data", cache, "--image-size", 32], "made with image_size=64, this command says 32"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", *flags, *extra, "--steps", 2)
    header = (cache / "header.json").read_text()
    (cache / "header.json").write_text(header.replace(train.CACHE, "foreign"))
    with pytest.raises(ValueError, match="format='foreign'"):
        run(tmp_path / "run", *flags, "--steps", 2)
    (cache / "header.json").write_text(header)
    whole = (cache / "x.npy").read_bytes()
    (cache / "x.npy").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="latents-64: cut short or damaged"):
        run(tmp_path / "run", *flags, "--steps", 2)
    (cache / "x.npy").write_bytes(whole)
    labels = np.load(cache / "labels.npy")
    labels[3:] = train.UNREAD
    np.save(cache / "labels.npy", labels)
    with pytest.raises(ValueError, match="18 of 21 images are not in it yet"):
        run(tmp_path / "run", "--data", cache, "--steps", 2)


def test_stopped_encoding_goes_on(photos, tmp_path, monkeypatch):
    """With a stand-in for the VAE: a run that is stopped while it encodes leaves the rest, and only that, to the next."""
    seen = []

    def encoder(name, device):
        def encode(images):
            seen.extend([] if not images.any() else images)  # a blank image asks for the latents' shape
            if len(seen) == 21 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise OSError("stopped")
            small = images[:, None, :, ::8, ::8].astype(np.float16) / 255
            return np.concatenate([small, small[..., ::-1]], 1)

        return encode, 0.25

    monkeypatch.setattr(train, "load_encoder", encoder)
    flags = ["--image-size", 64, "--data", photos, "--vae", "x", "--steps", 1]
    with pytest.raises(OSError, match="stopped"):
        run(tmp_path / "run", *flags)
    labels = np.load(tmp_path / "run/latents-64/labels.npy")
    assert (labels == train.UNREAD).sum() == 5 and sorted(set(labels.tolist())) == [-2, -1, 0, 1]
    run(tmp_path / "run", *flags)
    assert len(seen) == 21 + 5
    run(tmp_path / "whole", *flags)
    a, b = (np.load(tmp_path / f"{d}/latents-64/x.npy") for d in ("run", "whole"))
    assert np.array_equal(a, b) and load_model(tmp_path / "run/packed.pt").config.latent_scale == 0.25


def test_without_diffusers(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    with pytest.raises(ValueError, match="the latents of the VAE x need: pip install diffusers"):
        run(tmp_path / "run", "--image-size", 64, "--data", photos, "--vae", "x", "--steps", 1)
