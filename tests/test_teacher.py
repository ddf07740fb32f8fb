"""--init and --teacher: a run starts from another model's weights, and learns another model's outputs."""

from functools import partial

import numpy as np
import pytest
import torch

import train
from sample import THERE, create_rows
from terdit import SIZES, Config, DiT, load_model, pack_ternary, save_checkpoint, ternarize
from tests.helpers import RELEASED, awake, read_log, run, same, save_image, short_training  # noqa: F401

STILL = ["--steps", 1, "--lr", "1e-30"]  # what is saved is what training started from
NAMES = [str(i) for i in range(10)]


def make_full(path, **changes):
    """A full-precision checkpoint of the digits, whose outputs are not 0."""
    torch.manual_seed(1)
    config = SIZES["tiny"] | dict(input_size=8, ternary=False, adaln_norm=False, class_names=NAMES) | changes
    save_checkpoint(path, awake(DiT(Config(**config))))
    return path


@pytest.fixture
def full(tmp_path):
    return make_full(tmp_path / "full.pt")


def set_up(out, *flags):
    """Everything before the first step of training -> train.Run"""
    flags = ["--image-size", 8, "--batch", 4, "--dtype", "fp32", "--out", out, *flags]
    return train.setup(train.parse_args([str(flag) for flag in flags]))


# --init ---------------------------------------------------------------------------------------------------------------


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
            assert torch.equal(got[name.replace("alphas", "weight")], pack_ternary(ternarize(weight)))
        elif name.endswith("adaLN_modulation.2.weight"):  # the paper's norm: its gain keeps the size of the outputs
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


def test_released_models_start_and_teach_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", partial(load_model, n_heads=4))
    files = [["x.png", label] for label in range(10)]
    header = dict(vae="a/vae", image_size=64, latent_scale=0.18215, class_names=NAMES, files=files)
    create_rows(tmp_path / "cache", header, 10, (2, 4, 8, 8), np.float16)
    np.save(tmp_path / "cache/status.npy", np.full(10, THERE, np.uint8))
    flags = ["--data", tmp_path / "cache", "--init", RELEASED["terdit"], "--teacher", RELEASED["large"], *STILL]
    run(tmp_path / "run", *flags, image_size=None)
    released = load_model(RELEASED["terdit"], n_heads=4).state_dict()
    assert same(load_model(tmp_path / "run/packed.pt").state_dict(), released)
    assert read_log(tmp_path / "run/log.csv")[0]["distill"] > 0


# --teacher ------------------------------------------------------------------------------------------------------------


def test_a_step_follows_the_gradient_of_loss_and_distill(tmp_path, full):
    run = set_up(tmp_path / "run", "--teacher", full, "--teacher-weight", 2.5, "--micro-batch", 2)
    awake(run.model)
    batch = train.draw_batch(run, 0)
    x = run.diffusion.q_sample(batch.x0, batch.t, batch.noise)
    distill = (run.model(x, batch.t, batch.y) - load_model(full)(x, batch.t, batch.y)).square().mean()
    loss = run.diffusion.training_losses(run.model, *batch)["loss"].mean()
    gradients = torch.autograd.grad(loss + 2.5 * distill, list(run.model.parameters()))
    stats = train.train_step(run, batch, train.Progress(4))
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.distill == pytest.approx(distill.item(), rel=1e-5)
    assert stats.grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_log_has_the_teachers_term(tmp_path, full, dtype):
    run(tmp_path / "run", "--init", full, "--teacher", full, "--full-precision", "--dtype", dtype, *STILL)
    [row] = read_log(tmp_path / "run/log.csv")
    assert 0 < row["distill"] < 1e-4 * row["loss"]  # the student is its teacher
    with pytest.raises(ValueError, match="was trained with teacher=True, this command says False"):
        set_up(tmp_path / "run", "--full-precision", *STILL)


def test_a_teachers_classes_are_put_in_our_order(tmp_path, full):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    model = load_model(full)
    model.config.class_names = [NAMES[i] for i in order]
    table = model.y_embedder.embedding_table.weight
    table[:10] = table[order]
    (tmp_path / "shuffled").mkdir()
    save_checkpoint(tmp_path / "shuffled/full.pt", model)
    teacher = set_up(tmp_path / "run", "--teacher", tmp_path / "shuffled").teacher
    assert same(teacher.state_dict(), load_model(full).state_dict())


def test_imagenets_folders_are_the_classes_of_released_models():
    folders = [f"n{10_000_000 + 7 * i}" for i in range(1000)]
    numbers = [str(i) for i in range(1000)]
    assert train.label_rows(numbers, folders) == list(range(1001))
    assert train.label_rows(sorted(numbers), folders)[207] == 121  # TerDiT's order of strings
    assert train.label_rows(numbers[1:], folders) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prediction="eps"), "has prediction='eps', the student 'v'"),
        (dict(learn_sigma=True), "has learn_sigma=True, the student False"),
        (dict(input_size=16), "has input_size=16, the student 8"),
        (dict(class_names=[*NAMES[:9], "ten"]), "has the classes .*: a teacher must know the same classes"),
    ],
)
def test_a_teacher_with_other_outputs_or_classes_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"--teacher .*/other.pt {message}"):
        set_up(tmp_path / "run", "--teacher", make_full(tmp_path / "other.pt", **changes))
