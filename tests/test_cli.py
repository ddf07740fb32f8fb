"""The two scripts as a user runs them: exit codes, messages, files."""

import importlib.util
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from terdit import Config, DiT, GaussianDiffusion, load_model, pack_model, save_checkpoint
from tests.conftest import ROOT
from tests.helpers import RELEASED, SMALL, awake

PETS = SMALL | dict(num_classes=3, class_names=["cat", "dog", "0"])


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A packed file of a model that draws cats, dogs and zeros of 8x8 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "packed.pt"
    save_checkpoint(path, pack_model(awake(DiT(Config(**PETS, prediction="v")))))
    return path


def call(script, *flags, cwd):
    """Run a script in a process of its own -> its exit code and what it printed."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)


def draw(model, y, **options):
    """Sample the labels y in a few steps -> (n, H, W, 3) uint8."""
    return sample.to_uint8(sample.sample_images(model, y, **{"steps": 5, **options}))


# Sampling -------------------------------------------------------------------------------------------------------------


def test_sample_writes_a_grid_and_reports(ckpt, tmp_path):
    done = call("sample.py", "--ckpt", ckpt, "--n", 7, "--steps", 3, "--out", tmp_path / "g.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "g.png").size == (3 * 96, 3 * 96)  # three classes, three rows
    for text in ("on disk", "2-bit codes", "full-precision rest", "container"):
        assert text in done.stdout
    for text in ("peak resident memory", "s an image", "wrote"):
        assert text in done.stdout
    assert os.listdir(tmp_path) == ["g.png"]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_the_seed_decides_and_not_the_batch(ckpt, sampler):
    model = load_model(ckpt)
    y = [0, 1, 2, 0, 1]
    want = draw(model, y, seed=3, sampler=sampler)
    for batch in (1, 2, 3):
        got = draw(model, y, seed=3, sampler=sampler, batch=batch)
        # Matmuls of another height may round otherwise, which moves a pixel by 1 at most.
        assert np.abs(got.astype(int) - want).max() <= 1
    assert (draw(model, y, seed=4, sampler=sampler) != want).mean() > 0.5
    assert (want[0] != want[3]).mean() > 0.5  # two images of one class


@pytest.mark.parametrize("cfg_scale", [1, 3.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_is_guided_and_draws_noise_by_index(ckpt, sampler, cfg_scale):
    """Against guidance and noise that are written out here."""
    model = load_model(ckpt)
    y = torch.tensor([1, 0, 1])
    index = [4, 0, 7]
    shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
    generators = [sample.generator(5, i) for i in index]

    def noise(x):
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    def guided_model(x, t):
        cond = model(x, t, y)
        uncond = model(x, t, torch.full_like(y, model.config.num_classes))
        guided = uncond[:, :3] + cfg_scale * (cond[:, :3] - uncond[:, :3])
        return torch.cat([guided, cond[:, 3:]], dim=1)  # sigma is not guided

    diffusion = GaussianDiffusion("12", model.config.prediction)
    if sampler == "ddpm":
        want = diffusion.p_sample_loop(guided_model, noise(None), clip_denoised=True, noise_fn=noise)
    else:
        want = diffusion.ddim_sample_loop(guided_model, noise(None), clip_denoised=True)
    got = sample.sample_latents(model, y, index, seed=5, cfg_scale=cfg_scale, steps=12, sampler=sampler)
    assert (got - want).abs().max() < 1e-4


def test_a_guidance_scale_of_one_is_no_guidance(ckpt):
    model = load_model(ckpt)
    almost_one = draw(model, [0, 1], cfg_scale=1.0001).astype(int)  # by the guided path
    assert np.abs(draw(model, [0, 1], cfg_scale=1.0) - almost_one).max() <= 1
    assert np.abs(draw(model, [0, 1], cfg_scale=4.0) - almost_one).max() > 5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_the_unconditional_half_is_computed_inside_the_guidance_interval_alone(ckpt, monkeypatch, sampler):
    model = load_model(ckpt)
    timesteps = [999, 799, 599, 400, 200, 0]  # of six steps; bounds that are visited are inside
    seen = []
    forward = model.forward

    def counting_forward(x, t, y):
        seen.append((int(t[0]), len(x), (y == model.config.num_classes).sum().item()))
        return forward(x, t, y)

    monkeypatch.setattr(model, "forward", counting_forward)
    draw(model, [0, 1, 2], steps=6, sampler=sampler, guidance_interval=(200, 799))
    assert seen == [(t, 6, 3) if 200 <= t <= 799 else (t, 3, 0) for t in timesteps]


@pytest.mark.parametrize("interval, cfg_scale", [((0, 999), 4.0), ((1, 199), 1.0)])
def test_a_guidance_interval_of_all_or_no_timesteps(ckpt, interval, cfg_scale):
    """All: the same as no interval. None of those visited (six steps, as above): the same as no guidance."""
    model = load_model(ckpt)
    got = draw(model, [0, 1], cfg_scale=4.0, steps=6, guidance_interval=interval)
    assert (got == draw(model, [0, 1], cfg_scale=cfg_scale, steps=6)).all()
    assert (got != draw(model, [0, 1], cfg_scale=4.0, steps=6, guidance_interval=(200, 799))).any()


def test_a_guidance_interval_that_guides_nothing_is_refused(ckpt, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.png")]
    with pytest.raises(ValueError, match=r"--guidance-interval 500 510: none of the timesteps .* \(0, 999\)"):
        sample.main(["--ckpt", str(ckpt), *out, "--steps", "2", "--guidance-interval", "500", "510"])
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(ckpt), *out, "--cfg", "1", "--guidance-interval", "0", "500"])
    assert "--cfg 1 guides nowhere" in capsys.readouterr().err


def test_the_command_takes_a_guidance_interval(ckpt, tmp_path):
    for name, flags in [("all", []), ("some", ["--guidance-interval", "0", "500"])]:
        sample.main(["--ckpt", str(ckpt), "--npz", "3", "--steps", "4", "--out", str(tmp_path / f"{name}.npz"), *flags])
    model = load_model(ckpt)
    images = np.load(tmp_path / "some.npz")["arr_0"]
    assert (images == draw(model, [0, 1, 2], steps=4, guidance_interval=(0, 500))).all()
    assert (images != np.load(tmp_path / "all.npz")["arr_0"]).any()


@pytest.mark.parametrize("name, format", [("x.jpg", "JPEG"), ("x.PNG", "PNG"), ("x.webp", "WEBP"), ("x", "PNG")])
def test_a_grid_has_the_format_of_its_ending(ckpt, tmp_path, name, format):
    sample.main(["--ckpt", str(ckpt), "--n", "3", "--steps", "1", "--out", str(tmp_path / name)])
    assert Image.open(tmp_path / name).format == format


def test_a_grid_may_go_to_a_device(ckpt, tmp_path, capsys):
    (tmp_path / "x.png").symlink_to("/dev/null")
    sample.main(["--ckpt", str(ckpt), "--n", "3", "--steps", "1", "--out", str(tmp_path / "x.png")])
    assert "x.png" in capsys.readouterr().out
    assert (tmp_path / "x.png").is_char_device()


def test_npz_is_what_adm_reads(ckpt, tmp_path):
    path = tmp_path / "x.npz"
    sample.main(["--ckpt", str(ckpt), "--npz", "8", "--steps", "2", "--batch", "3", "--out", str(path)])
    data = np.load(path)
    assert data["arr_0"].shape == (8, 8, 8, 3)
    assert data["arr_0"].dtype == np.uint8
    assert data["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with zipfile.ZipFile(path) as file:
        assert file.namelist() == ["arr_0.npy", "arr_1.npy"]


def test_npz_covers_every_class(tmp_path):
    """A grid shows eight of more than ten classes; an .npz, from which FID is computed, must have them all."""
    save_checkpoint(tmp_path / "m.pt", DiT(Config(**SMALL | dict(num_classes=12))))
    path = tmp_path / "x.npz"
    sample.main(["--ckpt", str(tmp_path / "m.pt"), "--npz", "13", "--steps", "1", "--out", str(path)])
    assert np.load(path)["arr_1"].tolist() == [*range(12), 0]


def test_classes_by_name_and_index():
    config = Config(**PETS)
    assert sample.pick_classes(["dog", "1", "2", "0"], config) == [1, 1, 2, 2]  # a name comes before an index
    assert sample.pick_classes(None, config) == [0, 1, 2]


def test_classes_of_released_models_are_ordered_as_strings():
    released = load_model(RELEASED["terdit"], n_heads=4).config
    assert sample.pick_classes(["7"], released) == [7]
    imagenet = Config(class_names=sorted(str(i) for i in range(1000)))
    assert sample.pick_classes(["207", "2"], imagenet) == [121, 112]
    assert len(sample.pick_classes(None, imagenet)) == 8


# What is refused ------------------------------------------------------------------------------------------------------


def run_sample(flags, capsys):
    """Run sample.py with flags that it refuses -> exit code, message."""
    with pytest.raises(SystemExit) as e:
        sample.run_main(lambda: sample.main(flags))
    if isinstance(e.value.code, str):  # sys.exit("text") prints the text and exits with 1
        return 1, e.value.code
    return e.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--classes 3", 1, "class 3 is out of range: this checkpoint has 3 classes, 0-2"),
        ("--classes -1", 1, "class -1 is out of range"),
        ("--classes bird", 1, "class 'bird' is unknown: this checkpoint has 3 classes, cat, dog, 0"),
        ("--steps 0", 2, "argument --steps: got 0, expected a whole number of at least 1"),
        ("--steps 1001", 2, "got 1001, expected at most 1000"),
        (f"--steps {10**22}", 2, "expected a whole number of at least 1 (and at most 10^9)"),
        ("--cfg nan", 2, "argument --cfg: got nan, expected a number of 0 to 100"),
        ("--cfg inf", 2, "got inf, expected a number of 0 to 100"),
        ("--cfg 1e39", 2, "got 1e39, expected a number of 0 to 100"),
        ("--cfg x", 2, "argument --cfg: invalid number value: 'x'"),
        ("--guidance-interval 5", 2, "argument --guidance-interval: expected 2 arguments"),
        ("--guidance-interval -1 5", 2, "argument --guidance-interval: got -1, expected a whole number of 0 to 999"),
        ("--guidance-interval 0 1000", 2, "got 1000, expected a whole number of 0 to 999"),
        ("--guidance-interval 6 5", 2, "argument --guidance-interval: got 6 5, expected LOW of at most HIGH"),
        ("--out x.npz", 2, "x.npz ends in .npz, expected .jpeg, .jpg, .png, .webp; --npz N writes .npz"),
        ("--out x.pdf", 2, "x.pdf ends in .pdf, expected .jpeg, .jpg, .png, .webp"),
        ("--out x.png --npz 4", 2, "x.png ends in .png, expected .npz"),
        ("--n -4", 2, "argument --n: got -4"),
        ("--batch 0", 2, "argument --batch: got 0"),
        ("--npz 4 --n 4", 2, "leave out --n"),
        ("--out /nowhere/x.png", 2, "/nowhere is not a folder that can be written to"),
        ("--out .", 2, "is a folder, expected a file"),
        ("--seed -1", 2, "--seed"),
        ("--vae x", 1, "draws pixels, there are no latents to decode"),
    ],
)
def test_sample_refuses(ckpt, tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    got_code, got_message = run_sample(["--ckpt", str(ckpt), *flags.split()], capsys)
    assert message in got_message
    assert got_code == code
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ([], 2, "--ckpt"),
        (["--ckpt", "missing.pt"], 1, "missing.pt: no such file"),
        (["--ckpt", str(RELEASED["terdit"]), "--n-heads", "7"], 1, "n_heads=7"),
    ],
)
def test_sample_refuses_checkpoints(tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    got_code, got_message = run_sample(flags, capsys)
    assert message in got_message
    assert got_code == code
    assert os.listdir(tmp_path) == []


def test_sample_tells_a_bad_file_in_one_line(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    done = call("sample.py", "--ckpt", tmp_path / "bad.pt", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "bad.pt" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--image-size 26 --out run", 1, "image size 26 is not a multiple of the patch size 4"),
        ("--steps 0", 2, "argument --steps: got 0"),
        ("--export", 2, "argument --export: needs --out"),
    ],
)
def test_train_refuses(tmp_path, flags, code, message):
    done = call("train.py", *flags.split(), cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (f"--steps {10**22}", "expected a whole number of at least 1 (and at most 10^9)"),
        ("--lr inf", "argument --lr: got inf, expected a number of 1e-12 to 100"),
        ("--lr 0", "argument --lr: got 0, expected a number"),
        ("--decay nan", "argument --decay: got nan, expected a number of 0 to 100"),
        (f"--grid {10**9}", "expected 0 to 10,000"),
        ("--grid -1", "argument --grid: got -1"),
    ],
)
def test_train_refuses_numbers_out_of_range(capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        train.parse_args(flags.split())
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_train_tells_in_one_line_that_out_is_a_file(tmp_path):
    (tmp_path / "taken.txt").touch()
    done = call("train.py", "--out", "taken.txt", cwd=tmp_path)
    assert done.returncode == 1
    assert "taken.txt" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["taken.txt"]


@pytest.mark.skipif(importlib.util.find_spec("diffusers"), reason="diffusers is installed")
def test_a_latent_checkpoint_names_the_package_that_is_missing(tmp_path, capsys):
    with pytest.raises(ValueError, match="pip install diffusers"):
        sample.main(["--ckpt", str(RELEASED["terdit"]), "--n-heads", "4", "--out", str(tmp_path / "x.png")])
    assert "class names are ImageNet's indices (0 is row 0)" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []
