"""Training: what a step sees and changes, what a run writes, and what a command is filled in with."""

import math
import os
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import terdit
import train
from terdit import SIZES, Config, DiT, GaussianDiffusion, load_model, pack_model, save_checkpoint, ternarize
from tests.helpers import SMALL, awake, model_of, read_log, run, same, save_image, short_training  # noqa: F401
from train import TrainConfig


def test_digits_are_bright_on_dark_and_a_function_of_the_seed():
    x, y = train.digits(200, 16, 7)
    assert -1 <= x.min() < -0.5 and 0.8 < x.max() <= 1
    assert y.bincount(minlength=10).min() > 5 and same(train.digits(200, 16, 7), (x, y))
    assert not torch.equal(train.digits(200, 16, 8)[0], x)


def run_on(values, dropout=0.0, mirror=False, **settings):
    """What draw_batch needs of a run on 2x2 images: each is one value, except for a white corner at the right."""
    pixels = np.zeros((len(values), 1, 3, 2, 2), np.uint8) + np.uint8(values).reshape(-1, 1, 1, 1, 1)
    pixels[..., 0, 1] = 255
    data = train.Data(pixels, np.arange(len(values)), torch.arange(len(values)), None, mirror)
    model = SimpleNamespace(config=Config(num_classes=len(values), class_dropout_prob=dropout))
    return SimpleNamespace(data=data, settings=TrainConfig(**settings), model=model, diffusion=GaussianDiffusion())


def test_batches_are_a_function_of_seed_and_step_and_an_epoch_shows_each_image_once():
    twenty = run_on(range(20), batch=7, seed=5)
    labels = torch.cat([train.draw_batch(twenty, step).y for step in range(20)])  # 7 epochs of 20 images
    for epoch in labels.view(7, 20):
        assert epoch.sort().values.tolist() == list(range(20))
    assert not torch.equal(labels[:20], labels[20:40])  # in another order

    batch = train.draw_batch(twenty, 3)
    assert ((batch.x0[:, 0, 1, 1] + 1) * 127.5).round().long().equal(batch.y)  # images and labels belong together
    assert same(train.draw_batch(twenty, 3), batch)
    for other in (train.draw_batch(twenty, 4), train.draw_batch(run_on(range(20), batch=7, seed=6), 3)):
        for name in ("y", "t", "noise"):
            assert not torch.equal(getattr(other, name), getattr(batch, name)), name


def test_labels_are_dropped_at_their_rate_and_half_of_the_images_mirrored():
    batch = train.draw_batch(run_on([0] * 50, dropout=0.1, mirror=True, batch=1000), 0)
    assert 60 < (batch.y == 50).sum() < 140  # 100 are expected, and 40 is 4 sigma
    left, right = batch.x0[:, 0, 0].T
    assert torch.equal(left, -right)
    assert 440 < (left == 1).sum() < 560
    batch = train.draw_batch(run_on([0] * 50, batch=100), 0)
    assert (batch.y < 50).all() and (batch.x0[:, 0, 0, 1] == 1).all()


def test_timesteps_of_eps_are_uniform_and_those_of_v_tend_to_high_noise():
    quarters = [0.25, 0.5, 0.75]
    t = train.draw_timesteps(20000, GaussianDiffusion(prediction="eps"), train.generator(0))
    assert t.min() == 0 and t.max() == 999
    assert np.allclose(np.quantile(t, quarters) / 1000, quarters, atol=0.02)
    diffusion = GaussianDiffusion(prediction="v")
    t = train.draw_timesteps(20000, diffusion, train.generator(0))
    acp = diffusion.alphas_cumprod[t]
    # logSNR is N(-2, 2.5); one in twenty is uniform, which moves the quartiles a little.
    assert np.allclose(np.quantile(np.log(acp / (1 - acp)), quarters), [-3.7, -2, -0.3], atol=0.25)


def test_each_parameter_has_the_rate_and_the_decay_that_follow_by_hand():
    """The rate rises over at most a tenth of the run and falls along a cosine to 1%; decay ends at decay_until."""
    model = DiT(Config(**SIZES["tiny"]))
    block = model.layers[1]
    for steps, rising in ((200, 20), (5000, 50)):
        settings = TrainConfig(lr=2.0, warmup=50, steps=steps, weight_decay=0.3, decay_until=0.5)
        optimizer = train.make_optimizer(model, settings)
        for step in (0, rising // 2, rising, steps // 2 - 1, steps // 2, steps - 1):
            rate = train.set_learning_rate(optimizer, settings, step)
            cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
            assert rate == pytest.approx(2.0 * cosine * min(1, (step + 1) / rising))
            found = {}
            for group in optimizer.param_groups:
                assert found.keys().isdisjoint(group["params"])
                found |= dict.fromkeys(group["params"], (group["lr"], group["weight_decay"]))
            assert found.keys() == set(model.parameters())
            decay = 0.3 if step < steps // 2 else 0
            assert found[block.attention.wq.weight] == found[block.adaLN_modulation[1].weight] == (rate, decay)
            assert found[block.attention.wq.alphas] == (0.2 * rate, 0)
            for p in (block.ffn_norm.weight, block.adaLN_modulation[1].bias, model.final_layer.linear.weight):
                assert found[p] == (rate, 0)


@pytest.mark.parametrize("ema_decay", [0.5, 0.9999])
def test_the_average_by_hand(ema_decay):
    """Its decay is (1 + n) / (10 + n) at step n, at most ema_decay, so a short run forgets the weights of its start."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = torch.nn.Linear(1, 1, bias=False)
    want = 0.0
    for n in range(40):
        model.weight.data.fill_(n**2)
        train.update_average(SimpleNamespace(settings=TrainConfig(ema_decay=ema_decay), step=n, ema=ema, model=model))
        decay = min(ema_decay, (1 + n) / (10 + n)) if n else 0
        want = decay * want + (1 - decay) * n**2
        assert ema.weight.item() == pytest.approx(want, rel=1e-6)


def codes_of(model):
    """One code in 17 of each ternary matrix."""
    matrices = [module.weight for module in model.modules() if isinstance(module, terdit.TernaryLinear)]
    return torch.cat([ternarize(weight).flatten()[::17] for weight in matrices])


def test_the_loss_falls_and_files_appear(tmp_path, capsys):
    torch.manual_seed(0)
    before = codes_of(DiT(Config(**SIZES["tiny"] | dict(input_size=8))))
    state = run(tmp_path, "--steps", 100, "--batch", 16, "--grid", 12, "--save-every", 95)
    names = {"state-0000095.pt", "state-0000100.pt", "packed.pt", "log.csv", "lock", "grid-0000095.png", "grid.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Image.open(tmp_path / "grid.png").size == (10 * 8 * 12, 2 * 8 * 12)  # 12 images of 10 classes, 12 x as large
    shown = capsys.readouterr()
    assert "200 images of 8 pixels, steps 0-100 of 16 images, 16 at a time" in shown.out
    assert "step 100/100, loss 0." in shown.err

    header = "step,loss,val_loss,lr,grad_norm,images_per_s,zero,flipped,distill"
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == header
    log = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in log] == [*range(10, 91, 10), 95, 100]
    assert np.mean([row["loss"] for row in log[-3:]]) < 0.6 * log[0]["loss"]
    assert all(row["images_per_s"] > 0 and row["grad_norm"] > 0 for row in log)
    after = codes_of(model_of(state, "model"))
    assert log[-1]["zero"] == pytest.approx((after == 0).double().mean().item(), rel=1e-5)
    assert 0 < log[-1]["flipped"] == pytest.approx((after != before).double().mean().item(), rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--no-adaln-norm"], ["--full-precision"]])
def test_the_average_is_validated_and_exported(tmp_path, flags):
    state = run(tmp_path, "--steps", 4, *flags)
    averaged = model_of(state, "ema")
    trained = model_of(state, "model")
    config = averaged.config
    assert config.ternary == (flags != ["--full-precision"]) and config.adaln_norm == (not flags)
    saved = load_model(tmp_path / ("packed.pt" if config.ternary else "full.pt"))
    if config.ternary:
        averaged, trained = pack_model(averaged), pack_model(trained)
    assert saved.config == config
    assert same(dict(saved.state_dict()), dict(averaged.state_dict()))
    assert not same(dict(saved.state_dict()), dict(trained.state_dict()))

    x0, y = (z[:16] for z in train.digits(256, 8, 1))  # other images than those that are learned from
    noise = torch.randn(x0.shape, generator=train.generator(0, 3))
    diffusion = GaussianDiffusion(prediction="v")
    loss = diffusion.training_losses(saved, x0, torch.arange(16) * 1000 // 16, y, noise)["loss"].mean().item()
    assert read_log(tmp_path / "log.csv")[-1]["val_loss"] == pytest.approx(loss, rel=1e-4)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    whole = run(tmp_path / "whole", "--steps", 3, "--micro-batch", 4)["tensors"]
    parts = run(tmp_path / "parts", "--steps", 3, "--micro-batch", 3)["tensors"]
    for name, want in whole.items():
        assert torch.allclose(parts[name], want, atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_alone_are_in_bf16(tmp_path, monkeypatch, dtype):
    seen = set()
    forward = terdit.FeedForward.forward

    def forward_and_note(self, x):
        seen.update([self.w1(x).dtype, x.dtype])
        return forward(self, x)

    monkeypatch.setattr(terdit.FeedForward, "forward", forward_and_note)
    state = run(tmp_path, "--steps", 1, "--dtype", "fp32" if dtype == torch.float32 else "bf16")
    assert seen == {dtype, torch.float32}
    assert {value.dtype for value in state["tensors"].values()} == {torch.float32}


def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    before = run(tmp_path, "--steps", 4)["tensors"]
    forward = terdit.FeedForward.forward
    # The loss stays as it is, but the slope of a root is infinite at 0.
    monkeypatch.setattr(terdit.FeedForward, "forward", lambda self, x: forward(self, x) + (0 * x).sqrt())
    with pytest.raises(ValueError, match="step 5: loss 0.*, gradient norm nan, not finite: stopped; .* keeps what was"):
        run(tmp_path, "--steps", 9)
    assert same(train.read_state(tmp_path)["tensors"], before)


def settings_of(*flags):
    given = train.parse_args(list(flags))
    return train.make_settings(given, Config(**SIZES[given["size"]]), {})


def test_each_size_has_its_recipe_and_the_command_the_last_word():
    for size, images, qk_norm in (("tiny", 72_000, False), ("600M", 448e6, True), ("4.2B", 604_160_000, True)):
        settings = settings_of("--size", size)
        assert settings.batch * settings.steps == images and settings.qk_norm == qk_norm
        settings = settings_of("--size", size, "--batch", "3", "--no-qk-norm", "--no-flip")
        assert (settings.batch, settings.qk_norm, settings.flip) == (3, False, False)


def test_help_shows_every_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    train_defaults = {f.name: f.default for f in fields(TrainConfig)}
    sample_defaults = vars(sample.parse_args(["--ckpt", "x"])) | dict(ckpt=None, steps=16, sampler="dpm")
    for script, defaults in ((train, train_defaults), (sample, sample_defaults)):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        flags = re.split(r"\n  --", capsys.readouterr().out)
        for name, default in defaults.items():
            [told] = [text for text in flags if re.match(name.replace("_", "-") + r"[ ,\n]", text)]
            assert default is None or f"default {default}" in told


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--steps 0", 2, "--steps: got 0, expected at least 1"),
        ("--lr nan", 2, "--lr: got nan, expected at least 0"),
        ("--init x.pt --size tiny", 2, "leave out --size"),
        ("--vae some/vae", 2, "--vae: needs --data"),
        ("--image-size 26", 1, "image size 26 is not a multiple of the patch size 4"),
        ("--data missing", 1, "missing: no such folder"),
        ("--init missing.pt", 1, "missing.pt: no such file"),
        ("--teacher missing.pt", 1, "missing.pt: no such file"),
        ("--init full.pt", 1, "works on latents of some/vae: add --data and --vae"),
        ("--init packed.pt --image-size 16", 1, "its pos_embed is"),
        ("--init packed.pt --full-precision", 1, "its layers.0.adaLN_modulation.1.alphas is"),
        ("--init packed.pt --no-adaln-norm", 1, "its layers.0.adaLN_modulation.2.weight is"),
    ],
)
def test_refused_in_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    small = Config(**SMALL | dict(pos_embed=True))
    save_checkpoint("packed.pt", pack_model(DiT(small)))
    save_checkpoint("full.pt", DiT(replace(small, ternary=False, adaln_norm=False, vae="some/vae")))
    with pytest.raises(SystemExit) as e:
        train.run_main(lambda: train.main(["--out", "run", "--steps", "1", *flags.split()]))
    # A code that is text is printed, and the system's code is 1.
    line = e.value.code if code == 1 else f"{e.value.code} {capsys.readouterr().err.splitlines()[-1]}"
    assert line.startswith("error: " if code == 1 else "2 ")
    assert message in line and "\n" not in line
    assert not [path for path in tmp_path.glob("run/*") if path.name != "lock"]


def test_memory_by_hand_and_the_micro_batch_that_fits(tmp_path, monkeypatch):
    """20 bytes a weight (itself, gradient, two moments, average), which processes share, and on each of them a code and
    what the product takes. Of an image autograd was seen to keep 7.4 MB in a block of S; half as much may be lost."""
    for world in (1, 4):
        fixed, image = train.memory_needed(Config(**SIZES["S"]), "bf16", "cpu", world)
        assert 32.9e6 * (20 / world + 1 + 2) < fixed < 1.25 * 32.9e6 * (20 / world + 1 + 2)
        assert 12 * 7.4e6 < image < 1.5 * 12 * 7.4e6
    settings = settings_of("--size", "600M", "--device", "cpu", "--dtype", "bf16")
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(train, "Path", lambda path: tmp_path / os.path.basename(path))
    for gib, size, want in ((16, "600M", 2), (24, "600M", 4), (99, "600M", 4), (24, "tiny", 16)):  # 4: to show life
        meminfo.write_text(f"MemAvailable: {gib * 2**20} kB\n")
        assert train.choose_micro_batch(Config(**SIZES[size]), settings) == want
    meminfo.write_text(f"MemAvailable: {8 * 2**20} kB\n")
    with pytest.raises(ValueError, match=r"^this run needs 1\d\.\d GB, 8.6 GB are free: take .* --micro-batch 1 .*$"):
        train.choose_micro_batch(Config(**SIZES["600M"]), settings)
