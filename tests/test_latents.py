"""Latents: a VAE encodes the images once, into a memory-mapped cache. Training reads that, and sampling decodes."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from terdit import load_model
from tests.helpers import run, save_image, short_training  # noqa: F401

SCALE = 0.5  # not the SD VAE's, so that a scale written in the code would be noticed


@pytest.fixture
def photos(tmp_path):
    """20 photos of two classes, and a file that is none."""
    folder = tmp_path / "photos"
    for i in range(20):
        save_image(folder / "ab"[i % 2] / f"{i:02d}.png", size=(40, 32), colour=(12 * i, 255 - 12 * i, 100))
    (folder / "a/broken.jpg").write_bytes(b"no")
    return folder


@pytest.fixture
def vae(tmp_path):
    """A small VAE with random weights, in diffusers' format: 8x smaller, 4 channels."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=SCALE,
    )
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def trained(photos, vae, tmp_path):
    """A run folder after one step on latents, and the flags that go on with it."""
    flags = ["--data", photos, "--vae", vae]
    run(tmp_path / "run", *flags, "--steps", 1, image_size=64)
    return tmp_path / "run", flags


# With a real VAE ------------------------------------------------------------------------------------------------------


def test_config_says_how_to_decode(capsys, trained, vae):
    out, _ = trained
    shown = capsys.readouterr()  # of the training, because capsys comes first
    assert "broken.jpg: left out" in shown.err
    assert "20 images of 2 classes" in shown.out
    config = load_model(out / "packed.pt").config
    assert (config.vae, config.latent_scale) == (str(vae), SCALE)
    assert (config.in_channels, config.input_size) == (4, 8)


def test_cache_holds_the_scaled_means_plain_and_mirrored(trained, photos, vae):
    from diffusers import AutoencoderKL

    out, _ = trained
    cache = train.open_cache(out / "latents-64")
    images = np.stack([train.load_image(photos / name, 64) for name, _ in cache.header["files"][:2]])
    x = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        means = AutoencoderKL.from_pretrained(vae).encode(torch.cat([x, x.flip(-1)])).latent_dist.mean
    latents, labels = cache[torch.tensor([0, 1, 0, 1]), torch.tensor([False, False, True, True])]
    assert torch.allclose(latents, means * SCALE, atol=2e-3)
    assert labels.tolist() == [0, 0, 0, 0]


def test_later_runs_need_neither_vae_nor_images(trained, photos, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    out, flags = trained
    cache = out / "latents-64"
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", None)
    photos.rename(tmp_path / "gone")
    # The same command goes on.
    assert run(out, *flags, "--steps", 3, image_size=64)["step"] == 3
    # The cache alone says how to decode.
    run(tmp_path / "other", "--data", cache, "--steps", 3, image_size=None)
    assert load_model(tmp_path / "other/packed.pt").config == load_model(out / "packed.pt").config
    # Fine-tuning needs the cache: the model works on latents.
    init = ["--init", out / "packed.pt", "--steps", 1]
    run(tmp_path / "tuned", "--data", cache, *init, image_size=None)
    with pytest.raises(ValueError, match="works on 4 channels, latents of .*: add --vae"):
        run(tmp_path / "no", *init, image_size=None)


def test_sampling_decodes(trained, tmp_path):
    out, _ = trained
    grid = tmp_path / "grid.png"
    sample.main(["--ckpt", str(out / "packed.pt"), "--n", "2", "--steps", "2", "--out", str(grid)])
    assert Image.open(grid).size == (128, 64)


def test_another_vae_is_refused(trained):
    out, flags = trained
    with pytest.raises(ValueError, match="made with vae='.*vae', this command says 'another'"):
        run(out, *flags, "--vae", "another", "--steps", 2, image_size=64)


def test_another_image_size_is_refused(trained):
    out, flags = trained
    with pytest.raises(ValueError, match="made with image_size=64, this command says 32"):
        run(out, *flags, "--data", out / "latents-64", "--steps", 2, image_size=32)


def test_a_cache_of_another_format_is_refused(trained):
    out, flags = trained
    header = out / "latents-64/header.json"
    header.write_text(header.read_text().replace(train.CACHE, "foreign"))
    with pytest.raises(ValueError, match="format='foreign'"):
        run(out, *flags, "--steps", 2, image_size=64)


def test_a_cache_that_was_cut_short_is_refused(trained):
    out, flags = trained
    latents = out / "latents-64/x.npy"
    latents.write_bytes(latents.read_bytes()[:-100])
    with pytest.raises(ValueError, match="latents-64: cut short or damaged"):
        run(out, *flags, "--steps", 2, image_size=64)


def test_an_unfinished_cache_is_refused(trained):
    out, flags = trained
    path = out / "latents-64/labels.npy"
    labels = np.load(path)
    labels[3:] = train.UNREAD
    np.save(path, labels)
    with pytest.raises(ValueError, match="18 of 21 images are not in it yet"):
        run(out, "--data", out / "latents-64", "--steps", 2, image_size=None)


# With a stand-in for the VAE ------------------------------------------------------------------------------------------


class FakeEncoder:
    """Keeps every eighth pixel. Once, after the 21st image, it raises OSError, as a disk might."""

    scale = 0.25

    def __init__(self):
        self.images_seen = 0
        self.has_failed = False

    def __call__(self, images):
        if images.any():  # a blank image only asks for the latents' shape
            self.images_seen += len(images)
        if self.images_seen == 21 and not self.has_failed:
            self.has_failed = True
            raise OSError("stopped")
        small = images[:, None, :, ::8, ::8].astype(np.float16) / 255
        return np.concatenate([small, small[..., ::-1]], axis=1)


def test_encoding_that_was_stopped_goes_on(photos, tmp_path, monkeypatch):
    """The next run encodes what is missing, and only that."""
    encoder = FakeEncoder()
    monkeypatch.setattr(train, "load_encoder", lambda name, device: (encoder, encoder.scale))
    flags = ["--data", photos, "--vae", "x", "--steps", 1]
    with pytest.raises(OSError, match="stopped"):
        run(tmp_path / "run", *flags, image_size=64)
    labels = np.load(tmp_path / "run/latents-64/labels.npy")
    assert (labels == train.UNREAD).sum() == 5
    assert set(labels.tolist()) == {train.UNREAD, train.BROKEN, 0, 1}

    run(tmp_path / "run", *flags, image_size=64)
    assert encoder.images_seen == 21 + 5

    run(tmp_path / "whole", *flags, image_size=64)
    stopped = np.load(tmp_path / "run/latents-64/x.npy")
    whole = np.load(tmp_path / "whole/latents-64/x.npy")
    assert np.array_equal(stopped, whole)
    assert load_model(tmp_path / "run/packed.pt").config.latent_scale == encoder.scale


def test_the_package_that_is_missing_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    with pytest.raises(ValueError, match="the latents of the VAE x need: pip install diffusers"):
        run(tmp_path / "run", "--data", photos, "--vae", "x", "--steps", 1, image_size=64)
