"""Checkpoints: round trips, sizes, and files that are damaged, foreign or hostile."""

import argparse
import os
import pickle
import shutil

import pytest
import torch

import terdit
from terdit import Config, DiT, load_model, pack_model, save_checkpoint
from tests.test_golden import FOLDERS
from tests.test_ternary import SMALL, awake


class Evil:
    """Unpickling this makes a folder: what a hostile checkpoint would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "latent", "full precision"])
def test_round_trip(tmp_path, kind):
    full = kind == "full precision"
    config = Config(**SMALL, class_names=list("abcde"), ternary=not full, adaln_norm=not full)
    model = awake(DiT(config))
    model = pack_model(model) if kind == "packed" else model
    save_checkpoint(tmp_path / "m.pt", model)
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.config == config and not loaded.training
    args = torch.randn(2, 3, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5])
    assert torch.equal(loaded(*args), model(*args))
    assert os.listdir(tmp_path) == ["m.pt"]
    assert not any("module." in k or "_orig_mod" in k for k in loaded.state_dict())


@torch.no_grad()
def test_bf16_loads_and_is_close():
    args = torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5])
    want = load_model(FOLDERS["terdit"], n_heads=4)(*args)
    model = load_model(FOLDERS["terdit"], dtype=torch.bfloat16, n_heads=4)
    assert model.layers[0].attention.wq.alphas.dtype == torch.float32
    assert model.final_layer.linear.weight.dtype == torch.bfloat16
    assert (model(*args).float() - want).std() < 0.05 * want.std()


def test_bf16_keeps_the_codes_of_latents(tmp_path):
    model = awake(DiT(Config(**SMALL)))
    save_checkpoint(tmp_path / "m.pt", model)
    loaded = load_model(tmp_path / "m.pt", dtype=torch.bfloat16)
    for name, packed in pack_model(model).named_buffers():
        assert torch.equal(pack_model(loaded).get_buffer(name), packed)
    assert loaded(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.tensor([0])).dtype == torch.bfloat16


def test_packed_tiny_file_is_its_weights(tmp_path):
    model = pack_model(DiT(Config(**terdit.SIZES["tiny"])))
    save_checkpoint(tmp_path / "m.pt", model)
    tensors = [*model.parameters(), *model.buffers()]
    payload = sum(t.numel() * t.element_size() for t in tensors)
    assert payload < (tmp_path / "m.pt").stat().st_size < 1.05 * payload


def test_released_folder_is_read_from_its_shapes():
    config = load_model(FOLDERS["terdit"], n_heads=4).config
    want = dict(input_size=8, patch_size=2, in_channels=4, dim=64, n_layers=2, n_heads=4, num_classes=10, learn_sigma=True,
                qk_norm=False, ternary=True, adaln_norm=True, vae="stabilityai/sd-vae-ft-ema")  # fmt: skip
    assert {k: getattr(config, k) for k in want} == want and config.ffn_dim == 192
    large = load_model(FOLDERS["large"], n_heads=4).config
    assert (large.ternary, large.adaln_norm, large.dim, large.ffn_dim) == (False, False, 32, 96)


def damaged(tmp_path):
    """name -> (path, what the error must say)"""
    good = tmp_path / "good.pt"
    save_checkpoint(good, pack_model(DiT(Config(**SMALL))))
    cases = {}

    def case(name, message, data=None, obj=None):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data) if data is not None else torch.save(obj, path) if obj is not None else None
        cases[name] = path, message

    ckpt = torch.load(good, weights_only=True)
    edit = lambda **change: ckpt | {k: ckpt[k] | v for k, v in change.items()}
    weight = ckpt["model"]["layers.0.attention.wq.weight"].clone()
    weight[1, 2] = 0xFF
    case("missing", "no such file")
    case("empty", "not a checkpoint of this project", data=b"")
    case("truncated", "cut short", data=good.read_bytes()[:-3000])
    case("text", "not a checkpoint of this project", data=b"hello, world\n" * 100)
    case("foreign", "a foreign file", obj={"state_dict": {"w": torch.zeros(3)}})
    case("tensor", "a foreign file", obj=torch.zeros(3))
    (tmp_path / "state-0000100").mkdir()
    (tmp_path / "state-0000100" / "run.json").write_text("{}")
    cases["training state"] = tmp_path / "state-0000100", "packed.pt beside it"
    case("code 3", "code 3", obj=edit(model={"layers.0.attention.wq.weight": weight}))
    case("unknown field", "unexpected keyword argument 'colour'", obj=edit(config={"colour": 1}))
    case("wrong shape", "size mismatch|Missing key", obj=edit(config={"num_classes": 7}))
    case(
        "missing tensor",
        "size mismatch|Missing key",
        obj=ckpt | {"model": {k: v for k, v in ckpt["model"].items() if "wk" not in k}},
    )
    case("format alone", "holds a config and a model", obj={"format": terdit.FORMAT})
    case("zero", "patch_size=0", obj=edit(config={"patch_size": 0}))
    case("float codes", "uint8, got", obj=edit(model={"layers.1.attention.wk.weight": weight.float()}))
    case("bad config", "n_heads=3", obj=edit(config={"n_heads": 3}))
    return cases


def test_damaged_files(tmp_path):
    for name, (path, message) in damaged(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
            load_model(path)
        assert str(path) in str(e.value), name
        assert "\n" not in str(e.value)


def test_hostile_pickles_run_nothing(tmp_path):
    target = tmp_path / "hacked"
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(target)))
    torch.save(Evil(target), tmp_path / "zip.pt")
    torch.save({"format": terdit.FORMAT, "config": {}, "model": Evil(target)}, tmp_path / "ours.pt")
    for name in ("bare.pt", "zip.pt", "ours.pt"):
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path / name)
    for part in ("model_args.pth", "consolidated_ema_ternary.00-of-01.pth"):
        folder = tmp_path / part
        shutil.copytree(FOLDERS["terdit"], folder)
        os.chmod(folder / part, 0o644)
        obj = argparse.Namespace(image_size=64, evil=Evil(target)) if part == "model_args.pth" else {"x": Evil(target)}
        torch.save(obj, folder / part)
        with pytest.raises(ValueError, match=part):
            load_model(folder)
    assert not target.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)  # the trap works: it is loading that did not spring it
    assert target.exists()


def test_released_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="consolidated_ema_ternary"):
        load_model(tmp_path)
    for name in ("model_args.pth", "consolidated_ema.00-of-01.pth"):
        torch.save({"something": torch.zeros(1)} if "cons" in name else argparse.Namespace(), tmp_path / name)
    with pytest.raises(ValueError, match="not the weights of a TerDiT"):
        load_model(tmp_path)
    (tmp_path / "model_args.pth").unlink()
    with pytest.raises(FileNotFoundError, match="model_args.pth"):
        load_model(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
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
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.pt"]
