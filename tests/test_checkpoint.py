"""Checkpoints: what is saved can be loaded; what is damaged or hostile is refused in one line."""

import argparse
import os
import pickle
import random
import shutil

import pytest
import torch

import terdit
from terdit import Config, DiT, atomic_write, check_writable, load_model, pack_model
from terdit import save_checkpoint
from tests.helpers import RELEASED, SMALL, awake, save_model

INPUTS = (torch.randn(2, 3, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5]))

# Good files ---------------------------------------------------------------------------------------


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


def test_config_of_a_released_folder_comes_from_its_files():
    """The rest is in shapes, which test_golden.py would not load."""
    config = load_model(RELEASED["terdit"], n_heads=4).config
    assert (config.num_classes, config.vae) == (10, "stabilityai/sd-vae-ft-ema")
    assert (config.input_size, config.qk_norm) == (8, False)


@torch.no_grad()
def test_what_is_loaded_stays_when_the_file_changes(good):
    model = load_model(good)
    want = model(*INPUTS)
    with open(good, "r+b") as file:  # in place, as cp does it
        file.write(bytes(good.stat().st_size))
    assert torch.equal(model(*INPUTS), want)


# Bad files ----------------------------------------------------------------------------------------


def assert_refused(path, message):
    """load_model names the file and says what is wrong with it, in one line."""
    with pytest.raises((ValueError, OSError), match=message) as e:
        load_model(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert "weights_only" not in str(e.value)  # torch advises to load without this protection


@pytest.fixture
def good(tmp_path):
    """The file of a packed model; the tests below spoil it."""
    return save_model(tmp_path / "good.pt")


@pytest.mark.parametrize("ternary", [True, False])
def test_no_flipped_bit_goes_unnoticed(tmp_path, ternary):
    """200 single bits anywhere: the file is refused, or loads as it was (a bit of padding)."""
    path = save_model(tmp_path / "m.pt", ternary=ternary, adaln_norm=ternary)
    content = path.read_bytes()
    want = load_model(path).state_dict()
    rng = random.Random(0)
    n_refused = 0
    for _ in range(200):
        place = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            got = load_model(path).state_dict()
            assert all(torch.equal(got[name], value) for name, value in want.items()), place
        except ValueError as e:
            assert str(path) in str(e)
            n_refused += 1
    assert n_refused > 100


def test_a_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "missing.pt", "no such file")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "no such file")  # to open a pipe would wait for ever


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "m.pt").touch()
    assert_refused(tmp_path / "m.pt", "not a checkpoint of this project")


@pytest.mark.parametrize("content, message", [
    ({"state_dict": {"w": torch.zeros(3)}}, "a foreign file"),
    (torch.zeros(3), "a foreign file"),
    ({"format": "terdit-state-5"}, "a state of training; take packed.pt or full.pt"),
    ({"x_embedder.weight": torch.zeros(3)}, "part of a released model; name its folder"),
    (argparse.Namespace(vae="ema"), "part of a released model; name its folder"),
])
def test_a_foreign_file_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "m.pt")
    assert_refused(tmp_path / "m.pt", message)


def test_a_file_without_checksums_is_named(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "m.pt", DiT(Config(**SMALL)))
    finally:
        torch.serialization.set_crc32_options(True)
    assert_refused(tmp_path / "m.pt", "saved without checksums")


@pytest.mark.parametrize("error, message", [
    (OSError(5, "Input/output error"), "cannot be read .*Input/output error"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."), "not enough memory"),
])
def test_what_the_system_refuses_is_not_called_damaged(good, monkeypatch, error, message):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises((OSError, MemoryError), match=f"good.pt: {message}"):
        load_model(good)


def test_our_files_know_their_heads(good):
    with pytest.raises(ValueError, match="good.pt: n_heads=2 is for released folders"):
        load_model(good, n_heads=2)
    with pytest.raises(ValueError, match="n_heads=0"):
        load_model(RELEASED["terdit"], n_heads=0)


def test_an_old_file_takes_the_defaults_of_new_fields(good):
    checkpoint = torch.load(good, weights_only=True)
    for field in ("size", "alpha_start"):
        del checkpoint["config"][field]
    torch.save(checkpoint, good)
    assert load_model(good).config == Config(**SMALL)


@pytest.mark.parametrize("part, name, value, message", [
    ("config", "colour", 1, "unexpected keyword argument 'colour'"),
    ("config", "num_classes", 7, "size mismatch"),
    ("config", "n_heads", 3, "n_heads=3"),
    ("config", "dim", "wide", "TypeError"),
    ("model", "layers.1.attention.wk.weight", None, "Missing key"),
    ("model", "layers.1.attention.wk.weight", torch.full((8, 32), 255).byte(), "code 3"),
    ("model", "layers.1.attention.wk.weight", torch.zeros(8, 32), "uint8, got torch.float32"),
    ("model", None, None, "KeyError"),
])
def test_wrong_contents_are_refused(good, part, name, value, message):
    checkpoint = torch.load(good, weights_only=True)
    if name is None:
        del checkpoint[part]
    elif value is None:
        del checkpoint[part][name]
    else:
        checkpoint[part][name] = value
    torch.save(checkpoint, good)
    with pytest.raises(ValueError, match=message) as e:
        load_model(good)
    assert "\n" not in str(e.value)


def test_a_bad_released_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is saved there yet; expected packed.pt"):
        load_model(tmp_path)
    torch.save(argparse.Namespace(image_size=256, vae="ema"), tmp_path / "model_args.pth")
    with pytest.raises(FileNotFoundError, match="consolidated_ema"):
        load_model(tmp_path)
    torch.save({"something": torch.zeros(1)}, tmp_path / "consolidated_ema.00-of-01.pth")
    with pytest.raises(ValueError, match="not the weights of a TerDiT"):
        load_model(tmp_path)


# Hostile files and full disks ---------------------------------------------------------------------


class Evil:
    """Unpickling this makes a folder: it stands for a checkpoint that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path):
    """A careless load runs the code; else the two tests below could pass for a wrong reason."""
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


# Writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tmp_name", [None, "m.tmp"])
def test_a_failed_write_keeps_the_old_file(good, monkeypatch, tmp_name):
    before = good.read_bytes()

    def full_disk(obj, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598\nmore")  # what torch makes of it

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"good.pt: cannot be written \(\[Errno 28\] No space left"):
        save_checkpoint(good, DiT(Config(**SMALL)), tmp_name)

    def no_memory(obj, file):
        raise MemoryError

    monkeypatch.setattr(torch, "save", no_memory)
    with pytest.raises(MemoryError):
        save_checkpoint(good, DiT(Config(**SMALL)), tmp_name)
    assert good.read_bytes() == before
    assert os.listdir(good.parent) == ["good.pt"]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / ("n" * 252)
    link = tmp_path / "link"
    link.symlink_to(target)
    for content in (b"old", b"new"):
        atomic_write(link, lambda file: file.write(content))
        assert link.is_symlink() and target.read_bytes() == content
    assert os.listdir(target.parent) == [target.name]
    assert target.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))


def test_what_cannot_be_written_is_found_before(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(OSError, match=f"{path}: cannot be written .it is no regular file"):
            check_writable(path)
    with pytest.raises(OSError, match="No such file or directory"):
        check_writable(tmp_path / "missing/m.pt")
    check_writable(tmp_path / "m.pt")
    assert os.listdir(tmp_path) == ["pipe"]


def test_two_writers_share_no_temporary_file_but_a_named_one_is_overwritten(tmp_path):
    (tmp_path / "m.tmp").write_bytes(b"left by a kill")

    def write_both(file):
        file.write(b"outer")
        atomic_write(tmp_path / "m.pt", lambda inner: inner.write(b"inner"))
        assert (tmp_path / "m.pt").read_bytes() == b"inner"

    atomic_write(tmp_path / "m.pt", write_both, tmp_name="m.tmp")
    atomic_write(tmp_path / "m.pt", write_both)
    assert (tmp_path / "m.pt").read_bytes() == b"outer"
    assert os.listdir(tmp_path) == ["m.pt"]
