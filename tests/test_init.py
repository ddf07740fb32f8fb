"""--init: a run starts from another model's weights."""

from functools import partial

import numpy as np
import pytest
import torch

import train
from terdit import SIZES, load_model, pack_ternary, ternarize
from tests.helpers import RELEASED, run, same, save_image, save_model
from tests.helpers import short_training  # noqa: F401

STILL = ["--steps", 1, "--lr", "1e-30"]  # what is saved is what training started from
NAMES = [str(i) for i in range(10)]


def make_full(path, **changes):
    """A full-precision checkpoint of the digits, whose outputs are not 0."""
    kind = dict(input_size=8, class_names=NAMES, ternary=False, adaln_norm=False)
    return save_model(path, seed=1, **SIZES["tiny"] | kind | changes)


@pytest.fixture
def full(tmp_path):
    return make_full(tmp_path / "full.pt")


def test_from_full_precision_to_ternary_by_hand(tmp_path, full):
    run(tmp_path / "run", "--init", full, *STILL)
    source = load_model(full)
    want = source.state_dict()
    got = load_model(tmp_path / "run/packed.pt").state_dict()
    c = source.t_embedder(torch.linspace(0, 999, 50)) + want[train.LABEL_TABLE].mean(0)
    for name in got:
        if name.endswith("alphas"):
            weight = want[name.replace("alphas", "weight")]
            assert got[name].item() == pytest.approx(weight.abs().mean().item())
            packed = got[name.replace("alphas", "weight")]
            assert torch.equal(packed, pack_ternary(ternarize(weight)))
        elif name.endswith("adaLN_modulation.2.weight"):  # its gain keeps the size of the outputs
            outputs = source.layers[int(name.split(".")[1])].adaLN_modulation(c)
            assert torch.allclose(got[name], outputs.square().mean().sqrt())
        elif got[name].dtype != torch.uint8:
            assert torch.equal(got[name], want[name]), name


def test_from_ternary_the_codes_stay_and_other_classes_get_a_new_table(tmp_path, full, capsys):
    run(tmp_path / "first", "--init", full, *STILL)
    run(tmp_path / "again", "--init", tmp_path / "first", *STILL)
    first = load_model(tmp_path / "first/packed.pt").state_dict()
    assert same(load_model(tmp_path / "again/packed.pt").state_dict(), first)
    assert "new label table" not in capsys.readouterr().out

    for name in "ab":
        save_image(tmp_path / "data" / name / "x.png")
    flags = ["--init", tmp_path / "first/packed.pt", "--data", tmp_path / "data"]
    run(tmp_path / "pets", *flags, *STILL)
    pets = load_model(tmp_path / "pets/packed.pt").state_dict()
    table = pets.pop(train.LABEL_TABLE)
    assert not torch.isin(table, first.pop(train.LABEL_TABLE)).any() and table.shape == (3, 64)
    assert same(pets, first)
    assert "first/packed.pt has 10 other classes" in capsys.readouterr().out

    (tmp_path / "first").rename(tmp_path / "moved")  # the run's own state has the weights
    assert run(tmp_path / "pets", *flags, *STILL, "--steps", 2)["step"] == 2
    note = f"note: {tmp_path}/pets goes on from its own state, --init is not read again\n"
    assert note in capsys.readouterr().out


def test_released_models_start_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", partial(load_model, n_heads=4))
    files = [["x.png", label] for label in range(10)]
    header = dict(vae="a/vae", image_size=64, latent_scale=0.18215, class_names=NAMES, files=files)
    cache = tmp_path / "cache"
    train.create_rows(cache, header | dict(source="gone"), 10, (2, 4, 8, 8), np.float16)
    np.save(cache / "status.npy", np.full(10, train.THERE, np.uint8))
    flags = ["--data", cache, "--init", RELEASED["terdit"], *STILL]
    state = run(tmp_path / "run", *flags, image_size=None)
    released = load_model(RELEASED["terdit"], n_heads=4).state_dict()
    assert same(load_model(tmp_path / "run/packed.pt").state_dict(), released)
    assert (state["image_size"], state["vae"], state["beta2"]) == (64, "a/vae", 0.999)


@pytest.mark.parametrize("size, beta2", [("tiny", 0.99), (None, 0.999)])
def test_a_checkpoint_that_names_its_size_brings_its_recipe(tmp_path, size, beta2):
    full = make_full(tmp_path / "full.pt", size=size)
    state = run(tmp_path / "run", "--init", full, *STILL)
    assert (state["beta2"], state["size"], state["config"]["size"]) == (beta2, size, size)
    with pytest.raises(SystemExit):  # argparse has said why
        train.parse_args(["--init", str(full), "--size", "tiny"])


def test_imagenets_folders_are_the_classes_of_released_models():
    folders = [f"n{10_000_000 + 7 * i}" for i in range(1000)]
    numbers = [str(i) for i in range(1000)]
    assert train.label_rows(numbers, folders) == list(range(1001))
    assert train.label_rows(sorted(numbers), folders)[207] == 121  # TerDiT's order of strings
    assert train.label_rows(numbers[1:], folders) is None
