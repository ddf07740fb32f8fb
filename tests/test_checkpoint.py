"""Checkpoints: round trips, sizes, and files that are damaged, foreign or hostile."""

import argparse
import math
import os
import pickle
import shutil
import stat
import threading
import zipfile

import numpy as np
import pytest
import torch

import terdit
from terdit import Config, DiT, load_model, pack_model, save_checkpoint
from tests.helpers import RELEASED, SMALL, awake

# Good files -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "latent", "full precision"])
def test_round_trip(tmp_path, kind):
    ternary = kind != "full precision"
    config = Config(**SMALL, class_names=list("abcde"), ternary=ternary, adaln_norm=ternary)
    model = awake(DiT(config))
    if kind == "packed":
        model = pack_model(model)
    save_checkpoint(tmp_path / "m.pt", model)
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.config == config
    assert not loaded.training
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5]))
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert os.listdir(tmp_path) == ["m.pt"]
    for name in loaded.state_dict():  # no traces of the wrappers of torch
        assert "module." not in name
        assert "_orig_mod" not in name


@torch.no_grad()
def test_a_model_loaded_in_bf16_is_close_to_fp32():
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5]))
    want = load_model(RELEASED["terdit"], n_heads=4)(*inputs)
    model = load_model(RELEASED["terdit"], dtype=torch.bfloat16, n_heads=4)
    assert all(p.dtype == torch.float32 for p in model.parameters())  # only the products are in bf16
    got = model(*inputs)
    assert got.dtype == torch.float32
    assert 1e-5 * want.std() < (got - want).std() < 0.02 * want.std()


def test_loading_in_bf16_keeps_the_codes_of_latents(tmp_path):
    model = awake(DiT(Config(**SMALL)))
    save_checkpoint(tmp_path / "m.pt", model)
    loaded = load_model(tmp_path / "m.pt", dtype=torch.bfloat16)
    loaded_codes = dict(pack_model(loaded).named_buffers())
    for name, codes in pack_model(model).named_buffers():
        assert torch.equal(loaded_codes[name], codes)
    inputs = (torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.tensor([0]))
    error = (loaded(*inputs) - model(*inputs)).norm() / model(*inputs).norm()
    assert 1e-5 < error < 0.05  # products are in bf16


def test_a_packed_file_is_little_more_than_its_weights(tmp_path):
    model = pack_model(DiT(Config(**terdit.SIZES["tiny"])))
    save_checkpoint(tmp_path / "m.pt", model)
    tensors = [*model.parameters(), *model.buffers()]
    payload = sum(t.numel() * t.element_size() for t in tensors)
    assert payload < (tmp_path / "m.pt").stat().st_size < 1.05 * payload


def test_config_of_a_released_folder_comes_from_its_shapes():
    config = load_model(RELEASED["terdit"], n_heads=4).config
    assert (config.input_size, config.patch_size, config.in_channels) == (8, 2, 4)
    assert (config.dim, config.n_layers, config.n_heads, config.ffn_dim) == (64, 2, 4, 192)
    assert (config.num_classes, config.vae) == (10, "stabilityai/sd-vae-ft-ema")
    assert (config.learn_sigma, config.qk_norm, config.ternary, config.adaln_norm) == (True, False, True, True)
    large = load_model(RELEASED["large"], n_heads=4).config
    assert (large.ternary, large.adaln_norm, large.dim, large.ffn_dim) == (False, False, 32, 96)


# Bad files ------------------------------------------------------------------------------------------------------------


def assert_refused(path, message):
    """load_model names the file and says what is wrong with it, in one line."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        load_model(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.fixture
def good(tmp_path):
    """The file of a packed model; the tests below spoil it."""
    path = tmp_path / "good.pt"
    save_checkpoint(path, pack_model(DiT(Config(**SMALL))))
    return path


def test_a_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "missing.pt", "no such file")


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 100])
def test_a_file_that_torch_cannot_read_is_refused(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    assert_refused(tmp_path / "m.pt", "not a checkpoint of this project")


def test_a_truncated_file_is_refused(good):
    good.write_bytes(good.read_bytes()[:-3000])
    assert_refused(good, "cut short")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {"w": torch.zeros(3)}}, "a foreign file"),
        (torch.zeros(3), "a foreign file"),
        ({"format": terdit.FORMAT}, "holds a config and a model"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "m.pt")
    assert_refused(tmp_path / "m.pt", message)


def test_a_training_state_is_refused(tmp_path):
    folder = tmp_path / "state-0000100"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    assert_refused(folder, "train.py --export --out .* makes its packed.pt")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("colour", 1, "unexpected keyword argument 'colour'"),
        ("num_classes", 7, "size mismatch|Missing key"),
        ("patch_size", 0, "patch_size=0"),
        ("n_heads", 3, "n_heads=3"),
    ],
)
def test_a_wrong_config_is_refused(good, field, value, message):
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["config"][field] = value
    torch.save(checkpoint, good)
    assert_refused(good, message)


def test_a_missing_tensor_is_refused(good):
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["model"] = {name: v for name, v in checkpoint["model"].items() if "wk" not in name}
    torch.save(checkpoint, good)
    assert_refused(good, "size mismatch|Missing key")


def test_code_3_in_a_packed_weight_is_refused(good):
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["model"]["layers.0.attention.wq.weight"][1, 2] = 0b11111111
    torch.save(checkpoint, good)
    assert_refused(good, "code 3")


def test_packed_weights_that_are_not_bytes_are_refused(good):
    checkpoint = torch.load(good, weights_only=True)
    name = "layers.1.attention.wk.weight"
    checkpoint["model"][name] = checkpoint["model"][name].float()
    torch.save(checkpoint, good)
    assert_refused(good, "uint8, got")


def test_a_bad_released_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="consolidated_ema_ternary"):
        load_model(tmp_path)
    torch.save(argparse.Namespace(), tmp_path / "model_args.pth")
    torch.save({"something": torch.zeros(1)}, tmp_path / "consolidated_ema.00-of-01.pth")
    with pytest.raises(ValueError, match="not the weights of a TerDiT"):
        load_model(tmp_path)
    (tmp_path / "model_args.pth").unlink()
    with pytest.raises(FileNotFoundError, match="model_args.pth"):
        load_model(tmp_path)


def config_with(field, value):
    """Put a value into the config of a checkpoint, as a change of its contents."""

    def change(checkpoint):
        checkpoint["config"][field] = value

    return change


def tensor_as(value):
    """Replace one of its tensors."""

    def change(checkpoint):
        checkpoint["model"]["layers.1.attention.wk.weight"] = value

    return change


BAD_CONTENTS = [
    (config_with("n_layers", 1_000_000), "n_layers=1000000, but it holds only .. tensors"),
    (config_with("n_layers", 10**30), "n_layers=1000000000.*, expected a whole number of 1 to 1,048,576"),
    (config_with("n_layers", True), "n_layers=True, expected a whole number"),
    (config_with("dim", 32.0), r"dim=32.0, expected a whole number"),
    (config_with("norm_eps", "x"), "norm_eps='x', expected a number of 0 to 1,000"),
    (config_with("norm_eps", math.nan), "norm_eps=nan, expected a number"),
    (config_with("latent_scale", math.inf), "latent_scale=inf, expected a number"),
    (config_with("label_std", None), "label_std=None, expected a number"),
    (config_with("learn_sigma", 1), "learn_sigma=1, expected bool"),
    (config_with("qk_norm", "yes"), "qk_norm='yes', expected bool"),
    (config_with("prediction", ["v"]), r"prediction=\['v'\], expected str"),
    (config_with("vae", 3), r"vae=3, expected str \| None"),
    (config_with("class_names", "abcde"), r"class_names='abcde', expected list \| None"),
    (config_with("class_names", [1, 2, 3, 4, 5]), r"class_names=\[1, 2, 3, 4, 5\], expected text"),
    (tensor_as(torch.zeros(1).expand(100_000, 100_000)), "its tensors would take 40,0.* bytes, more than the file has"),
    (tensor_as(torch.zeros(8, 32, device="meta")), "'layers.1.attention.wk.weight' is no plain tensor"),
    (tensor_as(torch.zeros(8, 32).to_sparse()), "'layers.1.attention.wk.weight' is no plain tensor"),
    (tensor_as("text"), "'layers.1.attention.wk.weight' is no plain tensor"),
]


@pytest.mark.parametrize("change, message", BAD_CONTENTS)
def test_bad_contents_are_refused_before_anything_is_built(good, change, message):
    checkpoint = torch.load(good, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, good)
    assert_refused(good, message)


def test_a_released_folder_with_an_impossible_image_size_is_refused(tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(RELEASED["terdit"], folder)
    for image_size in (math.inf, 10**400, "x"):
        torch.save(argparse.Namespace(image_size=image_size), folder / "model_args.pth")
        with pytest.raises(ValueError, match="consolidated.*not the weights of a TerDiT|input_size="):
            load_model(folder, n_heads=4)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "not a regular file")  # to open it would wait for ever
    assert_refused("/dev/zero", "not a regular file")


@torch.no_grad()
def test_what_is_loaded_stays_when_the_file_changes(good):
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5]))
    model = load_model(good)
    want = model(*inputs)
    with open(good, "r+b") as file:  # in place, as cp does it
        file.write(bytes(good.stat().st_size))
    assert torch.equal(model(*inputs), want)
    os.truncate(good, 10)
    assert torch.equal(model(*inputs), want)


# Hostile files and full disks -----------------------------------------------------------------------------------------


class Evil:
    """Unpickling this makes a folder: it stands for a checkpoint that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path):
    """A careless load runs the code. Without this, the two tests below could pass for a wrong reason."""
    target = tmp_path / "hacked"
    torch.save(Evil(target), tmp_path / "m.pt")
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert target.exists()


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
    with pytest.raises(ValueError) as e:
        load_model(path)
    assert "weights_only" not in str(e.value)  # torch advises to load it without this protection
    assert not target.exists()


def test_a_zip_bomb_is_refused(good):
    """A compressed member of 1 GB of zeros takes 1 MB; torch.save compresses nothing."""
    with zipfile.ZipFile(good) as file:
        members = {name: file.read(name) for name in file.namelist()}
    largest = max(members, key=lambda name: len(members[name]))
    members[largest] = bytes(1 << 20)
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    assert_refused(good, "its parts are compressed, or larger than the file")


@pytest.mark.parametrize("name", ["model_args.pth", "consolidated_ema_ternary.00-of-01.pth"])
def test_a_hostile_released_folder_runs_nothing(tmp_path, name):
    target = tmp_path / "hacked"
    folder = tmp_path / "released"
    shutil.copytree(RELEASED["terdit"], folder)
    (folder / name).unlink()
    if name == "model_args.pth":
        content = argparse.Namespace(image_size=64, evil=Evil(target))
    else:
        content = {"x": Evil(target)}
    torch.save(content, folder / name)
    with pytest.raises(ValueError, match=name):
        load_model(folder)
    assert not target.exists()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    model = DiT(Config(**SMALL))
    save_checkpoint(path, model)
    before = path.read_bytes()

    def full_disk(obj, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore")  # what torch makes of a full disk

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="m.pt: cannot be written .PytorchStreamWriter failed"):
        save_checkpoint(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.pt"]


# Where a file is written ----------------------------------------------------------------------------------------------


def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    target = tmp_path / "far/target"
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("far/target")
    terdit.atomic_write(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "far") == ["target"]


def test_a_pipe_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    terdit.atomic_write(pipe, lambda file: file.write(b"through"))
    reader.join()
    assert got == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_device_stays_a_device():
    terdit.atomic_write("/dev/null", lambda file: np.savez(file, np.zeros(3)))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_write_that_fails_names_the_path(tmp_path):
    def no_space(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="x.png: cannot be written .*No space left"):
        terdit.atomic_write(tmp_path / "x.png", no_space)
    with pytest.raises(OSError, match="x.png: cannot be written .*No such file"):
        terdit.atomic_write(tmp_path / "missing/x.png", no_space)
    assert os.listdir(tmp_path) == []
