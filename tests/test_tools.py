"""The commands behind the Makefile's figures and tables, in small: each runs to its end and leaves its files."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sample import run_main
from terdit import SIZES, Config, DiT, pack_model, save_checkpoint
from tests import bench_quality, bench_speed, paper, recipes
from tests.helpers import awake, save_image, short_training  # noqa: F401
from train import digits


def save_model(path, class_names=bench_quality.DIGITS):
    """A model of 8x8 pixels, in full precision if the file is full.pt."""
    ternary = path.name != "full.pt"
    shape = SIZES["tiny"] | dict(input_size=8, dim=128, num_classes=len(class_names), class_names=class_names)
    model = awake(DiT(Config(**shape | dict(ternary=ternary, adaln_norm=ternary))))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, pack_model(model) if ternary else model)


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
    monkeypatch.setattr(recipes, "digits", lambda n, size, seed: digits(100, size, seed))
    monkeypatch.setattr(paper, "MARKS", [0, 1])
    monkeypatch.setattr(paper, "MODELS", [("TerDiT-tiny", "tiny", "bf16", "2 GB")])

    def run(module, command):
        monkeypatch.setattr(sys, "argv", [module.__file__, *command.split()])
        run_main(module.main)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("part", ["fig1", "fig2", "fig4", "table1", "table2"])
def test_a_part_of_the_paper_is_made(tool, part):
    tool(paper, f"{part} --n 20")
    if part == "fig1":
        assert Path("runs/paper/fig1.png").is_file()
    else:
        rows = Path("runs/paper/results.md").read_text().splitlines()[4:]
        assert len(rows) == dict(fig2=9, fig4=24, table1=8, table2=2)[part]
        assert not any("failed" in row for row in rows)


def test_the_recipes_are_judged(tool):
    assert tool(recipes, "--quick").count("| tiny |") == 5
    assert Path("runs/recipes-quick/recipes.png").is_file()


def test_models_are_timed(tool):
    assert "step_over_dense" in tool(bench_speed, "models --size tiny --modes dense fp32 --seconds 0 --steps 1")


def test_losses_are_compared_with_the_first(tool):
    """...and the judge of digits refuses a model of cats."""
    for name in ("cat/black.png", "cat/red.png", "dog/blue.png"):
        save_image(Path("photos", name), colour=Path(name).stem)
    save_model(Path("full.pt"), ["cat", "dog"])
    save_model(Path("packed.pt"), ["cat", "dog"])
    said = tool(bench_quality, "--data photos full.pt packed.pt")
    assert (said.count("images 3"), said.count("above_the_first 0,")) == (2, 1)
    with pytest.raises(SystemExit, match="the judge knows digits"):
        tool(bench_quality, "packed.pt -n 20")
