"""The commands behind the Makefile's figures and tables, in small: each leaves its files."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from terdit import SIZES, load_model
from tests import bench_quality, bench_speed, helpers, paper, recipes
from tests.helpers import awake, save_image, short_training  # noqa: F401
from train import digits


def save_model(path, names=bench_quality.DIGITS):
    """A model of 8x8 pixels, in full precision if the file is full.pt."""
    ternary = path.name != "full.pt"
    shape = dict(input_size=8, dim=128, num_classes=len(names), class_names=names)
    shape |= dict(ternary=ternary, adaln_norm=ternary)
    helpers.save_model(path, **SIZES["tiny"] | shape)


def fake_training(command, **options):
    """In the place of subprocess.run: what train.py leaves."""
    name = "full.pt" if "--full-precision" in command else "packed.pt"
    save_model(Path(command[command.index("--out") + 1]) / name)
    return SimpleNamespace(returncode=0)


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Run a tool's main with a command line, in an empty folder -> what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "subprocess", SimpleNamespace(run=fake_training))
    monkeypatch.setattr(recipes, "subprocess", SimpleNamespace(run=fake_training))
    monkeypatch.setattr(recipes, "CLASSES", torch.arange(20) % 10)
    for module in (recipes, bench_quality):
        monkeypatch.setattr(module, "digits", lambda n, *rest: digits(min(n, 200), *rest))
    monkeypatch.setattr(paper, "DDPM", dict(sampler="ddpm", steps=2))
    monkeypatch.setattr(paper, "MARKS", [0, 1])
    monkeypatch.setattr(paper, "MODELS", [("TerDiT-tiny", "tiny", "bf16", "2 GB")])

    def run(module, command):
        monkeypatch.setattr(sys, "argv", [module.__file__, *command.split()])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("part", ["fig1", "fig2", "fig4", "table1", "table2"])
def test_a_part_of_the_paper_is_made(tool, part):
    assert "failed" not in tool(paper, f"{part} --n 20")
    assert list(Path("runs/paper").glob(f"{part}.*"))


def test_the_recipes_are_judged(tool):
    assert "| tiny | from full precision, with teacher |" in tool(recipes, "--quick")


def test_a_step_follows_the_gradient_of_the_loss_and_the_teachers_term(tool, monkeypatch):
    save_model(Path("full.pt"))
    monkeypatch.setattr(train, "batch_losses", train.batch_losses)  # is put back at the end
    runs = []
    monkeypatch.setattr(train, "train", runs.append)  # main sets up, and trains nothing
    flags = "--image-size 8 --batch 4 --micro-batch 2 --dtype fp32 --out run"
    tool(recipes, f"train --teacher full.pt {flags}")
    [run] = runs
    awake(run.model)
    batch = train.draw_batch(run, 0)
    x = run.diffusion.q_sample(batch.x0, batch.t, batch.noise)
    wanted = load_model("full.pt")(x, batch.t, batch.y)
    distill = (run.model(x, batch.t, batch.y) - wanted).square().mean()
    loss = run.diffusion.training_losses(run.model, *batch)["loss"].mean()
    gradients = torch.autograd.grad(loss + distill, list(run.model.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    stats = train.train_step(run, batch, train.Progress(4))
    assert stats.loss == pytest.approx((loss + distill).item(), rel=1e-5)
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    # Validation, of the average, knows no teacher.
    losses = run.diffusion.training_losses(run.ema, *batch)["loss"]
    assert torch.equal(train.batch_losses(run, run.ema, batch), losses)


def test_models_are_timed(tool):
    command = "models --size tiny --modes dense fp32 --seconds 0 --steps 1 --json a/b.json"
    assert "step_over_dense" in tool(bench_speed, command)
    assert "step_over_dense" in Path("a/b.json").read_text()


def test_losses_are_compared_with_the_first(tool):
    """...and the judge of digits refuses a model of cats."""
    for name in ("cat/black.png", "cat/red.png", "dog/blue.png"):
        save_image(Path("photos", name), colour=Path(name).stem)
    save_model(Path("full.pt"), ["cat", "dog"])
    save_model(Path("packed.pt"), ["cat", "dog"])
    said = tool(bench_quality, "--data photos full.pt packed.pt")
    assert (said.count("images 3"), said.count("above_the_first 0,")) == (2, 1)


@pytest.mark.parametrize("command, message", [
    ("full.pt --json photos", "photos: cannot be written"),
    ("full.pt cats/full.pt", r"cats/full.pt draws \['cat'\], the judge knows digits"),
    ("--data photos cats/full.pt", "1 of 2 images can be read; a standard error needs"),
])
def test_a_mistake_is_said_before_the_work(tool, monkeypatch, command, message):
    monkeypatch.setattr(bench_quality, "exam_of", None)
    monkeypatch.setattr(bench_quality, "held_out_losses", None)
    save_model(Path("full.pt"))
    save_model(Path("cats/full.pt"), ["cat"])
    save_image(Path("photos/cat/good.png"))
    Path("photos/cat/damaged.png").write_bytes(b"no picture")
    with pytest.raises((ValueError, OSError), match=message):
        tool(bench_quality, command)


def test_a_process_that_dies_is_said():
    with pytest.raises(OSError, match=r"\(3,\) has died \(exit code 3;"):
        bench_speed.start(os._exit, 3)("step")
