"""--teacher: the student also learns another model's outputs, on the same noisy batch."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import train
from terdit import Config, DiT, MetaDiTConfig, MetaDiT, GaussianDiffusion, load_model, save_checkpoint
from tests.helpers import RELEASED, SMALL, awake, load_run, read_log, run, same, weights
from tests.helpers import short_training  # noqa: F401


@pytest.fixture
def full(tmp_path):
    """A full-precision checkpoint of the digits, whose outputs are not 0."""
    run(tmp_path / "full", "--steps", 1, "--full-precision")
    model = load_model(tmp_path / "full/full.pt")
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "full.pt", awake(model))
    return tmp_path / "full.pt"


# The loss -------------------------------------------------------------------------------------------------------------


def small_batch(config):
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, config.in_channels, 8, 8, generator=rng).clamp(-1, 1)
    noise = torch.randn(x0.shape, generator=rng)
    return x0, torch.tensor([0, 300, 700, 999]), torch.tensor([0, 1, 4, 5]), noise


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_distill_is_the_mean_square_between_both_outputs_on_the_same_noisy_images(learn_sigma):
    torch.manual_seed(0)
    student = awake(DiT(Config(**SMALL, learn_sigma=learn_sigma)))
    teacher = awake(DiT(Config(**SMALL, learn_sigma=learn_sigma, ternary=False, adaln_norm=False)))
    diffusion = GaussianDiffusion()
    x0, t, y, noise = small_batch(student.config)
    terms = diffusion.training_losses(student, x0, t, y, noise, teacher)
    x = diffusion.q_sample(x0, t, noise)
    want = (student(x, t, y) - teacher(x, t, y)).square().mean(dim=(1, 2, 3))
    assert torch.allclose(terms["distill"], want)
    without = diffusion.training_losses(student, x0, t, y, noise)
    assert "distill" not in without
    assert torch.equal(terms["loss"], without["loss"])
    terms["distill"].sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    if learn_sigma:  # the sigma channels are taught, too
        assert student.final_layer.linear.bias.grad.abs().min() > 0


def test_a_step_follows_the_gradient_of_loss_and_distill(tmp_path, full, monkeypatch):
    """The gradients that AdamW sees are those of loss + weight * distill, over all micro-batches."""
    monkeypatch.setattr(train, "DEMO", train.replace(train.DEMO, teacher_weight=2.5))
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def note(parameters, limit):
        parameters = list(parameters)
        seen.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    def want(run, batch, show_part=None):
        teacher = load_model(full)
        terms = run.diffusion.training_losses(run.model, *batch, teacher)
        objective = (terms["loss"] + 2.5 * terms["distill"]).mean()
        expected = torch.autograd.grad(objective, list(run.model.parameters()), retain_graph=False)
        stats = step(run, batch, show_part)
        for got, gradient in zip(seen.pop(), expected, strict=True):
            assert torch.allclose(got, gradient, rtol=1e-3, atol=1e-6)
        assert stats.distill == pytest.approx(terms["distill"].mean().item(), rel=1e-5)
        assert stats.loss == pytest.approx(terms["loss"].mean().item(), rel=1e-5)
        return stats

    step = train.train_step
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    monkeypatch.setattr(train, "train_step", want)
    run(tmp_path / "run", "--steps", 2, "--micro-batch", 2, "--teacher", full)


def test_log_has_the_teachers_term_in_a_column_of_its_own(tmp_path, full):
    run(tmp_path / "same", "--steps", 10, "--init", full, "--teacher", full, "--full-precision", "--lr", "1e-12")
    [row] = read_log(tmp_path / "same/log.csv")
    assert row["distill"] < 1e-9 < row["loss"]  # the student is its teacher
    run(tmp_path / "other", "--steps", 10, "--teacher", full)
    [row] = read_log(tmp_path / "other/log.csv")
    assert row["distill"] > 1e-3
    run(tmp_path / "none", "--steps", 10)
    assert "distill" not in read_log(tmp_path / "none/log.csv")[0]


def test_bf16_casts_the_blocks_matrices_as_autocast_would(tmp_path, full):
    cfg = train.replace(train.DEMO, teacher=str(full))
    config = load_model(full).config
    teacher, number = train.load_teacher(train.replace(cfg, dtype="bf16"), config)
    plain, same_number = train.load_teacher(train.replace(cfg, dtype="fp32"), config)
    assert number == same_number
    assert teacher.layers[0].attention.wq.weight.dtype == torch.bfloat16
    assert plain.layers[0].attention.wq.weight.dtype == torch.float32
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(*inputs), plain(*inputs))


# Resuming -------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_with_a_teacher_goes_on_to_the_same_bits(tmp_path, full):
    flags = ["--init", full, "--teacher", full]
    whole = run(tmp_path / "whole", "--steps", 4, *flags)
    train_step = train.train_step
    with pytest.MonkeyPatch.context() as patch:

        def killed_at_step_2(run, *args):
            if run.step == 2:
                raise KeyboardInterrupt
            return train_step(run, *args)

        patch.setattr(train, "train_step", killed_at_step_2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", "--steps", 4, "--save-every", 2, *flags)
    assert load_run(tmp_path / "cut")["step"] == 2
    resumed = run(tmp_path / "cut", "--steps", 4, "--save-every", 2, *flags)
    assert same(resumed["tensors"], whole["tensors"])


def test_another_teacher_is_refused_wherever_the_first_one_lies(tmp_path, full):
    run(tmp_path / "run", "--steps", 1, "--teacher", full)
    moved = full.rename(tmp_path / "moved.pt")
    assert run(tmp_path / "run", "--steps", 2, "--teacher", moved)["step"] == 2
    with pytest.raises(ValueError, match="was trained with other weights of --teacher"):
        run(tmp_path / "run", "--steps", 3)
    with pytest.raises(ValueError, match="was trained with other weights of --teacher"):
        run(tmp_path / "run", "--steps", 3, "--teacher", tmp_path / "full")


# Which teachers -------------------------------------------------------------------------------------------------------


def test_a_teacher_may_be_a_packed_file_a_run_folder_or_a_state(tmp_path):
    run(tmp_path / "source", "--steps", 1)
    by_file = run(tmp_path / "file", "--steps", 2, "--teacher", tmp_path / "source/packed.pt")
    by_folder = run(tmp_path / "folder", "--steps", 2, "--teacher", tmp_path / "source")
    by_state = run(tmp_path / "state", "--steps", 2, "--teacher", tmp_path / "source/state-0000001")
    assert same(weights(by_file, "model"), weights(by_folder, "model"))
    assert same(weights(by_file, "model"), weights(by_state, "model"))


def test_a_teacher_of_another_kind_is_refused(tmp_path, full):
    config = load_model(full).config
    for change, words in [
        (dict(prediction="eps"), "prediction='eps', the student 'v'"),
        (dict(learn_sigma=True), "learn_sigma=True, the student False"),
        (dict(input_size=16), "input_size=16, the student 8"),
    ]:
        save_checkpoint(tmp_path / "other.pt", DiT(train.replace(config, **change)))
        with pytest.raises(ValueError, match=f"--teacher .*other.pt has {words}"):
            run(tmp_path / "run", "--steps", 1, "--teacher", tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no such|not a checkpoint"):
        run(tmp_path / "run", "--steps", 1, "--teacher", __file__)


def test_a_teachers_classes_are_put_in_our_order_or_refused(tmp_path, full):
    config = load_model(full).config
    names = [str(i) for i in range(10)]
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    model = load_model(full)
    rows = model.y_embedder.embedding_table.weight.clone()
    model.y_embedder.embedding_table.weight[:10] = rows[order]
    model.config = train.replace(config, class_names=[names[i] for i in order])
    save_checkpoint(tmp_path / "shuffled.pt", model)
    straight = run(tmp_path / "a", "--steps", 2, "--teacher", full)
    shuffled = run(tmp_path / "b", "--steps", 2, "--teacher", tmp_path / "shuffled.pt")
    assert same(weights(straight, "model"), weights(shuffled, "model"))

    for other in (None, [*names[:9], "ten"]):
        model.config = train.replace(config, class_names=other)
        save_checkpoint(tmp_path / "other.pt", model)
        with pytest.raises(ValueError, match=r"has 10 classes \(.*\), --data has 10: a teacher must know the same"):
            run(tmp_path / "c", "--steps", 1, "--teacher", tmp_path / "other.pt")


def test_imagenets_folders_are_the_same_classes_under_either_name():
    folders = [f"n{10_000_000 + 7 * i}" for i in range(1000)]
    numbers = [str(i) for i in range(1000)]
    assert train.label_rows(folders, folders) == train.label_rows(numbers, folders) == list(range(1001))
    assert train.label_rows(numbers[1:], folders) is None


def test_a_teacher_of_pixels_need_not_know_a_latent_scale(full):
    teacher = load_model(full)
    config = train.replace(teacher.config, latent_scale=1.0)  # what a cache of images has
    train.match_teacher(teacher, train.DEMO, config)
    with pytest.raises(ValueError, match="different VAEs"):
        train.match_teacher(teacher, train.DEMO, train.replace(config, vae="v"))


def test_a_teacher_that_puts_out_nonsense_is_named(tmp_path, full):
    model = load_model(full)
    model.final_layer.linear.bias.fill_(float("inf"))
    save_checkpoint(tmp_path / "inf.pt", model)
    with pytest.raises(ValueError, match="do the outputs of --teacher .*inf.pt make sense"):
        run(tmp_path / "run", "--steps", 1, "--teacher", tmp_path / "inf.pt")


def latents(folder, n_classes, size=8):
    """A cache of random latents, as --vae would have left it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.standard_normal((n_classes, 2, 4, size, size)).astype(np.float16))
    np.save(folder / "labels.npy", np.arange(n_classes))
    header = dict(format=train.CACHE, image_size=8 * size, vae="v", class_names=[str(i) for i in range(n_classes)],
                  latent_scale=0.18215, source="x", files=[])  # fmt: skip
    (folder / "header.json").write_text(json.dumps(header))
    return folder


def test_large_dit_teaches(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", partial(load_model, n_heads=4))
    config = train.load_model(RELEASED["large"]).config
    cache = latents(tmp_path / "cache", config.num_classes, config.input_size)
    monkeypatch.setitem(train.SIZES, "S", dict(dim=32, n_layers=1, n_heads=2, multiple_of=16))
    flags = ["--size", "S", "--data", cache, "--steps", 10, "--teacher", RELEASED["large"]]
    run(tmp_path / "run", *flags, image_size=None)
    assert read_log(tmp_path / "run/log.csv")[0]["distill"] > 0


def test_metas_dit_teaches(tmp_path, monkeypatch):
    sizes = dict(input_size=8, dim=128, n_layers=2, n_heads=2, num_classes=5)
    torch.save(awake(MetaDiT(MetaDiTConfig(**sizes))).state_dict(), tmp_path / "dit.pt")
    monkeypatch.setattr(train, "load_model", partial(load_model, class_names=list("01234")))
    cache = latents(tmp_path / "cache", 5)
    monkeypatch.setitem(train.SIZES, "S", dict(dim=32, n_layers=1, n_heads=2, multiple_of=16))
    flags = ["--size", "S", "--data", cache, "--steps", 10, "--dtype", "bf16"]
    run(tmp_path / "run", *flags, "--teacher", tmp_path / "dit.pt", image_size=None)
    header = json.loads((cache / "header.json").read_text())
    (cache / "header.json").write_text(json.dumps(header | dict(latent_scale=0.13)))
    with pytest.raises(ValueError, match="latent_scale=0.18215, the student 0.13: their latents are of different VAEs"):
        run(tmp_path / "other", *flags, "--teacher", tmp_path / "dit.pt", image_size=None)
    assert read_log(tmp_path / "run/log.csv")[0]["distill"] > 0
    with pytest.raises(ValueError, match="Meta's DiT has other layers than ours"):
        run(tmp_path / "tuned", "--data", cache, "--steps", 1, "--init", tmp_path / "dit.pt", image_size=None)
