"""Checkpoints: what is saved can be loaded, and what is damaged, foreign or hostile is refused in one line."""

import argparse
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch

import terdit
from terdit import Config, DiT, load_model, pack_model, save_checkpoint
from tests.helpers import RELEASED, SMALL, awake

INPUTS = (torch.randn(2, 3, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5]))

# Good files -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("ternary", [True, False])
def test_round_trip(tmp_path, ternary):
    config = Config(**SMALL, class_names=list("abcde"), ternary=ternary, adaln_norm=ternary)
    model = awake(DiT(config))
    if ternary:
        model = pack_model(model)
    save_checkpoint(tmp_path / "m.pt", model)
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.config == config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(*INPUTS), model(*INPUTS))
    assert os.listdir(tmp_path) == ["m.pt"]


def test_config_of_a_released_folder_comes_from_its_shapes():
    config = load_model(RELEASED["terdit"], n_heads=4).config
    assert (config.input_size, config.patch_size, config.in_channels) == (8, 2, 4)
    assert (config.dim, config.n_layers, config.n_heads, config.ffn_dim) == (64, 2, 4, 192)
    assert (config.num_classes, config.vae) == (10, "stabilityai/sd-vae-ft-ema")
    assert (config.learn_sigma, config.qk_norm, config.ternary, config.adaln_norm) == (True, False, True, True)
    large = load_model(RELEASED["large"], n_heads=4).config
    assert (large.ternary, large.adaln_norm, large.dim, large.ffn_dim) == (False, False, 32, 96)


@torch.no_grad()
def test_what_is_loaded_stays_when_the_file_changes(good):
    model = load_model(good)
    want = model(*INPUTS)
    with open(good, "r+b") as file:  # in place, as cp does it
        file.write(bytes(good.stat().st_size))
    assert torch.equal(model(*INPUTS), want)


# Bad files ------------------------------------------------------------------------------------------------------------


def assert_refused(path, message):
    """load_model names the file and says what is wrong with it, in one line."""
    with pytest.raises((ValueError, OSError), match=message) as e:
        load_model(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert "weights_only" not in str(e.value)  # torch advises to load a file without this protection


@pytest.fixture(params=["packed.pt", "full.pt"])
def each_kind(request, tmp_path):
    ternary = request.param == "packed.pt"
    model = DiT(Config(**SMALL, ternary=ternary, adaln_norm=ternary))
    save_checkpoint(tmp_path / request.param, pack_model(model) if ternary else model)
    return tmp_path / request.param


@pytest.fixture
def good(tmp_path):
    """The file of a packed model; the tests below spoil it."""
    save_checkpoint(tmp_path / "good.pt", pack_model(awake(DiT(Config(**SMALL)))))
    return tmp_path / "good.pt"


def test_no_flipped_bit_goes_unnoticed(each_kind):
    """200 single bits anywhere in the file: it is refused, or what is loaded is what was saved (a bit of padding)."""
    content = each_kind.read_bytes()
    want = load_model(each_kind).state_dict()
    rng = random.Random(0)
    n_refused = 0
    for _ in range(200):
        place = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        each_kind.write_bytes(damaged)
        try:
            got = load_model(each_kind).state_dict()
            assert all(torch.equal(got[name], value) for name, value in want.items()), place
        except ValueError as e:
            assert str(each_kind) in str(e)
            n_refused += 1
    assert n_refused > 100


def test_a_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "missing.pt", "no such file")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "no such file")  # to open a pipe would wait for ever


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 100])
def test_a_file_that_torch_cannot_read_is_refused(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    assert_refused(tmp_path / "m.pt", "not a checkpoint of this project")


@pytest.mark.parametrize("content", [{"state_dict": {"w": torch.zeros(3)}}, torch.zeros(3)])
def test_a_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    assert_refused(tmp_path / "m.pt", "a foreign file")


def in_config(field, value):
    """A change of a checkpoint's contents."""

    def change(checkpoint):
        checkpoint["config"][field] = value

    return change


def without(part):
    def change(checkpoint):
        checkpoint["model"] = {name: value for name, value in checkpoint["model"].items() if part not in name}

    return change


def code_3(checkpoint):
    checkpoint["model"]["layers.0.attention.wq.weight"][1, 2] = 0b11111111


def floats_for_bytes(checkpoint):
    name = "layers.1.attention.wk.weight"
    checkpoint["model"][name] = checkpoint["model"][name].float()


def no_model(checkpoint):
    del checkpoint["model"]


@pytest.mark.parametrize(
    "change, message",
    [
        (in_config("colour", 1), "unexpected keyword argument 'colour'"),
        (in_config("num_classes", 7), "size mismatch"),
        (in_config("n_heads", 3), "n_heads=3"),
        (in_config("dim", "wide"), "TypeError"),
        (without("wk"), "Missing key"),
        (code_3, "code 3"),
        (floats_for_bytes, "uint8, got torch.float32"),
        (no_model, "KeyError"),
    ],
)
def test_wrong_contents_are_refused(good, change, message):
    checkpoint = torch.load(good, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, good)
    with pytest.raises(ValueError, match=message) as e:
        load_model(good)
    assert "\n" not in str(e.value)


def test_a_bad_released_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_args.pth.*packed.pt of a run folder"):
        load_model(tmp_path)
    torch.save(argparse.Namespace(image_size=256, vae="ema"), tmp_path / "model_args.pth")
    with pytest.raises(FileNotFoundError, match="consolidated_ema"):
        load_model(tmp_path)
    torch.save({"something": torch.zeros(1)}, tmp_path / "consolidated_ema.00-of-01.pth")
    with pytest.raises(ValueError, match="not the weights of a TerDiT"):
        load_model(tmp_path)


# Hostile files and full disks -----------------------------------------------------------------------------------------


class Evil:
    """Unpickling this makes a folder: it stands for a checkpoint that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path):
    """A careless load runs the code. Without this, the two tests below could pass for a wrong reason."""
    torch.save(Evil(tmp_path / "hacked"), tmp_path / "m.pt")
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert (tmp_path / "hacked").exists()


@pytest.mark.parametrize("kind", ["bare pickle", "torch file", "our format"])
def test_a_hostile_file_runs_nothing(tmp_path, kind):
    target = tmp_path / "hacked"
    path = tmp_path / "m.pt"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(Evil(target)))
    elif kind == "torch file":
        torch.save(Evil(target), path)
    else:
        torch.save({"format": terdit.FORMAT, "config": {}, "model": Evil(target)}, path)
    assert_refused(path, "may be hostile|File is not a zip file")
    assert not target.exists()


@pytest.mark.parametrize("name", ["model_args.pth", "consolidated_ema_ternary.00-of-01.pth"])
def test_a_hostile_released_folder_runs_nothing(tmp_path, name):
    target = tmp_path / "hacked"
    folder = tmp_path / "released"
    shutil.copytree(RELEASED["terdit"], folder)
    (folder / name).unlink()
    content = {"x": Evil(target)}
    if name == "model_args.pth":
        content = argparse.Namespace(image_size=64, evil=Evil(target))
    torch.save(content, folder / name)
    with pytest.raises(ValueError, match=name):
        load_model(folder)
    assert not target.exists()


def test_a_zip_bomb_is_refused(good):
    """A compressed member of 1 GB of zeros takes 1 MB; torch.save compresses nothing."""
    with zipfile.ZipFile(good) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    assert_refused(good, "its parts are compressed")


def test_a_failed_write_keeps_the_old_file(good, monkeypatch):
    before = good.read_bytes()

    def full_disk(obj, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore")  # what torch makes of a full disk

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="good.pt: cannot be written; .*PytorchStreamWriter failed"):
        save_checkpoint(good, DiT(Config(**SMALL)))
    assert good.read_bytes() == before
    assert os.listdir(good.parent) == ["good.pt"]
