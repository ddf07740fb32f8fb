"""Other people's pictures: every mode has one right result, and no file is dropped, reread or mixed up in silence."""

import errno
import json
import os
import struct
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import sample
import train
from terdit import Config, GaussianDiffusion, load_model
from tests.helpers import load_run, run, save_image, short_training  # noqa: F401
from train import TrainConfig

RED = (255, 0, 0)
PINK = (255, 127, 127)  # half red on white
WHITE = (255, 255, 255)
CAFE = unicodedata.normalize("NFC", "café")
CAFE_NFD = unicodedata.normalize("NFD", "café")  # the accent is a letter of its own


def pixels(path, size=2):
    """load_image of a picture of size x size pixels, as rows of (r, g, b)."""
    image = train.load_image(path, size)
    return [tuple(pixel) for pixel in image.reshape(3, -1).T.tolist()]


def load(folder, size=8, **settings):
    return train.load_data(TrainConfig(data=str(folder), image_size=size, out=folder.parent, **settings))


def listed(folder, out="elsewhere"):
    return train.list_images(folder.resolve(), folder.parent / out)


def make_photos(folder, n, classes="a"):
    for i in range(n):
        save_image(folder / classes[i % len(classes)] / f"{i:03d}.png", size=(8, 8), colour=(i, 255 - i, 0))
    return folder


# What lies outside RGB ------------------------------------------------------------------------------------------------


def clear_pixels():
    """2x2, RGBA: opaque red, half red, clear black and clear green, whose colours must not be seen."""
    image = Image.new("RGBA", (2, 2))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 128), (0, 0, 0, 0), (0, 255, 0, 0)])
    return image


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "tga"])
def test_transparency_shows_white(tmp_path, ending):
    options = dict(lossless=True, exact=True) if ending == "webp" else {}
    clear_pixels().save(tmp_path / f"x.{ending}", **options)
    assert pixels(tmp_path / f"x.{ending}") == [RED, PINK, WHITE, WHITE]


def test_black_ink_on_clear_ground_is_black_on_white(tmp_path):
    ink = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    ink.putpixel((0, 0), (0, 0, 0, 255))
    ink.save(tmp_path / "ink.png")
    assert pixels(tmp_path / "ink.png") == [(0, 0, 0), WHITE, WHITE, WHITE]


def test_grey_with_alpha(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putdata([(100, 255), (0, 0)])
    image.resize((2, 2), Image.Resampling.NEAREST).save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png") == [(100, 100, 100), WHITE] * 2


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_palette_with_a_clear_colour(tmp_path, ending):
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1, 1, 0])
    image.save(tmp_path / f"x.{ending}", transparency=1)
    assert pixels(tmp_path / f"x.{ending}") == [RED, WHITE, WHITE, RED]


def test_palette_with_alpha_for_each_colour(tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1, 1, 0])
    image.save(tmp_path / "x.png", transparency=bytes([128, 0]))
    assert pixels(tmp_path / "x.png") == [PINK, WHITE, WHITE, PINK]


@pytest.mark.parametrize(
    "mode, colours, clear, shown",
    [
        ("RGB", [(255, 0, 0), (0, 255, 0)], (0, 255, 0), [RED, WHITE]),
        ("L", [7, 9], 9, [(7, 7, 7), WHITE]),
        ("I;16", [257 * 7, 257 * 9], 257 * 9, [(7, 7, 7), WHITE]),
    ],
)
def test_one_clear_colour_of_a_png(tmp_path, mode, colours, clear, shown):
    image = Image.new(mode, (2, 2))
    for x in range(2):
        for y in range(2):
            image.putpixel((x, y), colours[x])
    image.save(tmp_path / "x.png", transparency=clear)
    assert pixels(tmp_path / "x.png") == shown * 2


def test_modes_without_alpha(tmp_path):
    for mode, colour, ending in [("1", 1, "png"), ("L", 255, "bmp"), ("CMYK", (0, 0, 0, 0), "jpg")]:
        save_image(tmp_path / f"{mode}.{ending}", mode, (2, 2), colour)
        assert pixels(tmp_path / f"{mode}.{ending}") == [WHITE] * 4, mode


# 16 bits and floats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_16_bits_are_divided_by_257(tmp_path, ending):
    """Whatever else is in the picture: the brightest pixel of a dark frame stays dark."""
    for values in ([0, 257, 257 * 100, 65535], [0, 255, 256, 514]):
        deep = np.array(values, np.uint16).reshape(2, 2)
        Image.fromarray(deep).save(tmp_path / f"x.{ending}")
        assert pixels(tmp_path / f"x.{ending}") == [(v // 257,) * 3 for v in values]


def test_16_bits_in_either_byte_order(tmp_path):
    deep = np.array([[0, 257], [25700, 65535]], np.uint16)
    (tmp_path / "big.tif").write_bytes(tiff(16, deep.astype(">u2").tobytes(), order=">"))
    (tmp_path / "little.tif").write_bytes(tiff(16, deep.astype("<u2").tobytes(), order="<"))
    for name in ("big.tif", "little.tif"):
        assert pixels(tmp_path / name) == [(0, 0, 0), (1, 1, 1), (100, 100, 100), WHITE]


def tiff(bits, data, order="<"):
    """A grey TIFF of 2x2 pixels, written by hand: Pillow writes no 12 bits."""
    tags = [(256, 2), (257, 2), (258, bits), (259, 1), (262, 1), (273, 122), (277, 1), (278, 2), (279, len(data))]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return head + entries + bytes(4) + data


def test_12_bits_of_a_tiff(tmp_path):
    rows = bytes.fromhex("fff800 010000")  # three digits a pixel: 4095 and 2048, 16 and 0
    (tmp_path / "x.tif").write_bytes(tiff(12, rows))
    assert pixels(tmp_path / "x.tif") == [WHITE, (128, 128, 128), (1, 1, 1), (0, 0, 0)]


def test_floats_are_0_to_1(tmp_path):
    Image.fromarray(np.array([[0, 0.2], [0.5, 1]], np.float32)).save(tmp_path / "x.tif")
    assert pixels(tmp_path / "x.tif") == [(0, 0, 0), (51, 51, 51), (128, 128, 128), WHITE]


@pytest.mark.parametrize(
    "values, reason",
    [
        (np.float32([[0, 200]]), "its floats are not all in 0..1"),
        (np.float32([[0, np.nan]]), "its floats are not all in 0..1"),
        (np.float32([[-0.1, 1]]), "its floats are not all in 0..1"),
        (np.int32([[0, 70000]]), "its grey has 32 bits or a sign"),
        (np.int32([[0, 255]]), "its grey has 32 bits or a sign"),
    ],
)
def test_what_has_no_rule_is_named_and_left_out(tmp_path, capsys, values, reason):
    make_photos(tmp_path / "data", 2)
    Image.fromarray(values).save(tmp_path / "data/a/odd.tif")
    load(tmp_path / "data")
    shown = capsys.readouterr()
    assert "odd.tif: left out, cannot be read (ValueError: " + reason in shown.err
    assert "2 images of 1 classes" in shown.out
    assert "1 left out" in shown.out


# Pictures that cost more than they are --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_thin_pictures_are_cropped_before_they_are_enlarged(tmp_path, monkeypatch, size):
    save_image(tmp_path / "thin.png", size=size, colour=RED)
    sizes = []
    resize = Image.Image.resize

    def watched_resize(image, size, *args, **kwargs):
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    image = train.load_image(tmp_path / "thin.png", 256)
    assert image.shape == (3, 256, 256)
    assert (image == np.array(RED).reshape(3, 1, 1)).all()
    assert sizes == [(256, 256)]


def test_the_crop_is_that_of_adm(tmp_path):
    """Resized whole, then cropped: as it was done before, and is done by ADM, to a rounding of half a pixel."""
    x, y = np.meshgrid(np.linspace(0, 255, 90), np.linspace(0, 255, 60))
    photo = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    photo.save(tmp_path / "photo.png")
    want = np.asarray(photo.resize((60, 40), Image.Resampling.BICUBIC).crop((10, 0, 50, 40)), int)
    got = train.load_image(tmp_path / "photo.png", 40).transpose(1, 2, 0)
    assert np.abs(got - want).max() <= 1


def test_16_bits_take_no_wide_copies(tmp_path):
    """numpy's share for 1000 x 1000 pixels: twice 2 bytes, and one of the result."""
    Image.fromarray(np.full((1000, 1000), 65535, np.uint16)).save(tmp_path / "x.png")
    image = Image.open(tmp_path / "x.png")
    image.load()
    tracemalloc.start()
    train.to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8.5e6


def test_only_files_are_opened(tmp_path, capsys):
    """To open a pipe would wait for ever."""
    make_photos(tmp_path / "data", 2)
    os.mkfifo(tmp_path / "data/a/pipe.png")
    (tmp_path / "data/a/link.png").symlink_to("gone.png")
    (tmp_path / "data/a/loop.png").symlink_to("loop.png")
    data = load(tmp_path / "data")
    assert data.images.labels.tolist() == [0, 0] + [train.BROKEN] * 3
    shown = capsys.readouterr().err
    for name in ("pipe.png", "link.png", "loop.png"):
        assert f"{name}: left out, it is a pipe or a link to nowhere" in shown


# Which files are images -----------------------------------------------------------------------------------------------


def test_files_that_are_not_used_are_counted_by_kind(tmp_path, capsys):
    folder = make_photos(tmp_path / "data", 3)
    for i in range(12):
        (folder / f"a/{i}.HEIC").write_bytes(b"x")
    (folder / "a/noending").write_bytes(b"x")
    save_image(folder / "loose.png")
    load(folder)
    want = f"not used in {folder}: 12 .heic, 1 outside the class folders, 1 without an ending. Pillow cannot read"
    assert want in capsys.readouterr().out


def test_a_folder_without_any_image_says_what_it_holds(tmp_path, capsys):
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/x.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match="hold no images"):
        load(tmp_path / "data")
    assert "1 .heic" in capsys.readouterr().out


def test_hidden_files_and_what_systems_leave_are_no_images(tmp_path, capsys):
    folder = make_photos(tmp_path / "data", 1)
    for name in (".hidden/x.png", "__MACOSX/a/x.png", "a/.ipynb_checkpoints/x.png", "a/@eaDir/x.png", "a/._000.png"):
        save_image(folder / name)
    (folder / "a/Thumbs.db").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    assert listed(folder) == (["a"], [["a/000.png", 0]])
    assert capsys.readouterr().out == ""


def test_the_run_folder_is_no_class(tmp_path, monkeypatch):
    """--data . with the default --out, where an earlier run has drawn its grids."""
    monkeypatch.chdir(make_photos(tmp_path, 2))
    save_image(tmp_path / "runs/earlier/grid.png")
    state = run(Path("runs/now"), "--data", ".", "--steps", 1)
    assert state["config"]["class_names"] == ["a"]
    assert state["images"] == 2


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    folder = make_photos(tmp_path / "data", 1)
    save_image(tmp_path / "album/y.png")
    (folder / "a/album").symlink_to(tmp_path / "album")
    (folder / "a/up").symlink_to(folder)
    (folder / "b").symlink_to(tmp_path / "album")
    (tmp_path / "album/again").symlink_to(tmp_path / "album")
    assert listed(folder) == (["a", "b"], [["a/000.png", 0], ["a/album/y.png", 0], ["b/y.png", 1]])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "data", 1)
    scandir = os.scandir

    def closed_scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed_scandir)
    with pytest.raises(PermissionError, match="Permission denied: .*data/a"):
        load(folder)


def test_class_names_are_nfc(tmp_path):
    """A class folder in NFD, as macOS makes them; a second one that looks the same is the same class."""
    save_image(tmp_path / "data" / CAFE_NFD / "x.png", size=(8, 8))
    save_image(tmp_path / "data" / CAFE / "y.png", size=(8, 8))
    save_image(tmp_path / "data/zoo/z.png", size=(8, 8))
    data = load(tmp_path / "data")
    assert data.images.header["class_names"] == [CAFE, "zoo"]
    assert data.images.labels.tolist() == [0, 0, 1]


def test_classes_are_found_in_both_unicode_forms():
    for stored in (CAFE, CAFE_NFD):
        config = Config(num_classes=2, class_names=["bar", stored])
        assert sample.pick_classes([CAFE], config) == [1]
        assert sample.pick_classes([CAFE_NFD], config) == [1]


def test_names_are_printed_escaped(tmp_path, capsys):
    folder = make_photos(tmp_path / "data", 1)
    (folder / "a/\x1b[2Jx.png").write_bytes(b"no picture")
    (folder / "a/y.\x1b[31m").write_bytes(b"no picture")
    load(folder)
    shown = capsys.readouterr()
    assert r"\x1b[2Jx.png: left out" in shown.err
    assert r"1 .\x1b[31m" in shown.out
    assert "\x1b" not in shown.err + shown.out
    with pytest.raises(ValueError, match=r"2 classes, a, \\x1b\[2J"):
        sample.pick_classes(["?"], Config(num_classes=2, class_names=["a", "\x1b[2J"]))


def test_names_that_are_no_text_are_read(tmp_path, capsys):
    """A byte that is not UTF-8, as old archives have it."""
    folder = make_photos(tmp_path / "data", 1)
    save_image(folder / "a" / os.fsdecode(b"\xff.png"), size=(8, 8))
    (folder / "a" / os.fsdecode(b"\xfe.png")).write_bytes(b"no picture")
    assert load(folder).images.labels.tolist() == [0, train.BROKEN, 0]
    assert r"\udcfe.png: left out" in capsys.readouterr().err


def test_every_line_is_written_in_one_piece(tmp_path, monkeypatch):
    """Threads write between the pieces of a line."""
    pieces = []
    monkeypatch.setattr("sys.stderr.write", pieces.append)
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert train.read_image(tmp_path / "x.png", 8) is None
    assert len(pieces) == 1
    assert pieces[0].endswith(")\n")


@pytest.mark.parametrize("exif", [b"garbage!", b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_broken_exif_says_nothing_about_the_pixels(tmp_path, ending, exif):
    Image.new("RGB", (8, 8), WHITE).save(tmp_path / f"x.{ending}", exif=exif)
    assert (train.load_image(tmp_path / f"x.{ending}", 8) == 255).all()


# The cache and the folder that it was made of -------------------------------------------------------------------------


def test_the_same_name_elsewhere_is_another_folder(tmp_path, monkeypatch):
    for name in ("one", "two"):
        make_photos(tmp_path / name / "photos", 2)
    monkeypatch.chdir(tmp_path / "one")
    run(tmp_path / "out", "--data", "photos", "--steps", 1)
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(ValueError, match="images-8 holds the images of .*one/photos, not of --data photos"):
        run(tmp_path / "out", "--data", "photos", "--steps", 2)
    # The right one, by any of its names.
    (tmp_path / "link").symlink_to(tmp_path / "one/photos")
    assert run(tmp_path / "out", "--data", tmp_path / "link", "--steps", 2)["step"] == 2
    assert run(tmp_path / "out", "--data", "../one/photos", "--steps", 3)["step"] == 3


def test_a_vae_folder_is_named_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    monkeypatch.chdir(tmp_path)
    assert train.parse_args(["--data", "x", "--vae", "vae"]).vae == str((tmp_path / "vae").resolve())
    assert train.parse_args(["--data", "x", "--vae", "maker/model"]).vae == "maker/model"


def test_a_folder_that_has_changed_is_said(tmp_path, capsys):
    folder = make_photos(tmp_path / "data", 2)
    run(tmp_path / "out", "--data", folder, "--steps", 1)
    run(tmp_path / "out", "--data", folder, "--steps", 2)
    assert "note: the images in" not in capsys.readouterr().out
    save_image(folder / "b/new.png")
    state = run(tmp_path / "out", "--data", folder, "--steps", 2, "--fresh")
    assert state["config"]["class_names"] == ["a"]
    shown = capsys.readouterr().out
    assert f"note: the images in {folder} are not those that {tmp_path}/out/images-8 was made of" in shown
    assert "delete it to read the folder again" in shown


def test_a_cache_needs_its_folder_no_more(tmp_path, capsys):
    folder = make_photos(tmp_path / "data", 2)
    run(tmp_path / "out", "--data", folder, "--steps", 1)
    folder.rename(tmp_path / "gone")
    assert run(tmp_path / "out", "--data", folder, "--steps", 2)["step"] == 2
    folder.mkdir()  # what is left where a disk was mounted
    assert run(tmp_path / "out", "--data", folder, "--steps", 3)["step"] == 3


def test_a_cache_of_an_older_format_says_what_to_do(tmp_path):
    folder = make_photos(tmp_path / "data", 2)
    run(tmp_path / "out", "--data", folder, "--steps", 1)
    header = tmp_path / "out/images-8/header.json"
    header.write_text(header.read_text().replace(train.CACHE, "terdit-cache-1"))
    with pytest.raises(ValueError, match="format='terdit-cache-1'.* delete that folder to read the images again"):
        run(tmp_path / "out", "--data", folder, "--steps", 2)


@pytest.mark.parametrize("how", ["opened", "read"])
def test_a_source_that_goes_away_stops_the_run(tmp_path, monkeypatch, how):
    """What is done is kept, nothing is marked broken, and the same command goes on."""
    folder = make_photos(tmp_path / "data", 40)
    load_image = train.load_image
    seen = []

    def failing_load_image(path, size):
        if path.name > "030.png":
            if how == "read":
                raise OSError(errno.EIO, "Input/output error", str(path))
            path = path.with_name("gone.png")
        seen.append(path.name)
        return load_image(path, size)

    with monkeypatch.context() as patch:
        patch.setattr(train, "load_image", failing_load_image)
        with pytest.raises(OSError, match="png'. What was read before is kept: the same command goes on"):
            load(folder)
    labels = np.load(tmp_path / "images-8/labels.npy")
    assert labels.tolist() == [0] * 16 + [train.UNREAD] * 24
    data = load(folder)
    assert data.images.labels.tolist() == [0] * 40


def test_damaged_pictures_do_not_stop_the_run(tmp_path, capsys, monkeypatch):
    """What decoders raise has no number, or that of a place before the file's start."""
    folder = make_photos(tmp_path / "data", 4)
    load_image = train.load_image

    def failing_load_image(path, size):
        if path.name == "001.png":
            raise OSError(errno.EINVAL, "Invalid argument")
        if path.name == "002.png":
            raise OSError("image file is truncated\nsecond line")
        return load_image(path, size)

    monkeypatch.setattr(train, "load_image", failing_load_image)
    assert load(folder).images.labels.tolist() == [0, train.BROKEN, train.BROKEN, 0]
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("where", ["posix_fallocate", "save"])
def test_a_full_disk_is_said_with_the_path(tmp_path, monkeypatch, where):
    folder = make_photos(tmp_path / "data", 2)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if where == "posix_fallocate" else np, where, full)
        with pytest.raises(OSError, match=r"images-8: cannot be made \(.*No space left.*it takes 0 MB, [\d,]+ MB are"):
            load(folder)
    assert not (tmp_path / "images-8/x.npy").exists()
    assert load(folder).images.labels.tolist() == [0, 0]


def test_old_pillow_is_refused(monkeypatch):
    for version in ("9.4.0", "10.0.1"):
        monkeypatch.setattr(PIL, "__version__", version)
        with pytest.raises(ValueError, match=f"Pillow is {version}, expected 10.1 or newer: pip install -U pillow"):
            train.load_data(TrainConfig())
    for version in ("10.1.0", "11.0", "13.0.0.dev0"):
        monkeypatch.setattr(PIL, "__version__", version)
        assert len(train.load_data(TrainConfig()).images.labels) == 200


# Mirrors, and batches of one ------------------------------------------------------------------------------------------


def test_no_flip(tmp_path):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    letter = np.zeros((8, 8), np.uint8)
    letter[:, 4:] = 255
    for i in range(2):
        Image.fromarray(letter).save(folder / f"a/{i}.png")
    cfg = TrainConfig(batch=200)
    for no_flip, left in ((True, {-1.0}), (False, {-1.0, 1.0})):
        data = load(folder, no_flip=no_flip)
        batch = train.draw_batch(data, Config(num_classes=1), cfg, GaussianDiffusion(), 0)
        assert set(batch.x0[:, 0, 0, 0].tolist()) == left


def test_no_flip_belongs_to_the_run(tmp_path):
    flags = ["--data", make_photos(tmp_path / "data", 2)]
    run(tmp_path / "out", *flags, "--no-flip", "--steps", 1)
    assert run(tmp_path / "out", *flags, "--no-flip", "--steps", 2)["step"] == 2
    with pytest.raises(ValueError, match="trained with no_flip=True, this command says None"):
        run(tmp_path / "out", *flags, "--steps", 3)


def test_a_batch_of_one(tmp_path):
    state = run(tmp_path / "digits", "--batch", 1, "--steps", 2)
    assert state["step"] == 2
    folder = make_photos(tmp_path / "data", 2)
    run(tmp_path / "photos", "--batch", 1, "--steps", 2, "--data", folder)
    assert load_model(tmp_path / "photos/packed.pt").config.class_names == ["a"]


def test_one_photo_held_out(tmp_path):
    """100 to 199 photos: one of them."""
    data = load(make_photos(tmp_path / "data", 100, classes="ab"))
    x0, labels = data.held_out
    assert x0.shape == (1, 3, 8, 8)
    assert labels.shape == (1,)
    assert len(data.train_index) == 99
    state = run(tmp_path / "out", "--data", tmp_path / "data", "--steps", 1)
    assert load_run(tmp_path / "out")["step"] == state["step"] == 1


def test_one_image_a_process(tmp_path, monkeypatch):
    """Each of four processes keeps its own image of a batch of four."""
    data = load(make_photos(tmp_path / "data", 8, classes="ab"))
    config = Config(num_classes=2)

    def draw(rank, world):
        monkeypatch.setattr(train, "ranks", lambda: (rank, world))
        return train.draw_batch(data, config, TrainConfig(batch=4), GaussianDiffusion(), 0)

    whole = draw(0, 1)
    parts = [draw(rank, 4) for rank in range(4)]
    assert [len(part.x0) for part in parts] == [1] * 4
    for name in ("x0", "t", "y", "noise"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_listing_is_read_back_as_it_was_written(tmp_path):
    """note: appears only if something has changed, so lists must come back from JSON as they went in."""
    names, files = listed(make_photos(tmp_path / "data", 3, classes="ab"))
    assert json.loads(json.dumps([names, files])) == [names, files]
    assert files == [["a/000.png", 0], ["a/002.png", 0], ["b/001.png", 1]]
