"""Other people's pictures: each mode has one right result, and no file is lost or mixed up in
silence."""

import errno
import json
import os
import shutil
import struct
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import train
from terdit import load_model
from tests.helpers import run, save_image, short_training  # noqa: F401
from train import MISSING, THERE

RED = (255, 0, 0)
PINK = (255, 127, 127)  # half red on white
CAFE = unicodedata.normalize("NFD", "café")  # as macOS writes it: the accent is a letter


def make_photos(folder, n, classes="a"):
    for i in range(n):
        path = folder / classes[i % len(classes)] / f"{i:03d}.png"
        save_image(path, size=(8, 8), colour=(i, 255 - i, 0))
    return folder


def read_cache(cache):
    """The cache of a run -> {path within its folder: (H, W, 3) uint8}, of the usable pictures."""
    header = json.loads((cache / "header.json").read_text())
    rows = zip(header["files"], np.load(cache / "x.npy"), np.load(cache / "status.npy"))
    return {path: x[0].transpose(1, 2, 0) for (path, _), x, status in rows if status == THERE}


# Modes and formats --------------------------------------------------------------------------------


def halves(mode, left, right):
    """4 x 4 pixels: the left half in one colour, the right half in another."""
    image = Image.new(mode, (4, 4), left)
    image.paste(right, (2, 0, 4, 4))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 255, 0])
    return image


def deep(left, right, dtype="<u2"):
    return Image.fromarray(np.array([[left, left, right, right]] * 4, dtype))


def write_12_bits(path):
    """A black TIFF of 4 x 4 pixels with 12 bits each, which Pillow reads but does not write."""
    # size, bits, no compression, 0 is black, place of the pixels, rows, bytes
    tags = {256: 4, 257: 4, 258: 12, 259: 1, 262: 1, 273: 8, 278: 4, 279: 24}
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    start = b"II*\0" + struct.pack("<I", 32) + bytes(24)
    path.write_bytes(start + struct.pack("<H", len(tags)) + directory + bytes(4))


HEAD_DOWN = Image.Exif()
HEAD_DOWN[0x0112] = 3  # its orientation
CLEAR = halves("RGBA", (255, 0, 0, 128), (0, 0, 0, 0))
LOSSLESS = dict(lossless=True, exact=True)
PICTURES = {  # name: picture, options of saving, the colours of both halves (a number is a grey)
    "alpha.webp": (CLEAR, LOSSLESS, PINK, 255),
    "grey_alpha.png": (halves("LA", (100, 255), (0, 0)), {}, 100, 255),
    "palette.png": (halves("P", 0, 1), dict(transparency=bytes([128, 0])), PINK, 255),
    "clear.png": (halves("RGB", RED, (0, 255, 0)), dict(transparency=(0, 255, 0)), RED, 255),
    "deep.png": (deep(257 * 100, 65535), {}, 100, 255),
    "dark.png": (deep(256, 514), {}, 0, 2),  # not stretched to black and white
    "deep.pgm": (deep(257 * 100, 65535), {}, 100, 255),
    "mac.tif": (deep(257 * 100, 65535, ">u2"), {}, 100, 255),  # the other order of bytes
    "one_bit.png": (halves("1", 0, 1), {}, 0, 255),
    "cmyk.jpg": (halves("CMYK", (0, 0, 0, 0), (0, 0, 0, 0)), {}, 255, 255),
    "turned.png": (halves("L", 0, 255), dict(exif=HEAD_DOWN), 255, 0),
    "broken_exif.png": (halves("L", 7, 9), dict(exif=b"garbage!"), 7, 9),
}


def test_every_kind_of_picture_has_its_colours_or_is_left_out_by_name(tmp_path, capfd):
    folder = tmp_path / "data/a"
    folder.mkdir(parents=True)
    want = {}
    for name, (image, options, *colours) in PICTURES.items():
        image.save(folder / name, **options)
        left, right = [tuple(np.broadcast_to(colour, 3).tolist()) for colour in colours]
        want[f"a/{name}"] = [left, left, right, right]
    Image.fromarray(np.int32([[0, 70000]])).save(folder / "int.tif")
    Image.fromarray(np.float32([[0, 1]])).save(folder / "float.tif")
    deep(0, 65535).save(folder / "zero_is_white.tif", tiffinfo={262: 0})
    deep(0, 65535).save(folder / "deep_clear.png", transparency=65535)
    write_12_bits(folder / "12_bits.tif")
    for name in ("cut.jpg", "cut.png"):
        Image.effect_noise((64, 64), 100).save(folder / name)
        os.truncate(folder / name, 1500)
    text = os.fsdecode(b"text\xff.png")  # no picture, nor is its name UTF-8
    (folder / text).write_text("no picture")

    run(tmp_path / "run", "--data", tmp_path / "data", "--steps", 1, image_size=4)

    images = read_cache(tmp_path / "run/images-4")
    assert {path: [tuple(pixel) for pixel in x[3].tolist()] for path, x in images.items()} == want
    shown = capfd.readouterr()
    for name in ("int.tif", "float.tif", "zero_is_white.tif", "deep_clear.png", "12_bits.tif"):
        assert f"{name}: left out (ValueError: grey of mode" in shown.err
    assert "cut.jpg: left out" in shown.err and "cut.png: left out" in shown.err
    assert f"{len(want)} images of 1 classes, {{'a': {len(want)}}}, 8 left out" in shown.out


@pytest.mark.parametrize("ending, scale", [("png", 1), ("png", 5), ("jpg", 5)])
def test_a_picture_is_resized_and_its_centre_is_taken(tmp_path, ending, scale):
    """As ADM does: the shorter side becomes the size. Here all is resized, then cropped."""
    x, y = np.meshgrid(np.linspace(0, 255, 90 * scale), np.linspace(0, 255, 60 * scale))
    photo = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    photo.save(tmp_path / f"x.{ending}", quality=100)
    small = photo.resize((60, 40), Image.Resampling.BICUBIC)
    want = np.asarray(small.crop((10, 0, 50, 40)), int)
    got = train.load_image(tmp_path / f"x.{ending}", 40).transpose(1, 2, 0)
    assert np.abs(got - want).max() <= 3  # neighbours differ by 4 or 5


# Folders ------------------------------------------------------------------------------------------


def test_what_is_a_class_and_what_is_a_picture(tmp_path, capsys):
    folder = tmp_path / "data"
    used = [f"{CAFE}/y.png", "linked/x.png", "two words 🐈/in/a folder/z.png", "zoo/x.png"]
    used.append("zoo/" + os.fsdecode(b"\xff.png"))  # an old archive's name, which is no UTF-8
    hidden = [".hidden/x.png", "__MACOSX/zoo/x.png", "zoo/.ipynb_checkpoints/x.png"]
    hidden += ["zoo/@eaDir/x.png", "zoo/._x.png", "run/grids/x.png", "loose.png"]
    save_image(tmp_path / "elsewhere/x.png")
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in [*used, *hidden]:
        save_image(folder / name)
    (folder / "zoo/notes.txt").touch()
    os.mkfifo(folder / "zoo/pipe.png")  # to open it would wait for ever
    (folder / "zoo/link.png").symlink_to("gone.png")

    run(folder / "run", "--data", folder, "--steps", 1)  # the run's own grids are no class

    names = sorted([CAFE, "linked", "two words 🐈", "zoo"])
    assert load_model(folder / "run/packed.pt").config.class_names == names
    assert set(read_cache(folder / "run/images-8")) == set(used)
    files = json.loads((folder / "run/images-8/header.json").read_text())["files"]
    assert all(names[label] == path.split("/")[0] for path, label in files)
    shown = capsys.readouterr().out
    assert "3 files are not used" in shown and "1 links lead to nothing" in shown
    assert "5 images of 4 classes" in shown and "0 left out" in shown


@pytest.mark.parametrize("links", [
    {"cat/self": ".", "again": "."},
    {"dog/far_up": "../.."},
    {"cat/one": "..", "dog/two": ".."},
    {"dog/friends": "../cat", "zebra": "cat"},
])
def test_each_real_folder_counts_once_with_its_own_label(tmp_path, links):
    folder = tmp_path / "data"
    for name in ("cat/1.png", "dog/2.png", "dog/puppies/3.png"):
        save_image(folder / name)
    for path, target in links.items():
        (folder / path).symlink_to(target)
    run(tmp_path / "run", "--data", folder, "--steps", 1)
    header = json.loads((tmp_path / "run/images-8/header.json").read_text())
    assert header["class_names"] == ["cat", "dog"]
    assert header["files"] == [["cat/1.png", 0], ["dog/2.png", 1], ["dog/puppies/3.png", 1]]


@pytest.mark.parametrize("files, message", [
    (["train/cat/x.png", "val/cat/x.png"], "one folder deeper: .* such as .*/data/train"),
    (["loose.png", "cat/._x.png"], "expected a subfolder of images a class, found none"),
    (["cat/x.png", "dog/x.png -> gone"], r"all images of \['dog'\] are links to nothing"),
    (["cat/x.png", "dog/x.png -> damaged"], "no image of 'dog' can be read"),
    ([], "data: no such folder"),
])
def test_a_wrong_folder_is_said(tmp_path, files, message):
    for name in files:
        name, _, target = name.partition(" -> ")
        save_image(tmp_path / "data" / name)
        if target:
            (tmp_path / "data" / name).unlink()
            (tmp_path / "data" / name).symlink_to(tmp_path / target)
    (tmp_path / "damaged").touch()
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "--data", tmp_path / "data", "--steps", 1)
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_folder_that_cannot_be_listed_stops(tmp_path, monkeypatch):
    """Otherwise its class would be missing in silence."""
    folder = make_photos(tmp_path / "data", 1)
    scandir = os.scandir

    def closed(path):
        if os.path.basename(path) == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="Permission denied: .*data/a"):
        run(tmp_path / "run", "--data", folder, "--steps", 1)


def set_up(folder, *flags):
    """Everything before the first step of training -> train.Run"""
    out = folder.with_name("run")
    return train.setup(train.parse_args(["--data", str(folder), "--out", str(out), *flags]))


def test_the_last_image_of_a_class_is_never_held_out(tmp_path):
    """Of 203 images two are held out: of the class that has three, not of the 200 that have one."""
    folder = make_photos(tmp_path / "data", 200, classes=[f"{i:03d}" for i in range(200)])
    make_photos(folder, 3, classes=["more"])
    data = set_up(folder, "--image-size", "8").data
    assert data.held_out[1].tolist() == [200, 200]
    assert sorted(data.labels[data.train_index]) == list(range(201))


def test_few_pictures_are_validated_at_many_timesteps(tmp_path, monkeypatch):
    """Of 300 three are held out, each at 22 timesteps."""
    seen = []
    losses = train.batch_losses

    def watched_losses(run, model, batch):
        if model is run.ema:
            seen.extend((x.tobytes(), t) for x, t in zip(batch.x0.numpy(), batch.t.tolist()))
        return losses(run, model, batch)

    monkeypatch.setattr(train, "batch_losses", watched_losses)
    run(tmp_path / "run", "--data", make_photos(tmp_path / "data", 300), "--steps", 1)
    assert [t for _, t in seen] == [int(1000 / 66 * (i + 0.5)) for i in range(66)]
    pictures = [x for x, _ in seen]
    assert [pictures.count(x) for x in {*pictures}] == [22] * 3


@pytest.mark.parametrize("flag, left", [("--no-flip", {-1.0}), ("--flip", {-1.0, 1.0})])
def test_half_of_the_images_are_mirrored(tmp_path, flag, left):
    (tmp_path / "data/a").mkdir(parents=True)
    halves("L", 0, 255).save(tmp_path / "data/a/x.png")
    flags = ["--image-size", "4", "--batch", "1000", flag]
    x0 = train.draw_batch(set_up(tmp_path / "data", *flags), 0).x0
    assert set(x0[:, 0, 0, 0].tolist()) == left
    assert flag == "--no-flip" or 440 < (x0[:, 0, 0, 0] == 1).sum() < 560
    assert torch.equal(x0[:, :, :, 0], -x0[:, :, :, 3])


# The cache ----------------------------------------------------------------------------------------


def fail_at(monkeypatch, name, error):
    """Reading the picture of this name raises the error -> the names of those that were read."""
    load_image = train.load_image
    read = []

    def failing_load_image(path, size):
        if path.name == name:
            raise error
        read.append(path.name)
        return load_image(path, size)

    monkeypatch.setattr(train, "load_image", failing_load_image)
    return read


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_what_is_not_the_pictures_fault_stops_the_run(tmp_path, monkeypatch, error):
    folder = make_photos(tmp_path / "data", 40)
    with monkeypatch.context() as patch:
        fail_at(patch, "020.png", error)
        with pytest.raises(type(error)):
            run(tmp_path / "run", "--data", folder, "--steps", 1)
    status = np.load(tmp_path / "run/images-8/status.npy")
    assert status.tolist() == [THERE] * 16 + [MISSING] * 24  # sixteen are read at a time

    save_image(folder / "a/000_new.png")  # the listing is the first one's
    read = fail_at(monkeypatch, None, None)
    run(tmp_path / "run", "--data", folder, "--steps", 1)
    assert sorted(read) == [f"{i:03d}.png" for i in range(16, 40)]
    (folder / "a/000_new.png").unlink()
    run(tmp_path / "whole", "--data", folder, "--steps", 1)
    for name in ("x.npy", "status.npy", "header.json"):
        resumed = tmp_path / "run/images-8" / name
        assert resumed.read_bytes() == (tmp_path / "whole/images-8" / name).read_bytes()


def test_a_picture_may_be_gone_but_a_disk_may_not(tmp_path, monkeypatch, capsys):
    folder = make_photos(tmp_path / "data", 40)
    flags = ["--data", folder, "--steps", 1]
    with monkeypatch.context() as patch:
        fail_at(patch, "000.png", MemoryError())
        with pytest.raises(MemoryError):
            run(tmp_path / "run", *flags)  # the pictures are listed, none is read
    (folder / "a/003.png").unlink()
    shutil.move(folder / "a", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="000.png and the 15 after it are gone"):
        run(tmp_path / "run", *flags)
    assert set(np.load(tmp_path / "run/images-8/status.npy")) == {MISSING}

    shutil.move(tmp_path / "elsewhere", folder / "a")
    capsys.readouterr()
    run(tmp_path / "run", *flags)
    shown = capsys.readouterr()
    assert "003.png: left out (FileNotFoundError" in shown.err and "1 left out" in shown.out
    assert len(read_cache(tmp_path / "run/images-8")) == 39


def test_a_cache_is_used_anywhere_but_not_with_other_settings(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "one/photos", 4, classes="ab")
    other = make_photos(tmp_path / "two/photos", 4)
    run(tmp_path / "run", "--data", folder, "--steps", 1)
    message = f"images-8 was made with source='{folder}', this command says '{other}': take"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "--data", other, "--steps", 1, "--fresh")

    cache = (tmp_path / "run/images-8").rename(tmp_path / "cache")
    run(tmp_path / "next", "--data", cache, "--steps", 1, image_size=None)
    config = load_model(tmp_path / "next/packed.pt").config
    assert (config.class_names, config.input_size) == (["a", "b"], 8)
    with pytest.raises(ValueError, match="made with image_size=8, this command says 16"):
        run(tmp_path / "other", "--data", cache, "--steps", 1, image_size=16)

    def closed(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", closed)
        with pytest.raises(PermissionError, match=r"Permission denied: '.*/cache/\w*.npy'$"):
            run(tmp_path / "next", "--data", cache, "--steps", 2, image_size=None)
    os.truncate(cache / "x.npy", 500)
    with pytest.raises(ValueError, match="cache is damaged .* a cache may be deleted"):
        run(tmp_path / "next", "--data", cache, "--steps", 2, image_size=None)
