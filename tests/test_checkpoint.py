"""Checkpoints: round trips, sizes, and files that are damaged, foreign or hostile."""

import argparse
import os
import pickle
import shutil

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
    with pytest.raises(ValueError, match="m.pt"):
        load_model(path)
    assert not target.exists()


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
