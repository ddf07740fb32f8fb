"""Training: the data, determinism, resume to the bit, fine-tuning, and what is refused."""

import csv
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import torch.distributed.checkpoint as dcp

import terdit
import train
from terdit import SIZES, Config, DiT, GaussianDiffusion, PackedTernaryLinear, load_model, pack_model
from terdit import ternarize, unpack_ternary

from tests.test_golden import FOLDERS

FAST = ["--batch", "4", "--grid", "0", "--dtype", "fp32", "--image-size", "8"]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """A small model and data set, so that runs take a second; and the test runner keeps its own signal handlers."""
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | dict(dim=64, n_layers=2, n_heads=2))
    digits = train.digits
    monkeypatch.setattr(train, "digits", lambda n, size, seed: digits(200, size, seed))
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def load(folder):
    """The newest state of a run folder: run.json's entries, and `tensors`."""
    path = train.states(folder)[-1]
    index = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in index.items()}
    train.load_tensors(path, tensors)
    return json.loads((path / "run.json").read_text()) | {"tensors": tensors}


def part(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state["tensors"].items() if k.startswith(prefix)}


def run(out, *flags):
    train.main([*FAST, "--out", str(out), *map(str, flags)])
    return load(out)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def rows(path):
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


# Data


def test_digits():
    x, y = train.digits(300, 16, 7)
    assert x.shape == (200, 3, 16, 16) and x.dtype == torch.float32 and y.dtype == torch.int64  # 200: see few_digits
    assert -1 <= x.min() < -0.5 and 0.8 < x.max() <= 1
    again, other = train.digits(300, 16, 7), train.digits(300, 16, 8)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    assert y.bincount(minlength=10).min() > 5


def test_batches_are_epochs():
    args = train.parse_args(["--batch", "7", "--seed", "5"])
    args.batch = 7
    images = np.tile(np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1, 1), (1, 1, 3, 2, 2))
    data = train.Images(images, np.arange(20), {}), False, torch.arange(20), None
    config, diffusion = Config(num_classes=20, class_dropout_prob=0.0), GaussianDiffusion()
    labels = torch.cat([train.draw_batch(data, config, args, diffusion, step)[2] for step in range(20)])
    for epoch in labels.view(7, 20):
        assert epoch.sort().values.tolist() == list(range(20))  # each image once an epoch
    assert not torch.equal(labels[:20], labels[20:40])
    x0, t, y, noise = train.draw_batch(data, config, args, diffusion, 3)
    assert all(map(torch.equal, (x0, t, y, noise), train.draw_batch(data, config, args, diffusion, 3)))
    assert ((x0[:, 0, 0, 0] + 1) * 127.5).round().long().equal(y)


def test_labels_are_dropped_at_their_rate():
    images, args = (
        train.Images(np.zeros((1000, 1, 3, 2, 2), np.uint8), np.zeros(1000, np.int64), {}),
        train.parse_args([]),
    )
    args.batch = 1000
    data = images, False, torch.arange(1000), None
    _, _, y, _ = train.draw_batch(data, Config(num_classes=1, class_dropout_prob=0.1), args, GaussianDiffusion(), 0)
    assert 60 < (y == 1).sum() < 140  # 4 sigma around 100


def test_optimizer_has_every_parameter_once():
    model = DiT(Config(**SIZES["tiny"]))
    groups = train.make_optimizer(model, 1e-3, (0.9, 0.99), 0.3).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    kind = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    block = model.layers[1]
    assert kind[id(block.attention.wq.alphas)] == (0.2, 0)
    assert kind[id(block.attention.wq.weight)] == kind[id(block.adaLN_modulation[1].weight)] == (1, 0.3)
    for p in (block.ffn_norm.weight, block.adaLN_modulation[1].bias, model.pos_embed, model.final_layer.linear.weight):
        assert kind[id(p)] == (1, 0)


def test_timesteps():
    for prediction in ("eps", "v"):
        d = GaussianDiffusion(prediction=prediction)
        t = train.draw_timesteps(20000, d, train.generator(0))
        assert t.min() >= 0 and t.max() <= 999 and t.dtype == torch.int64
        log_snr = np.log(d.alphas_cumprod / (1 - d.alphas_cumprod))[t]
        if prediction == "eps":
            assert abs(t.double().mean() - 499.5) < 10
        else:
            assert abs(np.median(log_snr) + 2) < 0.2


def save_image(path, mode="RGB", size=(20, 30), colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def load_folder(folder, size):
    args = train.parse_args(["--data", str(folder), "--image-size", str(size)])
    args.out = folder.parent
    return train.load_data(args)


def test_image_folder(tmp_path, capsys):
    """Every mode and format; broken files are named and left out; classes are the folders' names."""
    tmp_path = tmp_path / "data"
    a, b = tmp_path / "apple", tmp_path / "pear"
    save_image(a / "rgb.jpg", colour=(255, 0, 0))
    save_image(a / "deep.png", "I;16", colour=65535)
    save_image(a / "grey.bmp", "L", colour=128)
    save_image(a / "palette.gif", "P")
    save_image(a / "pixel.png", size=(1, 1), colour=(0, 0, 255))
    save_image(b / "sub/print.jpg", "CMYK")
    save_image(b / "alpha.webp", "RGBA", colour=(0, 255, 0, 255))
    Image.new("RGB", (9, 9)).save(b / "moving.gif", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    (b / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (b / "cut.jpg").write_bytes((a / "rgb.jpg").read_bytes()[:300])
    (b / "notes.txt").write_text("not an image")
    save_image(b / "huge.png", "1", (15000, 15000))  # a decompression bomb, to Pillow
    (b / "link.png").symlink_to(b / "gone.png")
    images, mirror, index, _ = load_folder(tmp_path, 16)
    x0, labels = images[index, torch.zeros(8, dtype=torch.bool)]
    assert images.header["class_names"] == ["apple", "pear"] and labels.tolist() == [0] * 5 + [1] * 3 and mirror
    assert x0.shape == (8, 3, 16, 16) and torch.equal(images[index, torch.ones(8, dtype=torch.bool)][0], x0.flip(-1))
    shown = capsys.readouterr()
    assert all(f"{name}: left out" in shown.err for name in ("broken.png", "cut.jpg", "huge.png", "link.png"))
    assert "notes.txt" not in shown.err and "8 images of 2 classes" in shown.out and "4 left out" in shown.out
    means = {
        f: ((x0[i].double().mean((1, 2)) + 1) * 127.5).round().tolist()
        for i, f in enumerate(["deep", "grey", "palette", "pixel", "rgb"])
    }
    assert means["deep"] == [255] * 3 and means["grey"] == [128] * 3 and means["pixel"] == [0, 0, 255]
    assert abs(means["rgb"][0] - 254) <= 1 and means["rgb"][1] <= 1


def test_crop_and_orientation(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, :40, 0], wide[:, 40:80, 1], wide[:, 80:, 2] = 255, 255, 255  # red, green, blue thirds: the centre is green
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert train.load_image(tmp_path / "wide.png", 10)[:, 5, 5].tolist() == [0, 255, 0]
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:16, :, 0] = 255  # red above; orientation 6 says: turn clockwise, so red belongs on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    x = train.load_image(tmp_path / "turned.png", 8)
    assert x[0, 4, 7] == 255 and x[0, 4, 0] == 0


@pytest.mark.parametrize("kind, message", [("missing", "no such folder"), ("empty", "found no subfolder"),
                                           ("flat", "found no subfolder"), ("hollow", "hold no images"),
                                           ("broken", "none of its 2 images can be read")])  # fmt: skip
def test_bad_folders(tmp_path, kind, message):
    folder = tmp_path / "data"
    if kind != "missing":
        folder.mkdir()
    if kind == "flat":
        save_image(folder / "x.png")
    if kind in ("hollow", "broken"):
        (folder / "a").mkdir()
    if kind == "broken":
        [(folder / f"a/{i}.png").write_bytes(b"no") for i in range(2)]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", "--steps", 1, "--data", folder)


# Training


def test_loss_falls_and_files_appear(tmp_path, capsys):
    run(tmp_path, "--steps", 150, "--batch", 16, "--grid", 10, "--sample-every", 100)
    assert {"state-0000150", "packed.pt", "log.csv", "grid.png", "grid-0000100.png"} == set(os.listdir(tmp_path))
    log = rows(tmp_path / "log.csv")
    assert [r["step"] for r in log] == list(range(10, 151, 10))
    assert np.mean([r["loss"] for r in log[-3:]]) < 0.6 * log[0]["loss"]
    assert 0 < log[9]["flipped"] < log[9]["zero"] < 1 and "flipped" not in log[8]
    assert 0 < log[-1]["val_loss"] < 1.5 and all(r[f"mse_q{i}"] > 0 for r in log for i in (1, 2, 3))
    config = load_model(tmp_path / "packed.pt").config
    assert config.class_names == list("0123456789")
    work = train.flops_an_image(config) / 1e12
    assert all(r["tflops"] == pytest.approx(r["images_per_s"] * work, rel=1e-4) for r in log)
    shown = capsys.readouterr().out
    assert "step 150/150" in shown and "ETA 0:00:00" in shown and "packed.pt" in shown and "grid.png" in shown


def test_packed_file_is_the_averaged_model(tmp_path):
    state = run(tmp_path, "--steps", 3)
    model = DiT(Config(**state["config"]))
    model.load_state_dict(part(state, "ema."))
    want, got = pack_model(model).state_dict(), load_model(tmp_path / "packed.pt").state_dict()
    assert same(dict(want), dict(got))
    assert not same(dict(got), dict(pack_model(_load(state)).state_dict()))  # and not the raw one


def _load(state):
    model = DiT(Config(**state["config"]))
    model.load_state_dict(part(state, "model."))
    return model


def test_resume_is_exact(tmp_path, monkeypatch):
    """12 steps = 7 steps, a stop by signal, and 5 more: the same bits everywhere, log.csv included."""
    whole = run(tmp_path / "whole", "--steps", 12)
    update, calls = train.AveragedModel.update_parameters, []

    def stop_at_7(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        update(*args)

    monkeypatch.setattr(train.AveragedModel, "update_parameters", stop_at_7)
    with pytest.raises(SystemExit) as e:
        run(tmp_path / "halves", "--steps", 12)
    assert e.value.code == 128 + signal.SIGTERM
    assert load(tmp_path / "halves")["step"] == 7  # one step after the signal
    halves = run(tmp_path / "halves", "--steps", 12)
    for key in ("step", "config", "tensors"):
        assert same(whole[key], halves[key]), key
    # The loss is a mean of the steps since the row before, or since the resume.
    log = [rows(tmp_path / d / "log.csv") for d in ("whole", "halves")]
    for key in ("step", "grad_norm", "lr", "val_loss"):
        assert [r.get(key) for r in log[0]] == [r.get(key) for r in log[1]]
    assert not same(part(whole, "model."), part(run(tmp_path / "other", "--steps", 12, "--seed", 1), "model."))


def test_killed_runs_go_on_exactly(tmp_path):
    """SIGKILL at random moments: what is left are whole states, and the same command ends as if nothing had happened."""
    from tests.bench_faults import Faults

    faults = Faults(tmp_path, steps=24)
    results = [faults.run(seed=i) for i in range(3)]
    assert all(r["identical"] for r in results) and sum(r["kills"] for r in results) > 0, results


def test_resume_refuses_another_run(tmp_path):
    run(tmp_path, "--steps", 2)
    for flags, field in ((["--no-adaln-norm"], "adaln_norm"), (["--full-precision"], "ternary"), (["--seed", 1], "seed"),
                         (["--batch", 8], "batch"), (["--lr", 1e-5], "lr"), (["--image-size", 12], "input_size")):  # fmt: skip
        with pytest.raises(ValueError, match=f"was trained with {field}="):
            run(tmp_path, "--steps", 3, *flags)
    state = run(tmp_path, "--steps", 3, "--seed", 1, "--fresh")
    assert state["step"] == 3 and state["seed"] == 1 and len(train.states(tmp_path)) == 1
    assert run(tmp_path, "--steps", 5, "--seed", 1)["step"] == 5  # a longer plan is a way to go on
    with pytest.raises(ValueError, match="at step 5 already, --steps says 4"):
        run(tmp_path, "--steps", 4, "--seed", 1)


def test_states_kept(tmp_path):
    run(tmp_path, "--steps", 9, "--save-every", 2, "--keep-every", 3)
    assert [s.name for s in train.states(tmp_path)] == [f"state-{i:07d}" for i in (3, 6, 8, 9)]


def test_damaged_state_is_refused(tmp_path, capsys):
    run(tmp_path, "--steps", 2, "--save-every", 1)
    state = train.states(tmp_path)[-1]
    about = (state / "run.json").read_text()
    for text, message in (
        ("{}", "damaged"),
        (about.replace(train.STATE, "x"), "format='x'"),
        (about[:50], "damaged"),
        (about.replace('"tiny"', '"S"').replace('"dim": 64', '"dim": 32'), "dim=32, this command says 64"),
    ):
        (state / "run.json").write_text(text)
        with pytest.raises(ValueError, match=f"state-0000002.*{message}"):
            run(tmp_path, "--steps", 3)
    (state / "run.json").write_text(about.replace(f'"torch": "{torch.__version__}', '"torch": "2.6.0'))
    data = next(state.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="state-0000002: damaged .*; delete it to go on from the one before"):
        run(tmp_path, "--steps", 3)
    assert "by torch 2.6.0" in capsys.readouterr().out
    shutil.rmtree(state)
    assert run(tmp_path, "--steps", 3)["step"] == 3


@pytest.mark.parametrize("full", ["disk", "index"])
def test_failing_write_keeps_the_state_before(tmp_path, monkeypatch, full):
    run(tmp_path, "--steps", 2)
    before = load(tmp_path)["tensors"]

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if full == "disk":
        monkeypatch.setattr(torch, "save", fail)
    else:
        write = train.atomic_write
        failing = lambda path, w: fail() if path.name == "run.json" else write(path, w)
        monkeypatch.setattr(train, "atomic_write", failing)
    with pytest.raises(OSError, match="state-0000004: cannot be written .*No space left.*state-0000002 is whole"):
        run(tmp_path, "--steps", 4)
    monkeypatch.undo()
    assert [s.name for s in tmp_path.glob("state-*")] == ["state-0000002"] and same(before, load(tmp_path)["tensors"])


def test_divergence_stops_at_once(tmp_path, monkeypatch):
    run(tmp_path, "--steps", 4)
    before = load(tmp_path)["tensors"]
    forward = terdit.FeedForward.forward
    with monkeypatch.context() as m:
        m.setattr(terdit.FeedForward, "forward", lambda self, x: forward(self, x) * float("inf"))
        with pytest.raises(
            ValueError, match=r"step 4: loss nan.*first in layers.0.feed_forward: .*state-0000004 holds"
        ):
            run(tmp_path, "--steps", 9)
    losses = GaussianDiffusion.training_losses
    monkeypatch.setattr(
        GaussianDiffusion, "training_losses", lambda *a: {k: v * float("nan") for k, v in losses(*a).items()}
    )
    with pytest.raises(ValueError, match=r"step 4: loss nan.*the backward pass"):
        run(tmp_path, "--steps", 9)
    assert same(load(tmp_path)["tensors"], before)


@pytest.mark.parametrize("flags", [["--full-precision"], ["--no-adaln-norm"]])
def test_ablations_run(tmp_path, flags):
    config = Config(**run(tmp_path, "--steps", 2, *flags)["config"])
    full = flags == ["--full-precision"]
    assert (config.ternary, config.adaln_norm) == (not full, False)
    assert load_model(tmp_path / ("full.pt" if full else "packed.pt")).config == config


def test_half_of_the_photos_are_mirrored(tmp_path):
    picture = np.zeros((8, 8), np.uint8)
    picture[:, 4:] = 255
    (tmp_path / "data/a").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(picture).save(tmp_path / f"data/a/{i}.png")
    data, config = load_folder(tmp_path / "data", 8), Config(**SIZES["tiny"])
    args = train.parse_args(["--batch", "400"])
    x0, *_ = train.draw_batch(data, config, args, GaussianDiffusion(), 0)
    left = (x0[:, 0, 0, 0] > 0).double().mean()
    assert 0.4 < left < 0.6 and torch.equal(x0[:, 0, 0, 0], -x0[:, 0, 0, -1])


def test_other_photos_are_not_those_read_before(tmp_path):
    for d in ("one", "two"):
        save_image(tmp_path / d / "a/1.png")
    run(tmp_path / "out", "--steps", 1, "--data", tmp_path / "one")
    with pytest.raises(ValueError, match="images-8 holds the images of .*one, not of --data .*two"):
        run(tmp_path / "out", "--steps", 1, "--data", tmp_path / "two", "--fresh")
    assert run(tmp_path / "out", "--steps", 2, "--data", tmp_path / "out/images-8")["step"] == 2


def test_one_class_only(tmp_path):
    save_image(tmp_path / "data/only/a.png")
    save_image(tmp_path / "data/only/b.png", colour=(9, 9, 9))
    state = run(tmp_path / "out", "--steps", 2, "--data", tmp_path / "data")
    assert (
        state["config"]["class_names"] == ["only"]
        and state["tensors"]["model.y_embedder.embedding_table.weight"].shape[0] == 2
    )


def init_sources(tmp_path):
    run(tmp_path / "src", "--steps", 3)
    run(tmp_path / "full", "--steps", 3, "--full-precision")
    return [tmp_path / "src/packed.pt", tmp_path / "src/state-0000003", tmp_path / "full/full.pt"]


def test_init_keeps_the_weights(tmp_path):
    packed_file, *others = init_sources(tmp_path)
    packed = load_model(packed_file)
    for path in (packed_file, *others):
        args = train.parse_args(["--init", str(path)])
        config, state = train.read_init(path)
        if path == others[-1]:  # full precision, whose alphas start at the quantizer's scale
            model = train.build_model(args, replace(config, ternary=True), state)
            wq = model.layers[0].attention.wq
            assert wq.alphas.item() == pytest.approx(wq.weight.abs().mean().item())
        else:
            model = train.build_model(args, config, state)
            assert same(dict(pack_model(model).state_dict()), dict(packed.state_dict()))  # the same codes and alphas


def test_fine_tuning_to_other_classes(tmp_path, capsys):
    packed_file = init_sources(tmp_path)[0]
    for name in ("cat", "dog"):
        save_image(tmp_path / f"data/{name}/x.png")
    state = run(tmp_path / "tuned", "--steps", 1, "--lr", 1e-9, "--init", packed_file, "--data", tmp_path / "data")
    assert "new label table" in capsys.readouterr().out and state["config"]["class_names"] == ["cat", "dog"]
    before, after = (dict(load_model(tmp_path / f"{d}/packed.pt").state_dict()) for d in ("src", "tuned"))
    tables = [d.pop("y_embedder.embedding_table.weight") for d in (before, after)]
    assert [len(t) for t in tables] == [11, 3]
    assert all(torch.allclose(before[k].float(), after[k].float(), atol=1e-6) for k in before)
    run(tmp_path / "tuned", "--steps", 2, "--lr", 1e-9, "--init", packed_file, "--data", tmp_path / "data")  # resumes
    with pytest.raises(ValueError, match="init="):
        run(tmp_path / "tuned", "--steps", 3, "--lr", 1e-9, "--data", tmp_path / "data", "--seed", 0)


def test_init_refuses(tmp_path):
    packed_file = init_sources(tmp_path)[0]
    for flags, message in (
        (["--init", FOLDERS["terdit"]], "works on 4 channels, latents of"),
        (["--init", tmp_path / "no.pt"], "no such file"),
        (["--init", packed_file, "--no-adaln-norm"], "adaLN_modulation.2.weight is .*, this model's none"),
        (["--init", "x.pt", "--size", "tiny"], "leave out --size"),
        (["--init", packed_file, "--image-size", "16"], "pos_embed is"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(tmp_path / "out", "--steps", 1, *flags)


def test_compile_falls_back_aloud(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert train.can_compile("cpu") is False
    assert "(no compiler): training without it" in capsys.readouterr().out


def test_micro_batches_change_nothing_but_memory(tmp_path):
    runs = (["--micro-batch", 4], ["--micro-batch", 3], ["--checkpointing"])
    one, *others = (run(tmp_path / str(i), "--steps", 3, *flags)["tensors"] for i, flags in enumerate(runs))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for two in others for k in one)


def test_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--size", "4.2B", "--plan", "--gpus", "8", "--checkpointing"])
    shown = capsys.readouterr().out
    rows = {line[:38].strip(): float(line.split()[-2]) for line in shown.splitlines()[1:-1]}
    assert "4,238.0M parameters; batch 256 on 8 GPU" in shown and os.listdir(tmp_path) == []
    assert (rows["weights"], rows["optimizer"]) == (2.12, 4.24)  # 4 and 8 bytes of 4.238e9 over 8
    assert rows["in all"] == pytest.approx(sum(v for k, v in rows.items() if k != "in all"), abs=0.05)
    # By hand: 32 layers, 256 tokens, 4 square matrices and 3 of 3072 x 8192, 2 FLOP a weight, three passes.
    by_hand = 3 * 32 * 256 * 2 * (4 * 3072**2 + 3 * 3072 * 8192) / 1e12
    assert by_hand < float(shown.splitlines()[-1].split()[0]) < 1.05 * by_hand


def test_plan_of_a_cache_is_of_what_it_holds(tmp_path, capsys):
    cache = tmp_path / "latents-256"
    cache.mkdir()
    np.save(cache / "x.npy", np.zeros((1, 2, 4, 32, 32), np.float16))
    np.save(cache / "labels.npy", np.zeros(1, np.int64))
    header = dict(
        format=train.CACHE, image_size=256, vae="v", class_names=["a"], latent_scale=1.0, source="x", files=[]
    )
    (cache / "header.json").write_text(json.dumps(header))
    plans = []
    for flags in (["--data", str(cache)], ["--data", "x", "--vae", "v"]):
        train.main(["--size", "600M", "--plan", "--gpus", "1", *flags])
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]


def test_latents_made_from_codes_round_back():
    model = load_model(FOLDERS["terdit"], n_heads=4)
    for module in model.modules():
        if isinstance(module, PackedTernaryLinear):
            codes = unpack_ternary(module.weight)
            assert torch.equal(ternarize(codes * module.alphas.abs()).to(torch.int8), codes)
