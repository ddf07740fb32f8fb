"""Training: the data, determinism, resume to the bit, fine-tuning, and what is refused."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import terdit
import train
from terdit import SIZES, Config, DiT, GaussianDiffusion, PackedTernaryLinear
from terdit import load_model, pack_model, ternarize, unpack_ternary
from tests.bench_faults import Faults
from tests.helpers import RELEASED, load_run, read_log, run, same, save_image, short_training, weights  # noqa: F401
from train import TrainConfig


def model_of(state, kind):
    """The DiT of a state: the one that is trained (kind "model") or the averaged one ("ema")."""
    model = DiT(Config(**state["config"]))
    model.load_state_dict(weights(state, kind))
    return model


# The digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_bright_on_dark():
    x, y = train.digits(200, 16, 7)
    assert x.shape == (200, 3, 16, 16)
    assert x.dtype == torch.float32
    assert -1 <= x.min() < -0.5
    assert 0.8 < x.max() <= 1
    assert y.dtype == torch.int64
    assert y.bincount(minlength=10).min() > 5


def test_digits_are_a_function_of_the_seed():
    x, y = train.digits(200, 16, 7)
    again_x, again_y = train.digits(200, 16, 7)
    other_x, _ = train.digits(200, 16, 8)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    assert not torch.equal(x, other_x)


# Batches --------------------------------------------------------------------------------------------------------------


def plain_data(values, labels):
    """A data set of one-coloured 2x2 images, none of them held out or mirrored."""
    pixels = np.broadcast_to(np.asarray(values, np.uint8).reshape(-1, 1, 1, 1, 1), (len(values), 1, 3, 2, 2))
    images = train.Images(pixels, np.asarray(labels), {})
    return train.Data(images, mirror=False, train_index=torch.arange(len(values)), held_out=None)


def test_each_image_is_seen_once_an_epoch():
    data = plain_data(values=range(20), labels=range(20))
    config = Config(num_classes=20, class_dropout_prob=0.0)
    cfg = TrainConfig(batch=7, seed=5)

    def draw(step):
        return train.draw_batch(data, config, cfg, GaussianDiffusion(), step)

    labels = torch.cat([draw(step).y for step in range(20)])  # 20 steps of 7 images are 7 epochs of 20
    for epoch in labels.view(7, 20):
        assert epoch.sort().values.tolist() == list(range(20))
    assert not torch.equal(labels[:20], labels[20:40])  # in another order

    batch = draw(3)
    assert ((batch.x0[:, 0, 0, 0] + 1) * 127.5).round().long().equal(batch.y)  # images and labels belong together
    assert same(draw(3), batch)


def test_labels_are_dropped_at_their_rate():
    data = plain_data(values=[0] * 1000, labels=[0] * 1000)
    config = Config(num_classes=1, class_dropout_prob=0.1)
    batch = train.draw_batch(data, config, TrainConfig(batch=1000), GaussianDiffusion(), 0)
    assert 60 < (batch.y == 1).sum() < 140  # 100 are expected, and 40 is 4 sigma


def test_half_of_the_photos_are_mirrored(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 4:] = 255  # black on the left, white on the right
    (tmp_path / "data/a").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"data/a/{i}.png")
    data = load_folder(tmp_path / "data", 8)
    batch = train.draw_batch(data, Config(**SIZES["tiny"]), TrainConfig(batch=400), GaussianDiffusion(), 0)
    left = batch.x0[:, 0, 0, 0]
    right = batch.x0[:, 0, 0, -1]
    assert torch.equal(left, -right)
    assert 0.4 < (left > 0).double().mean() < 0.6


def test_timesteps_of_eps_are_uniform():
    t = train.draw_timesteps(20000, GaussianDiffusion(prediction="eps"), train.generator(0))
    assert t.dtype == torch.int64
    assert t.min() >= 0
    assert t.max() <= 999
    assert abs(t.double().mean() - 499.5) < 10


def test_timesteps_of_v_tend_to_high_noise():
    diffusion = GaussianDiffusion(prediction="v")
    t = train.draw_timesteps(20000, diffusion, train.generator(0))
    assert t.dtype == torch.int64
    assert t.min() >= 0
    assert t.max() <= 999
    acp = diffusion.alphas_cumprod[t]
    assert abs(np.median(np.log(acp / (1 - acp))) + 2) < 0.2  # the log of signal to noise is about -2


# Folders of images ----------------------------------------------------------------------------------------------------


def load_folder(folder, size):
    return train.load_data(TrainConfig(data=str(folder), image_size=size, out=folder.parent))


@pytest.fixture
def photos(tmp_path):
    """Two classes, of every mode and format, with files that cannot be read among them."""
    apple = tmp_path / "data/apple"
    pear = tmp_path / "data/pear"
    save_image(apple / "deep.png", "I;16", colour=65535)  # 16 bits a pixel
    save_image(apple / "grey.bmp", "L", colour=128)
    save_image(apple / "palette.gif", "P")
    save_image(apple / "pixel.png", size=(1, 1), colour=(0, 0, 255))
    save_image(apple / "rgb.jpg", colour=(255, 0, 0))
    save_image(pear / "alpha.webp", "RGBA", colour=(0, 255, 0, 255))
    frame = Image.new("RGB", (9, 9))
    frame.save(pear / "moving.gif", save_all=True, append_images=[frame])
    save_image(pear / "sub/print.jpg", "CMYK")

    (pear / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (pear / "cut.jpg").write_bytes((apple / "rgb.jpg").read_bytes()[:300])
    save_image(pear / "huge.png", "1", (15000, 15000))  # Pillow takes it for a decompression bomb
    (pear / "link.png").symlink_to(pear / "gone.png")
    (pear / "notes.txt").write_text("not an image")
    return tmp_path / "data"


def test_every_format_is_read(photos):
    data = load_folder(photos, 16)
    x0, labels = data.images[data.train_index, torch.zeros(8, dtype=torch.bool)]
    assert x0.shape == (8, 3, 16, 16)
    assert data.images.header["class_names"] == ["apple", "pear"]
    assert labels.tolist() == [0] * 5 + [1] * 3
    # The apples, in the order of their names.
    deep, grey, _, pixel, rgb = ((x0.double().mean((2, 3)) + 1) * 127.5).round()[:5].tolist()
    assert deep == [255, 255, 255]
    assert grey == [128, 128, 128]
    assert pixel == [0, 0, 255]
    assert abs(rgb[0] - 254) <= 1
    assert rgb[1] <= 1


def test_images_of_folders_may_be_mirrored(photos):
    data = load_folder(photos, 16)
    assert data.mirror
    plain, _ = data.images[data.train_index, torch.zeros(8, dtype=torch.bool)]
    mirrored, _ = data.images[data.train_index, torch.ones(8, dtype=torch.bool)]
    assert torch.equal(mirrored, plain.flip(-1))


def test_files_that_cannot_be_read_are_named_and_left_out(photos, capsys):
    load_folder(photos, 16)
    shown = capsys.readouterr()
    for name in ("broken.png", "cut.jpg", "huge.png", "link.png"):
        assert f"{name}: left out" in shown.err
    assert "notes.txt" not in shown.err
    assert "8 images of 2 classes" in shown.out
    assert "4 left out" in shown.out


def test_images_are_cropped_to_the_centre(tmp_path):
    thirds = np.zeros((40, 120, 3), np.uint8)
    thirds[:, :40, 0] = 255  # red
    thirds[:, 40:80, 1] = 255  # green
    thirds[:, 80:, 2] = 255  # blue
    Image.fromarray(thirds).save(tmp_path / "wide.png")
    assert train.load_image(tmp_path / "wide.png", 10)[:, 5, 5].tolist() == [0, 255, 0]


def test_images_are_turned_upright(tmp_path):
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:16, :, 0] = 255  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation says: turn clockwise. So red belongs on the right.
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    red = train.load_image(tmp_path / "turned.png", 8)[0]
    assert red[4, 7] == 255
    assert red[4, 0] == 0


@pytest.mark.parametrize(
    "files, message",
    [
        (None, "no such folder"),
        ([], "found no subfolder"),
        (["x.png"], "found no subfolder"),
        (["a/notes.txt"], "hold no images"),
        (["a/0.png", "a/1.png"], "none of its 2 images can be read"),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path, files, message):
    folder = tmp_path / "data"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", "--steps", 1, "--data", folder)


def test_one_class_is_enough(tmp_path):
    save_image(tmp_path / "data/only/a.png")
    save_image(tmp_path / "data/only/b.png", colour=(9, 9, 9))
    state = run(tmp_path / "out", "--steps", 2, "--data", tmp_path / "data")
    assert state["config"]["class_names"] == ["only"]
    assert len(state["tensors"]["model.y_embedder.embedding_table.weight"]) == 2  # the class, and no class


def test_the_cache_of_other_photos_is_refused(tmp_path):
    for name in ("one", "two"):
        save_image(tmp_path / name / "a/1.png")
    run(tmp_path / "out", "--steps", 1, "--data", tmp_path / "one")
    with pytest.raises(ValueError, match="images-8 holds the images of .*one, not of --data .*two"):
        run(tmp_path / "out", "--steps", 1, "--data", tmp_path / "two", "--fresh")
    assert run(tmp_path / "out", "--steps", 2, "--data", tmp_path / "out/images-8")["step"] == 2


# Training -------------------------------------------------------------------------------------------------------------


def test_optimizer_has_every_parameter_once():
    model = DiT(Config(**SIZES["tiny"]))
    groups = train.make_optimizer(model, TrainConfig(decay=0.3)).param_groups
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in model.parameters())


def test_optimizer_decays_matrices_of_blocks_and_slows_alphas():
    model = DiT(Config(**SIZES["tiny"]))
    scale_and_decay = {}
    for group in train.make_optimizer(model, TrainConfig(decay=0.3)).param_groups:
        for p in group["params"]:
            scale_and_decay[p] = (group["lr_scale"], group["weight_decay"])
    block = model.layers[1]
    adaln = block.adaLN_modulation[1]
    assert scale_and_decay[block.attention.wq.alphas] == (0.2, 0)
    assert scale_and_decay[block.attention.wq.weight] == (1, 0.3)
    assert scale_and_decay[adaln.weight] == (1, 0.3)
    for p in (block.ffn_norm.weight, adaln.bias, model.pos_embed, model.final_layer.linear.weight):
        assert scale_and_decay[p] == (1, 0)


def test_the_loss_falls_and_files_appear(tmp_path, capsys):
    run(tmp_path, "--steps", 150, "--batch", 16, "--grid", 10, "--sample-every", 100)
    assert set(os.listdir(tmp_path)) == {"state-0000150", "packed.pt", "log.csv", "curve.png", "lock", "grid.png",
                                         "grid-0000100.png"}  # fmt: skip
    shown = capsys.readouterr().out
    for text in ("step 150/150", "ETA 0:00:00", "packed.pt", "grid.png"):
        assert text in shown

    log = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in log] == list(range(10, 151, 10))
    assert np.mean([row["loss"] for row in log[-3:]]) < 0.6 * log[0]["loss"]
    for row in log:
        for name in ("mse_q1", "mse_q2", "mse_q3"):
            assert row[name] > 0
    assert 0 < log[-1]["val_loss"] < 1.5
    # Codes are counted every 100 steps.
    assert 0 < log[9]["flipped"] < log[9]["zero"] < 1
    assert "flipped" not in log[8]

    config = load_model(tmp_path / "packed.pt").config
    assert config.class_names == list("0123456789")
    teraflop_an_image = train.training_flops(config) / 1e12
    for row in log:
        assert row["tflops"] == pytest.approx(row["images_per_s"] * teraflop_an_image, rel=1e-4)


def test_packed_file_is_the_averaged_model(tmp_path):
    state = run(tmp_path, "--steps", 3)
    got = dict(load_model(tmp_path / "packed.pt").state_dict())
    assert same(got, dict(pack_model(model_of(state, "ema")).state_dict()))
    assert not same(got, dict(pack_model(model_of(state, "model")).state_dict()))


@pytest.mark.parametrize("flag, file", [("--full-precision", "full.pt"), ("--no-adaln-norm", "packed.pt")])
def test_ablations_run(tmp_path, flag, file):
    config = Config(**run(tmp_path, "--steps", 2, flag)["config"])
    assert config.ternary == (flag != "--full-precision")
    assert config.adaln_norm is False
    assert load_model(tmp_path / file).config == config


def test_micro_batches_and_checkpointing_change_nothing_but_memory(tmp_path):
    whole = run(tmp_path / "whole", "--steps", 3, "--micro-batch", 4)["tensors"]
    parts = run(tmp_path / "parts", "--steps", 3, "--micro-batch", 3)["tensors"]
    again = run(tmp_path / "again", "--steps", 3, "--checkpointing")["tensors"]
    for name, want in whole.items():
        assert torch.allclose(parts[name], want, atol=1e-4), name
        assert torch.allclose(again[name], want, atol=1e-4), name


def test_a_compiler_that_fails_is_told(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert train.can_compile("cpu") is False
    assert "(no compiler): training without it" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{}, dict(ternary=False, adaln_norm=False), dict(learn_sigma=True, patch_size=2)])
def test_training_flops_are_what_torch_counts(change):
    """A forward pass as torch counts it, and twice as much for the backward pass."""
    config = Config(**SIZES["tiny"] | change)
    x = torch.randn(1, config.in_channels, config.input_size, config.input_size)
    with FlopCounterMode(display=False) as counter:
        DiT(config)(x, torch.tensor([0]), torch.tensor([0]))
    assert train.training_flops(config) == 3 * counter.get_total_flops()


def test_training_flops_by_hand():
    # The 4.2B model: 32 layers, 256 tokens, 4 matrices of 3072 x 3072 and 3 of 3072 x 8192, 2 FLOP a weight, three
    # passes. Attention, adaLN and the embeddings are what is left.
    matmuls = 3 * 32 * 256 * 2 * (4 * 3072**2 + 3 * 3072 * 8192)
    assert matmuls < train.training_flops(Config(**SIZES["4.2B"])) < 1.05 * matmuls


# Resume ---------------------------------------------------------------------------------------------------------------


def test_resume_is_exact(tmp_path, monkeypatch):
    """12 steps = 7 steps, a stop by signal, and 5 more: the same bits everywhere, log.csv included."""
    whole = run(tmp_path / "whole", "--steps", 12)
    update = train.AveragedModel.update_parameters
    steps_done = 0

    def send_sigterm_at_step_6(*args):
        nonlocal steps_done
        steps_done += 1
        if steps_done == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        update(*args)

    monkeypatch.setattr(train.AveragedModel, "update_parameters", send_sigterm_at_step_6)
    with pytest.raises(SystemExit) as e:
        run(tmp_path / "halves", "--steps", 12)
    assert e.value.code == 128 + signal.SIGTERM
    assert load_run(tmp_path / "halves")["step"] == 7  # one step after the signal

    halves = run(tmp_path / "halves", "--steps", 12)
    for key in ("step", "config", "tensors"):
        assert same(whole[key], halves[key]), key
    whole_log = read_log(tmp_path / "whole/log.csv")
    halves_log = read_log(tmp_path / "halves/log.csv")
    # Not the loss: it is a mean of the steps since the row before, or since the resume.
    for key in ("step", "grad_norm", "lr", "val_loss"):
        assert [row.get(key) for row in halves_log] == [row.get(key) for row in whole_log]


def test_another_seed_trains_another_model(tmp_path):
    one = run(tmp_path / "one", "--steps", 2)
    other = run(tmp_path / "other", "--steps", 2, "--seed", 1)
    assert not same(weights(one, "model"), weights(other, "model"))


def test_killed_runs_go_on_exactly(tmp_path):
    """SIGKILL at random moments leaves whole states. The same command then ends as if nothing had happened."""
    faults = Faults(tmp_path, steps=24)
    results = [faults.run(seed=i) for i in range(3)]
    assert all(r["identical"] for r in results), results
    assert sum(r["kills"] for r in results) > 0


def test_the_last_two_states_are_kept(tmp_path):
    run(tmp_path, "--steps", 9, "--save-every", 2)
    assert [path.name for path in train.states(tmp_path)] == ["state-0000008", "state-0000009"]


def test_log_reads_as_one_run(tmp_path):
    """A run that goes on from step 10 writes the rows after it anew."""
    run(tmp_path, "--steps", 20, "--save-every", 10)
    shutil.rmtree(tmp_path / "state-0000020")
    run(tmp_path, "--steps", 20, "--save-every", 10)
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [10, 20]


@pytest.mark.parametrize(
    "flags, field",
    [
        ("--no-adaln-norm", "adaln_norm"),
        ("--full-precision", "ternary"),
        ("--seed 1", "seed"),
        ("--batch 8", "batch"),
        ("--lr 1e-5", "lr"),
        ("--image-size 12", "input_size"),
    ],
)
def test_resume_with_other_flags_is_refused(tmp_path, flags, field):
    run(tmp_path, "--steps", 2)
    with pytest.raises(ValueError, match=f"was trained with {field}="):
        run(tmp_path, "--steps", 3, *flags.split())


def test_fresh_starts_over(tmp_path):
    run(tmp_path, "--steps", 2)
    state = run(tmp_path, "--steps", 3, "--seed", 1, "--fresh")
    assert state["step"] == 3
    assert state["seed"] == 1
    assert len(train.states(tmp_path)) == 1


def test_a_run_can_be_made_longer_but_not_shorter(tmp_path):
    run(tmp_path, "--steps", 3)
    assert run(tmp_path, "--steps", 5)["step"] == 5
    with pytest.raises(ValueError, match="at step 5 already, --steps says 4"):
        run(tmp_path, "--steps", 4)


@pytest.fixture
def two_states(tmp_path):
    """A run folder with the states of steps 1 and 2."""
    run(tmp_path, "--steps", 2, "--save-every", 1)
    return tmp_path


def test_a_damaged_run_json_is_refused(two_states):
    file = two_states / "state-0000002/run.json"
    text = file.read_text()
    damaged_texts = {
        "{}": "damaged",
        text[:50]: "damaged",
        text.replace(train.STATE, "x"): "format='x'",
        text.replace('"dim": 64', '"dim": 32'): "dim=32, this command says 64",
    }
    for damaged, message in damaged_texts.items():
        file.write_text(damaged)
        with pytest.raises(ValueError, match=f"state-0000002.*{message}"):
            run(two_states, "--steps", 3)


def test_a_damaged_state_is_refused_and_may_be_deleted(two_states):
    state = two_states / "state-0000002"
    tensors = next(state.glob("*.distcp"))
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="state-0000002: damaged .*; delete it to go on from the one before"):
        run(two_states, "--steps", 3)
    shutil.rmtree(state)
    assert run(two_states, "--steps", 3)["step"] == 3


def test_another_version_of_torch_is_told(two_states, capsys):
    file = two_states / "state-0000002/run.json"
    file.write_text(file.read_text().replace(f'"torch": "{torch.__version__}', '"torch": "2.6.0'))
    run(two_states, "--steps", 3)
    assert "by torch 2.6.0" in capsys.readouterr().out


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full_at", ["tensors", "run.json"])
def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch, full_at):
    run(tmp_path, "--steps", 2)
    before = load_run(tmp_path)["tensors"]
    atomic_write = train.atomic_write

    def no_space_for_run_json(path, write):
        if path.name == "run.json":
            no_space()
        atomic_write(path, write)

    if full_at == "tensors":
        monkeypatch.setattr(torch, "save", no_space)
    else:
        monkeypatch.setattr(train, "atomic_write", no_space_for_run_json)
    with pytest.raises(OSError, match="state-0000004: cannot be written .*No space left.*state-0000002 is whole"):
        run(tmp_path, "--steps", 4)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-0000002"]
    assert same(load_run(tmp_path)["tensors"], before)


def infinite(out):
    return out * float("inf")


def without_gradient(out):
    return out + (0 * out).sqrt()  # the same values, but the slope of the root is infinite at 0


@pytest.mark.parametrize(
    "change, message",
    [
        (infinite, r"step 4: loss nan, gradient norm nan, not finite: stopped"),
        (without_gradient, r"step 4: loss \d\.\d+, gradient norm nan, not finite: stopped"),
    ],
)
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, change, message):
    run(tmp_path, "--steps", 4)
    before = load_run(tmp_path)["tensors"]
    forward = terdit.FeedForward.forward
    monkeypatch.setattr(terdit.FeedForward, "forward", lambda self, x: change(forward(self, x)))
    with pytest.raises(ValueError, match=message + r"; .*state-0000004 holds the last good state"):
        run(tmp_path, "--steps", 9)
    assert same(load_run(tmp_path)["tensors"], before)


# Fine-tuning (--init) -------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """The run folder of a ternary model that was trained for three steps."""
    run(tmp_path / "source", "--steps", 3)
    return tmp_path / "source"


def build_from(path):
    config, state = train.read_init(path)
    return train.build_model(config, state)


@pytest.mark.parametrize("name", ["packed.pt", "state-0000003"])
def test_init_keeps_codes_and_alphas(source, name):
    got = pack_model(build_from(source / name))
    want = load_model(source / "packed.pt")
    assert same(dict(got.state_dict()), dict(want.state_dict()))


def test_init_from_full_precision_starts_alphas_at_mean_abs(tmp_path):
    run(tmp_path, "--steps", 3, "--full-precision")
    config, state = train.read_init(tmp_path / "full.pt")
    model = train.build_model(replace(config, ternary=True), state)
    wq = model.layers[0].attention.wq
    assert wq.alphas.item() == pytest.approx(wq.weight.abs().mean().item())


def test_init_latents_of_a_released_model_round_to_its_codes():
    model = load_model(RELEASED["terdit"], n_heads=4)
    _, state = train.read_init(RELEASED["terdit"])
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            latents = state[f"{name}.weight"]
            assert torch.equal(ternarize(latents).to(torch.int8), unpack_ternary(module.weight)), name


def test_fine_tuning_to_other_classes_makes_a_new_label_table(source, tmp_path, capsys):
    for name in ("cat", "dog"):
        save_image(tmp_path / f"data/{name}/x.png")
    flags = ["--lr", 1e-9, "--data", tmp_path / "data"]
    init = ["--init", source / "packed.pt"]
    state = run(tmp_path / "tuned", "--steps", 1, *flags, *init)
    assert "new label table" in capsys.readouterr().out
    assert state["config"]["class_names"] == ["cat", "dog"]

    before = load_model(source / "packed.pt").state_dict()
    after = load_model(tmp_path / "tuned/packed.pt").state_dict()
    table = "y_embedder.embedding_table.weight"
    assert len(before.pop(table)) == 11
    assert len(after.pop(table)) == 3
    assert before.keys() == after.keys()
    for name in before:
        assert torch.allclose(before[name].float(), after[name].float(), atol=1e-6), name

    assert run(tmp_path / "tuned", "--steps", 2, *flags, *init)["step"] == 2  # the same command goes on
    with pytest.raises(ValueError, match="was trained with other weights of --init"):
        run(tmp_path / "tuned", "--steps", 3, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init", RELEASED["terdit"]], "works on 4 channels, latents of"),
        (["--init", "missing.pt"], "no such file"),
        (["--init", "packed.pt", "--no-adaln-norm"], "has an RMS Norm after adaLN"),
        (["--init", "packed.pt", "--full-precision"], "is ternary: it cannot be trained on with --full-precision"),
        (["--init", "packed.pt", "--qk-norm"], "was trained with qk_norm=False"),
        (["--init", "packed.pt", "--image-size", "16"], "learned positions for images of 8x8"),
        (["--init", "packed.pt", "--size", "tiny"], "leave out --size"),
    ],
)
def test_init_refuses(source, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "out", "--steps", 1, *flags)
