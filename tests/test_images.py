"""Other people's pictures: every mode has one right result, and no file is dropped, reread or mixed up in silence."""

import errno
import json
import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import train
from sample import MISSING, THERE
from terdit import load_model
from tests.helpers import run, save_image, short_training  # noqa: F401

RED = (255, 0, 0)
PINK = (255, 127, 127)  # half red on white
WHITE = (255, 255, 255)
CAFE = unicodedata.normalize("NFC", "café")
CAFE_NFD = unicodedata.normalize("NFD", "café")  # the accent is a letter of its own, as macOS writes it


def make_photos(folder, n, classes="a"):
    for i in range(n):
        save_image(folder / classes[i % len(classes)] / f"{i:03d}.png", size=(8, 8), colour=(i, 255 - i, 0))
    return folder


def read_cache(cache):
    """The cache of a run -> {path of a picture within its folder: (H, W, 3) uint8}, without what cannot be used."""
    header = json.loads((cache / "header.json").read_text())
    rows = zip(header["files"], np.load(cache / "x.npy"), np.load(cache / "status.npy"))
    return {path: x[0].transpose(1, 2, 0) for (path, _), x, status in rows if status == THERE}


# Modes and formats ----------------------------------------------------------------------------------------------------


def halves(mode, left, right):
    """4 x 4 pixels: the left half in one colour, the right half in another."""
    image = Image.new(mode, (4, 4), left)
    image.paste(right, (2, 0, 4, 4))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 255, 0])
    return image


def deep(left, right, dtype="<u2"):
    return Image.fromarray(np.array([[left, left, right, right]] * 4, dtype))


HEAD_DOWN = Image.Exif()
HEAD_DOWN[0x0112] = 3  # its orientation
PICTURES = {  # name: picture, options of saving, the colours of both halves (a number is a grey)
    "alpha.png": (halves("RGBA", (255, 0, 0, 128), (0, 0, 0, 0)), {}, PINK, 255),
    "alpha.webp": (halves("RGBA", (255, 0, 0, 128), (0, 0, 0, 0)), dict(lossless=True, exact=True), PINK, 255),
    "grey_alpha.png": (halves("LA", (100, 255), (0, 0)), {}, 100, 255),
    "palette.gif": (halves("P", 0, 1), dict(transparency=1), RED, 255),
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
    for name in ("cut.jpg", "cut.png"):
        Image.effect_noise((64, 64), 100).save(folder / name)
        os.truncate(folder / name, 1500)
    (folder / os.fsdecode(b"text\xff.png")).write_text("no picture")  # nor is its name UTF-8

    run(tmp_path / "run", "--data", tmp_path / "data", "--steps", 1, image_size=4)

    images = read_cache(tmp_path / "run/images-4")
    assert {path: [tuple(pixel) for pixel in x[3].tolist()] for path, x in images.items()} == want
    shown = capfd.readouterr()
    for name in ("int.tif", "float.tif", "cut.jpg", "cut.png"):
        assert f"{name}: left out, cannot be read" in shown.err
    assert f"{len(want)} images of 1 classes, ['a'], 5 left out" in shown.out


@pytest.mark.parametrize("ending, scale", [("png", 1), ("png", 5), ("jpg", 5)])
def test_a_picture_is_resized_and_its_centre_is_taken(tmp_path, ending, scale):
    """As ADM does it: the shorter side becomes the size. Here the whole picture is resized and then cropped."""
    x, y = np.meshgrid(np.linspace(0, 255, 90 * scale), np.linspace(0, 255, 60 * scale))
    photo = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    photo.save(tmp_path / f"x.{ending}", quality=100)
    want = np.asarray(photo.resize((60, 40), Image.Resampling.BICUBIC).crop((10, 0, 50, 40)), int)
    got = train.load_image(tmp_path / f"x.{ending}", 40).transpose(1, 2, 0)
    assert np.abs(got - want).max() <= 3  # neighbours differ by 4 or 5


# Folders --------------------------------------------------------------------------------------------------------------


def test_what_is_a_class_and_what_is_a_picture(tmp_path, capsys):
    folder = tmp_path / "data"
    used = [f"{CAFE}/x.png", f"{CAFE_NFD}/y.png", "linked/x.png", "two words 🐈/in/a folder/z.png", "two words 🐈/x.png"]
    used.append("zoo/" + os.fsdecode(b"\xff.png"))  # an old archive's name, which is no UTF-8
    hidden = [".hidden/x.png", "__MACOSX/zoo/x.png", "zoo/.ipynb_checkpoints/x.png", "zoo/@eaDir/x.png"]
    save_image(tmp_path / "elsewhere/x.png")
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in [*used, *hidden, "run/grids/x.png", "zoo/._x.png", "loose.png"]:
        save_image(folder / name)
    (folder / "zoo/notes.txt").touch()
    os.mkfifo(folder / "zoo/pipe.png")  # to open it would wait for ever
    (folder / "zoo/link.png").symlink_to("gone.png")
    (folder / "spoiled").mkdir()
    (folder / "spoiled/x.png").touch()

    run(folder / "run", "--data", folder, "--steps", 1)  # the run's own grids are no class

    names = sorted([CAFE, "linked", "spoiled", "two words 🐈", "zoo"])
    assert load_model(folder / "run/packed.pt").config.class_names == names
    assert set(read_cache(folder / "run/images-8")) == set(used)
    files = json.loads((folder / "run/images-8/header.json").read_text())["files"]
    assert all(names[label] == unicodedata.normalize("NFC", path.split("/")[0]) for path, label in files)
    shown = capsys.readouterr().out
    assert f"5 files in {folder} are not used" in shown  # the last of the list, ._x.png, and three more
    assert f"6 images of 5 classes, {names!r}, 1 left out" in shown


@pytest.mark.parametrize(
    "files, message",
    [
        (["train/cat/x.png", "val/cat/x.png"], "train holds only folders, .* did you mean --data .*/data/train?"),
        (["train/cat/x.png", "extra/x.png"], "train holds only folders, .* did you mean --data .*/data/train?"),
        (["data/cat/x.png", "data/dog/x.png"], "data holds only folders, .* did you mean --data .*/data/data?"),
        (["Train/cat/x.png", "Train/dog/x.png", "Train/a.png", "val/x.png"], "Train holds only folders, or mostly"),
        (["loose.png", "cat/._x.png"], "expected one subfolder of images a class"),
        ([], "data: no such folder"),
    ],
)
def test_a_wrong_folder_is_said(tmp_path, files, message):
    for name in files:
        save_image(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "--data", tmp_path / "data", "--steps", 1)
    assert not (tmp_path / "run/images-8").exists()


def test_a_folder_that_cannot_be_listed_stops(tmp_path, monkeypatch):
    """Otherwise its class would be missing in silence."""
    folder = make_photos(tmp_path / "data", 1)

    scandir = os.scandir

    def closed(path):
        if os.path.dirname(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="Permission denied: .*data"):
        run(tmp_path / "run", "--data", folder, "--steps", 1)


def set_up(folder, *flags):
    """Everything before the first step of training -> train.Run"""
    return train.setup(train.parse_args(["--data", str(folder), "--out", str(folder.with_name("run")), *flags]))


def test_the_last_image_of_a_class_is_never_held_out(tmp_path):
    """Of 203 images two are held out: of the one class that has three, and not of the 200 that have one."""
    folder = make_photos(tmp_path / "data", 200, classes=[f"{i:03d}" for i in range(200)])
    make_photos(folder, 3, classes=["more"])
    data = set_up(folder, "--image-size", "8").data
    assert data.held_out[1].tolist() == [200, 200]
    assert sorted(data.labels[data.train_index]) == list(range(201))


@pytest.mark.parametrize("flag, left", [("--no-flip", {-1.0}), ("--flip", {-1.0, 1.0})])
def test_half_of_the_images_are_mirrored(tmp_path, flag, left):
    (tmp_path / "data/a").mkdir(parents=True)
    halves("L", 0, 255).save(tmp_path / "data/a/x.png")
    batch = train.draw_batch(set_up(tmp_path / "data", "--image-size", "4", "--batch", "50", flag), 0)
    assert set(batch.x0[:, 0, 0, 0].tolist()) == left
    assert torch.equal(batch.x0[:, :, :, 0], -batch.x0[:, :, :, 3])


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fails_stops_the_run_which_then_goes_on_with_the_same_rows(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "data", 40)
    load_image = train.load_image
    broken = ["020.png"]
    read = []

    def failing_load_image(path, size):
        if path.name in broken:
            raise OSError(errno.EIO, "Input/output error", str(path))
        read.append(path.name)
        return load_image(path, size)

    monkeypatch.setattr(train, "load_image", failing_load_image)
    with pytest.raises(OSError, match="Input/output error: .*020.png"):
        run(tmp_path / "run", "--data", folder, "--steps", 1)
    status = np.load(tmp_path / "run/images-8/status.npy")
    assert status.tolist() == [THERE] * 16 + [MISSING] * 24  # sixteen are read at a time

    broken.clear()
    read.clear()
    save_image(folder / "a/000_new.png")  # the listing is the first one's
    run(tmp_path / "run", "--data", folder, "--steps", 1)
    assert sorted(read) == [f"{i:03d}.png" for i in range(16, 40)]
    (folder / "a/000_new.png").unlink()
    run(tmp_path / "whole", "--data", folder, "--steps", 1)
    for name in ("x.npy", "status.npy", "header.json"):
        assert (tmp_path / "run/images-8" / name).read_bytes() == (tmp_path / "whole/images-8" / name).read_bytes()


def test_a_cache_is_used_anywhere_but_not_with_other_settings(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "one/photos", 4, classes="ab")
    other = make_photos(tmp_path / "two/photos", 4)
    monkeypatch.chdir(tmp_path / "one")
    run(tmp_path / "run", "--data", "photos", "--steps", 1)
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(ValueError, match=f"images-8 was made with source='{folder}', this command says '{other}': say"):
        run(tmp_path / "run", "--data", "photos", "--steps", 2)

    folder.rename(tmp_path / "moved")
    cache = (tmp_path / "run/images-8").rename(tmp_path / "cache")
    run(tmp_path / "next", "--data", cache, "--steps", 1, image_size=None)
    config = load_model(tmp_path / "next/packed.pt").config
    assert (config.class_names, config.input_size) == (["a", "b"], 8)
    with pytest.raises(ValueError, match="made with image_size=8, this command says 16"):
        run(tmp_path / "other", "--data", cache, "--steps", 1, image_size=16)
    os.truncate(cache / "x.npy", 500)
    with pytest.raises(ValueError, match="cache: cut short or damaged .* delete it to start anew"):
        run(tmp_path / "next", "--data", cache, "--steps", 2, image_size=None)
