"""Training: what a step sees and changes, what a run writes, and what its settings become."""

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import terdit
import train
from terdit import SIZES, Config, DiT, GaussianDiffusion, load_model, pack_model, ternarize
from tests.helpers import model_of, read_log, run, same, save_image, save_model
from tests.helpers import short_training, weights  # noqa: F401
from train import TrainConfig


def test_digits_are_bright_on_dark_and_a_function_of_the_seed():
    x, y = train.digits(200, 16, 7)
    assert -1 <= x.min() < -0.5 and 0.8 < x.max() <= 1
    assert y.bincount(minlength=10).min() > 5 and same(train.digits(200, 16, 7), (x, y))
    assert not torch.equal(train.digits(200, 16, 8)[0], x)


def run_on(n, dropout=0.0, **settings):
    """What draw_batch needs of a run on n images of 2x2 pixels: image i has the value i."""
    values = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1, 1)
    pixels = np.broadcast_to(values, (n, 1, 3, 2, 2))
    data = train.Data(pixels, np.arange(n), torch.arange(n), mirror=False)
    model = SimpleNamespace(config=Config(num_classes=n, class_dropout_prob=dropout))
    parts = dict(data=data, settings=TrainConfig(**settings), model=model)
    return SimpleNamespace(**parts, diffusion=GaussianDiffusion())


def test_batches_are_a_function_of_seed_and_step_and_an_epoch_shows_each_image_once():
    twenty = run_on(20, batch=7, seed=5)
    labels = torch.cat([train.draw_batch(twenty, step).y for step in range(20)])  # 7 epochs
    for epoch in labels.view(7, 20):
        assert epoch.sort().values.tolist() == list(range(20))
    assert not torch.equal(labels[:20], labels[20:40])  # in another order

    batch = train.draw_batch(twenty, 3)
    values = ((batch.x0[:, 0, 1, 1] + 1) * 127.5).round().long()
    assert torch.equal(values, batch.y)  # images and labels belong together
    assert same(train.draw_batch(twenty, 3), batch)
    for other in (train.draw_batch(twenty, 4), train.draw_batch(run_on(20, batch=7, seed=6), 3)):
        for name in ("y", "t", "noise"):
            assert not torch.equal(getattr(other, name), getattr(batch, name)), name


def test_labels_are_dropped_at_their_rate():
    batch = train.draw_batch(run_on(50, dropout=0.1, batch=1000), 0)
    assert 60 < (batch.y == 50).sum() < 140  # 100 are expected, and 40 is 4 sigma
    assert (train.draw_batch(run_on(50, batch=100), 0).y < 50).all()


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
    model = DiT(Config(**SIZES["tiny"]))
    settings = TrainConfig(lr=2.0, warmup=50, steps=200, weight_decay=0.3)
    optimizer = train.make_optimizer(model, settings)
    found = {}
    for step, rate in ((0, 0.1), (100, 1.01), (199, 0.02)):  # it rises over 20 steps, 200 / 10
        assert train.set_learning_rate(optimizer, settings, step) == pytest.approx(rate, rel=0.01)
        for group in optimizer.param_groups:
            lr = group["lr"] / rate
            values = (pytest.approx(lr, rel=0.01), group["weight_decay"])
            found |= dict.fromkeys(group["params"], values)
        block = model.layers[1]
        assert found.keys() == set(model.parameters())
        for p in (block.attention.wq.weight, block.adaLN_modulation[1].weight):
            assert found[p] == (1, 0.3)
        assert found[block.attention.wq.alphas] == (0.2, 0)
        assert found[block.ffn_norm.weight] == found[block.adaLN_modulation[1].bias] == (1, 0)
        assert found[model.final_layer.linear.weight] == (1, 0)
    long = TrainConfig(lr=2.0, warmup=50, steps=5000)
    assert train.set_learning_rate(optimizer, long, 0) == pytest.approx(0.04)  # over all 50 steps


@pytest.mark.parametrize("ema_decay, want", [(0.5, [0, 0.8182, 3.2045]), (0.1, [0, 0.9, 3.69])])
def test_the_average_by_hand(ema_decay, want):
    """Its decay is (1 + n) / (10 + n) at step n, at most ema_decay, and 0 at the first step."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = torch.nn.Linear(1, 1, bias=False)
    settings = TrainConfig(ema_decay=ema_decay)
    for n in range(3):  # 9/11 of 1 is 0.8182; 3/12 of that and 9/12 of 4 are 3.2045
        model.weight.data.fill_(n**2)
        train.update_average(SimpleNamespace(settings=settings, step=n, ema=ema, model=model))
        assert ema.weight.item() == pytest.approx(want[n], abs=1e-4)


def codes_of(model):
    """One code in 17 of each ternary matrix."""
    modules = [module for module in model.modules() if isinstance(module, terdit.TernaryLinear)]
    return torch.cat([ternarize(module.weight).flatten()[::17] for module in modules])


def test_the_loss_falls_and_files_appear(tmp_path, capsys):
    torch.manual_seed(0)
    before = codes_of(DiT(Config(**SIZES["tiny"] | dict(input_size=8))))
    flags = "--steps 100 --batch 16 --grid 12 --save-every 95".split()
    state = run(tmp_path, *flags)
    names = "state-0000095.pt state-0000100.pt packed.pt log.csv lock grid-0000095.png grid.png"
    assert {path.name for path in tmp_path.iterdir()} == set(names.split())
    # 12 images of 10 classes, 12 times as large
    assert Image.open(tmp_path / "grid.png").size == (10 * 8 * 12, 2 * 8 * 12)
    shown = capsys.readouterr()
    assert "200 images of 8 pixels\nsteps 0-100 of 16 images, 16 at a time" in shown.out
    assert "step 100/100, loss 0." in shown.err

    header = "step,loss,val_loss,lr,grad_norm,images_per_s,zero,flipped"
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == header
    log = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in log] == [*range(10, 91, 10), 95, 100]
    assert np.mean([row["loss"] for row in log[-3:]]) < 0.6 * log[0]["loss"]
    assert all(row["images_per_s"] > 0 and row["grad_norm"] > 0 for row in log)
    after = codes_of(model_of(state, "model"))
    zero = (after == 0).double().mean().item()
    flipped = (after != before).double().mean().item()
    assert log[-1]["zero"] == pytest.approx(zero, rel=1e-5)
    assert 0 < log[-1]["flipped"] == pytest.approx(flipped, rel=1e-5)


def test_the_papers_own_recipe_learns(tmp_path, monkeypatch):
    """eps and its variance, uniform timesteps, no learned positions, alphas of N(0, 1)."""
    shape = dict(dim=64, n_layers=2, n_heads=2, multiple_of=64)
    monkeypatch.setitem(SIZES, "600M", SIZES["600M"] | shape)
    flags = "--size 600M --alpha-start random --steps 60 --batch 16 --lr 0.003".split()
    state = run(tmp_path, *flags)
    config = load_model(tmp_path / "packed.pt").config
    assert (config.prediction, config.learn_sigma, config.pos_embed) == ("eps", True, False)
    assert (config.qk_norm, config.adaln_norm, state["ema_decay"]) == (True, True, 0.9999)
    loss = [row["loss"] for row in read_log(tmp_path / "log.csv")]
    assert loss[0] > 0.5 and np.mean(loss[-3:]) < 0.5 * loss[0], loss
    outputs = weights(state, "model")["final_layer.linear.weight"]  # they start at 0
    eps, variance = outputs.view(4, 6, -1).split(3, dim=1)
    assert eps.abs().mean() > 0.01 and variance.abs().mean() > 0.001


def test_two_classes_end_to_end(tmp_path):
    """Black and white pictures, learned, packed and sampled: each class has its brightness."""
    for name in ("black", "white"):
        save_image(tmp_path / "data" / name / "x.png", colour=name)
    run(tmp_path / "run", "--data", tmp_path / "data", "--steps", 300, "--batch", 16)
    out = str(tmp_path / "x.npz")
    sample.main(["--ckpt", str(tmp_path / "run"), "--npz", "8", "--out", out])
    arrays = np.load(out)
    brightness = arrays["arr_0"].mean((1, 2, 3))
    assert arrays["arr_1"].tolist() == [0, 1] * 4
    assert (brightness[::2] < 30).all() and (brightness[1::2] > 225).all(), brightness


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

    # 16 images that are not learned from, each at four timesteps
    x0, y = (torch.cat([z[:16]] * 4) for z in train.digits(256, 8, 1))
    t = torch.arange(500, 64000, 1000) // 64
    noise = torch.randn(x0.shape, generator=train.generator(0, 3))
    loss = GaussianDiffusion(prediction="v").training_losses(saved, x0, t, y, noise)["loss"]
    logged = read_log(tmp_path / "log.csv")[-1]["val_loss"]
    assert logged == pytest.approx(loss.mean().item(), rel=1e-4)


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
    name = "fp32" if dtype == torch.float32 else "bf16"
    state = run(tmp_path, "--steps", 1, "--dtype", name)
    assert seen == {dtype, torch.float32}
    assert {value.dtype for value in state["tensors"].values()} == {torch.float32}


def test_gradients_are_clipped_to_a_norm_of_1(tmp_path, monkeypatch):
    batch_losses = train.batch_losses
    make_optimizer = train.make_optimizer
    norms = []

    def note(optimizer, *arguments):
        groups = optimizer.param_groups
        grads = torch.cat([p.grad.flatten() for group in groups for p in group["params"]])
        norms.append(grads.norm().item())

    def watched_optimizer(*arguments):
        optimizer = make_optimizer(*arguments)
        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", watched_optimizer)
    run(tmp_path / "small", "--steps", 1)
    monkeypatch.setattr(train, "batch_losses", lambda *arguments: 100 * batch_losses(*arguments))
    run(tmp_path / "large", "--steps", 1)
    small, large = (read_log(tmp_path / name / "log.csv")[0] for name in ("small", "large"))
    assert large["grad_norm"] == pytest.approx(100 * small["grad_norm"], rel=1e-3)
    assert norms == pytest.approx([small["grad_norm"], 1], rel=1e-3)
    assert small["grad_norm"] < 1


def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    before = run(tmp_path, "--steps", 4)["tensors"]
    forward = terdit.FeedForward.forward

    def infinite_slope(self, x):  # that of a root at 0; the loss stays as it is
        return forward(self, x) + (0 * x).sqrt()

    monkeypatch.setattr(terdit.FeedForward, "forward", infinite_slope)
    message = "step 5: loss 0.*, gradient norm nan, not finite: stopped; .* keeps what was"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--steps", 9)
    assert same(train.read_state(tmp_path)["tensors"], before)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_log_that_a_spreadsheet_saved_is_named_and_kept(tmp_path, encoding):
    run(tmp_path, "--steps", 2)
    log = tmp_path / "log.csv"
    rows = log.read_text()
    if encoding == "utf-8":
        rows = rows.replace(",", ";").replace("0.", '"0,"')
    log.write_text(rows, encoding)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="log.csv is not as train.py wrote it .* move it away"):
        run(tmp_path, "--steps", 4)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def settings_of(*flags):
    given = train.parse_args(list(flags))
    size = given.get("size", "tiny")
    return train.new_settings(given, Config(size=size, **SIZES[size]))


def test_each_size_has_its_recipe_and_the_command_the_last_word():
    # The demo, and the paper's batches and steps.
    recipes = (("tiny", 72_000, 16), ("600M", 448e6, 4), ("4.2B", 604_160_000, 4))
    for size, images, at_a_time in recipes:
        settings = settings_of("--size", size, "--device", "cpu")
        assert settings.batch * settings.steps == images
        assert settings.micro_batch == at_a_time and settings.qk_norm == (size != "tiny")
        settings = settings_of("--size", size, "--batch", "3", "--no-qk-norm", "--no-flip")
        assert (settings.batch, settings.qk_norm, settings.flip) == (3, False, False)


def test_help_shows_every_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    train_defaults = {f.name: f.default for f in fields(TrainConfig)}
    sample_defaults = vars(sample.parse_args(["--ckpt", "x"]))
    sample_defaults |= dict(ckpt=None, steps=16, sampler="dpm")
    for script, defaults in ((train, train_defaults), (sample, sample_defaults)):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        flags = re.split(r"\n  --", capsys.readouterr().out)
        for name, default in defaults.items():
            name = name.replace("_", "-")
            [told] = [text for text in flags if re.match(name + r"[ ,\n]", text)]
            assert default is None or f"default {default}" in told


@pytest.mark.parametrize("flags, code, message", [
    ("--lr nan", 2, "--lr: got nan, expected at least 0"),
    ("--seed 4294967296", 2, "--seed: got 4294967296, expected at least 0 and at most 42949"),
    ("--init x.pt --size tiny", 2, "leave out --size"),
    ("--init x.pt --alpha-start random", 2, "leave out --alpha-start"),
    ("--vae some/vae", 1, "--vae needs --data"),
    ("--image-size 26", 1, "image size 26 is not a multiple of the patch size 4"),
    ("--init full.pt", 1, "works on latents of some/vae: add --data and --vae"),
    ("--init packed.pt --image-size 16", 1, "does not fit: .* size mismatch for pos_embed"),
    ("--init packed.pt --full-precision", 1, "does not fit: .*alphas"),
    ("--init packed.pt --no-adaln-norm", 1, "does not fit: .*adaLN_modulation.2.weight"),
])
def test_refused_in_one_line_at_once(tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    save_model(Path("packed.pt"), pos_embed=True)
    save_model(Path("full.pt"), ternary=False, adaln_norm=False, vae="some/vae")
    with pytest.raises(SystemExit) as e:
        train.run_main(lambda: train.main(["--out", "run", "--steps", "1", *flags.split()]))
    line = e.value.code  # text is printed, and the system's code is 1
    if code == 2:
        assert e.value.code == 2
        line = "error: " + capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and re.search(message, line) and "\n" not in line
    assert not [path for path in tmp_path.glob("run/*") if path.name != "lock"]


def test_a_run_that_does_not_fit_into_memory_is_warned_of(tmp_path, monkeypatch, capsys):
    meminfo = tmp_path / "meminfo"
    path_of = {"/proc/meminfo": meminfo}
    monkeypatch.setattr(train, "Path", lambda *parts: path_of.get(parts[0], Path(*parts)))
    for kib, warned in ((16e6, False), (16, True)):
        meminfo.write_text(f"MemAvailable: {kib:.0f} kB\n")
        run(tmp_path / str(kib), "--steps", 1)
        shown = capsys.readouterr().out
        assert ("warning: this run takes about" in shown) == warned
        assert warned == ("GB are free; --micro-batch 1 takes less" in shown)
