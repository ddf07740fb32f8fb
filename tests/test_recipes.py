"""The study of recipes: that each recipe changes what its title says, and that the table says what was measured."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import terdit
import train
from terdit import Config, DiT, TernaryLinear, pack_model
from tests import recipes
from tests.helpers import SMALL, awake
from tests.helpers import short_training  # noqa: F401


@pytest.fixture(autouse=True)
def undo(monkeypatch):
    """Take back what a recipe changes."""
    settings = ["DEMO", "FINE_TUNE"]
    functions = ["learning_rate", "make_optimizer", "build_model", "set_learning_rate", "train_step"]
    for name in (*settings, *functions):
        monkeypatch.setattr(train, name, getattr(train, name))
    for name in ("FastTernaryLinear", "FastPackedTernaryLinear"):
        monkeypatch.setattr(terdit, name, getattr(terdit, name))
    yield
    recipes.RAMP.fill_(1)


# Recipes --------------------------------------------------------------------------------------------------------------


def test_every_flag_exists_and_no_name_is_twice():
    for study in recipes.STUDIES.values():
        assert study[0].name == recipes.FULL and "--full-precision" in study[0].flags
        names = [recipe.name for recipe in study]
        assert len(set(names)) == len(names)
        for recipe in study:
            train.parse_args(recipe.flags.split())


def test_rates():
    cfg = train.replace(train.DEMO, steps=1000, warmup=10, lr=1.0)
    recipes.constant_rate()
    assert [train.learning_rate(cfg, step) for step in (0, 9, 500, 999)] == [0.1, 1, 1, 1]
    recipes.two_stage_rate()
    rates = [train.learning_rate(cfg, step) for step in (250, 499, 500, 750)]
    assert rates == pytest.approx([0.75, 0.501, 1 / 3, 1 / 6])


def test_alphas():
    recipes.alphas_at_full_rate()
    torch.manual_seed(0)
    model = train.build_model(Config(**SMALL))
    groups = train.make_optimizer(model, train.DEMO).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0}
    recipes.alphas_from_normal()
    alphas = [p.item() for name, p in train.build_model(Config(**SMALL)).named_parameters() if name.endswith("alphas")]
    assert min(alphas) < -0.5 and max(alphas) > 0.5


@torch.no_grad()
def test_a_scale_for_every_channel_is_packed_too():
    recipes.scale_per_channel()
    torch.manual_seed(0)
    model = awake(DiT(Config(**SMALL)))
    assert model.layers[0].attention.wq.alphas.shape == (32, 1)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5]))
    assert torch.allclose(pack_model(model)(*inputs), model(*inputs), atol=1e-5)


def test_ramp_goes_from_full_precision_to_ternary():
    recipes.ramp()
    layer = recipes.RampedTernaryLinear(8, 4)
    x = torch.randn(3, 8)
    cfg = train.replace(train.DEMO, steps=1000)
    optimizer = train.make_optimizer(DiT(Config(**SMALL)), cfg)
    train.set_learning_rate(optimizer, cfg, 0)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    train.set_learning_rate(optimizer, cfg, 25)
    half = layer(x)
    train.set_learning_rate(optimizer, cfg, 50)
    ternary = TernaryLinear.forward(layer, x)
    assert torch.allclose(layer(x), ternary, atol=1e-6)
    assert torch.allclose(half, (F.linear(x, layer.weight) + ternary) / 2, atol=1e-6)


def test_the_teacher_fades(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train_step", lambda run, batch, show_part: seen.append(run.cfg.teacher_weight))
    recipes.fading_teacher()
    cfg = train.replace(train.DEMO, steps=4)
    for step in range(4):
        run = type("Run", (), dict(cfg=cfg, step=step))
        train.train_step(run, None)
    assert seen == [2, 1.5, 1, 0.5]
    assert cfg.teacher_weight == train.DEMO.teacher_weight  # as before, for the state's metadata


# The judge and the table ----------------------------------------------------------------------------------------------


def test_held_out_losses_are_paired(monkeypatch):
    """The same model has the same loss on each digit, whatever was drawn before; another one has another."""
    monkeypatch.setattr(recipes, "N_HELD_OUT", 64)
    torch.manual_seed(0)
    config = train.replace(Config(**terdit.SIZES["tiny"]), input_size=8)
    model = awake(DiT(config))
    losses = recipes.held_out_losses(model)
    torch.manual_seed(7)
    assert losses.shape == (64,) and np.array_equal(losses, recipes.held_out_losses(model))
    other = recipes.held_out_losses(awake(DiT(config)))
    assert not np.allclose(losses, other)


def test_the_gap_is_that_of_the_same_seeds_and_has_their_error(tmp_path):
    args = Namespace(out=tmp_path, seeds=[0, 1, 2], divisor=1, against=recipes.FULL)
    reference, scratch, *_ = recipes.STUDIES["tiny"]
    rng = np.random.default_rng(0)
    for seed, gap in ((0, 0.01), (1, 0.02), (2, 0.06)):
        base = rng.uniform(0, 1, 100)
        for recipe, losses in ((reference, base), (scratch, base + gap + rng.normal(0, 1e-3, 100))):
            folder = recipes.folder_of(args, "tiny", recipe, seed)
            folder.mkdir(parents=True)
            np.savez(folder / recipes.RESULTS, losses=losses)
    gap = recipes.gap_of(args, "tiny", scratch)
    assert gap.of_seeds == pytest.approx([0.01, 0.02, 0.06], abs=3e-4)
    assert gap.mean == pytest.approx(0.03, abs=3e-4)
    assert gap.error == pytest.approx(np.std([0.01, 0.02, 0.06], ddof=1) / 3**0.5, rel=0.02)
    assert gap.percent == pytest.approx(100 * gap.mean / (gap.loss - gap.mean))
    args.seeds = [1]
    single = recipes.gap_of(args, "tiny", scratch)
    assert single.error == pytest.approx(1e-4, rel=0.3)  # over 100 digits, whose own spread cancels
    args.against = scratch.name
    assert recipes.gap_of(args, "tiny", reference).mean == pytest.approx(-0.02, abs=3e-4)
    args.seeds = [5]
    assert recipes.gap_of(args, "tiny", scratch) is None


def test_steps_of_all_models():
    by_name = {recipe.name: recipe for recipe in recipes.STUDIES["tiny"]}
    assert recipes.total_steps(by_name["scratch-1500"], "tiny") == 1500
    assert recipes.total_steps(by_name["init-1500"], "tiny") == 4500 + 1500
    assert recipes.total_steps(by_name["both-1500"], "tiny") == 4500 + 1500 + 500


def test_a_study_from_training_to_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "N_HELD_OUT", 32)
    monkeypatch.setattr(recipes, "N_SAMPLES", 10)
    monkeypatch.setattr(recipes, "toy_fid", lambda path: len(np.load(path)["samples"]))  # the judge takes a minute
    monkeypatch.setattr(train, "can_compile", lambda device: False)
    for name in (recipes.FULL, "both-1500", "scratch-1500"):
        monkeypatch.setattr("sys.argv", f"recipes.py --one tiny {name} 0 --divisor 150".split())
        recipes.main()
    monkeypatch.setattr("sys.argv", "recipes.py --table --seeds 0 --sizes tiny --divisor 150".split())
    recipes.main()
    table = (tmp_path / "runs/recipes/recipes.md").read_text()
    assert "from full precision, with teacher | 10 | 43" in table and "raw weights" in table
    assert (tmp_path / "runs/recipes/recipes.png").is_file()
    assert not list((tmp_path / "runs/recipes/tiny").glob("*/state-*"))
