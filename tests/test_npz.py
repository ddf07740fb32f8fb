"""sample.py --npz: batches that processes share, runs that are stopped and go on, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import sample
from sample import MISSING
from terdit import Config, DiT, pack_model, save_checkpoint
from tests.conftest import ROOT
from tests.helpers import SMALL, awake

# sample.py, which tells on stderr who draws which batch. One process kills itself before image 9, as if memory ran out.
TELLING_SAMPLE = r"""
import os, signal, sample
sample_latents = sample.sample_latents

def sample_latents_that_tells(model, y, index, **options):
    if "RANK" not in os.environ and index[0] == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(2, f"drawing {os.environ.get('RANK')} {index[0]}\n".encode())  # in one piece, others write too
    return sample_latents(model, y, index, **options)

sample.sample_latents = sample_latents_that_tells
sample.run_main(sample.main)
"""
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
FLAGS = "--npz 17 --batch 3 --steps 2 --device cpu".split()  # batches start at 0, 3, 6, 9, 12, 15; the last is smaller


def make_checkpoint(path, seed=0, **changes):
    torch.manual_seed(seed)
    save_checkpoint(path, pack_model(awake(DiT(Config(**SMALL | changes, prediction="v")))))
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A packed file of a model that draws 8x8 pixels of five classes."""
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "packed.pt")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out/x.npz"


def main(ckpt, out, *flags):
    """Run sample.py here -> None, or the message with which it ended."""
    try:
        sample.run_main(lambda: sample.main([*FLAGS, "--ckpt", str(ckpt), "--out", str(out), *flags]))
    except SystemExit as e:
        return e.code


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def rows(out, name):
    """An array of an unfinished run, mapped: x, the images, or their status."""
    return np.load(f"{out}.part/{name}.npy", mmap_mode="r+")


@pytest.fixture
def unwritten(ckpt, out, monkeypatch):
    """A run that has drawn all images, which then did not fit on the disk as one file."""
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        assert "x.npz: cannot be written; is the disk full? ([Errno 28] No space left on device)" in main(ckpt, out)
    assert os.listdir(out.parent) == ["x.npz.part"]
    return out


@pytest.mark.parametrize(
    "changes, labels",
    [
        (dict(class_names=["cat", "cow", "dog", "emu", "fox"]), [0, 1, 2, 3, 4]),
        (dict(class_names=["0", "1", "10", "11", "2"]), [0, 1, 10, 11, 2]),  # a released TerDiT orders its rows so
        (dict(num_classes=12), list(range(12))),  # all of them, where a grid shows eight
    ],
)
def test_the_file_is_what_adm_reads(out, changes, labels):
    """arr_0 uint8 NHWC; arr_1 the data set's own class indices, the classes in turn."""
    assert main(make_checkpoint(out.with_name("m.pt"), **changes), out) is None
    data = np.load(out)
    assert data.files == ["arr_0", "arr_1"]
    assert (data["arr_0"].shape, data["arr_0"].dtype) == ((17, 8, 8, 3), np.uint8)
    assert data["arr_1"].tolist() == (labels * 4)[:17]


def test_one_process_is_killed_and_two_go_on_to_the_bytes_of_one(ckpt, out, tmp_path):
    (tmp_path / "script.py").write_text(TELLING_SAMPLE)
    flags = [tmp_path / "script.py", *FLAGS, "--ckpt", ckpt, "--out", out]
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *flags], **options)
    assert done.returncode == -signal.SIGKILL
    assert np.flatnonzero(rows(out, "status") == MISSING).tolist() == list(range(9, 17))
    assert os.listdir(out.parent) == ["x.npz.part"]

    done = subprocess.run([sys.executable, *TORCHRUN, *flags], **options)
    assert done.returncode == 0, done.stderr
    drawn = sorted(line for line in done.stderr.splitlines() if line.startswith("drawing "))
    assert drawn == ["drawing 0 15", "drawing 0 9", "drawing 1 12"]
    assert os.listdir(out.parent) == ["x.npz"]
    assert main(ckpt, out.with_name("y.npz")) is None
    assert out.read_bytes() == out.with_name("y.npz").read_bytes()


def test_only_what_is_missing_is_drawn(ckpt, unwritten, capsys):
    rows(unwritten, "x")[:] = 7
    rows(unwritten, "status")[7] = MISSING
    assert main(ckpt, unwritten) is None
    images = np.load(unwritten)["arr_0"]
    assert [i for i in range(17) if (images[i] != 7).any()] == [6, 7, 8]  # the whole batch: matmuls of its height
    shown = capsys.readouterr()
    assert "sampling: 100.0%, " in shown.err
    assert "; 3 images of 2 steps in " in shown.out
    assert os.listdir(unwritten.parent) == ["x.npz"]


def test_only_the_same_run_goes_on(ckpt, unwritten, tmp_path):
    for flags, difference in [
        ("--seed 1", "seed=0, this command says 1:"),
        ("--cfg 3", "cfg_scale=1.5, this command says 3.0:"),
        ("--guidance-interval 0 500", "guidance_interval=None, this command says [0, 500]:"),
        ("--guided-channels 2", "guided_channels=None, this command says 2:"),
        ("--steps 3", "steps=2, this command says 3:"),
        ("--sampler ddim", "sampler='dpm', this command says 'ddim':"),
        ("--batch 4", "batch=3, this command says 4:"),
        ("--npz 16", "n=17, this command says 16:"),
        ("--classes 1 2", "classes=[0, 1, 2, 3, 4], this command says [1, 2]:"),
        ("--dtype bf16", "dtype='fp32', this command says 'bf16':"),
        (f"--ckpt {make_checkpoint(tmp_path / 'other.pt', seed=1)}", "weights="),
    ]:
        assert f"x.npz.part was made with {difference}" in main(ckpt, unwritten, *flags.split())
    with sample.locked(unwritten.with_name("x.npz.part")):
        assert "x.npz.part: another run is at work there: wait" in main(ckpt, unwritten)
    assert main(shutil.copy(ckpt, tmp_path / "copy.pt"), unwritten) is None


def test_a_folder_that_was_being_removed_is_ignored(ckpt, unwritten):
    (unwritten.with_name("x.npz.part") / "header.json").unlink()
    assert main(ckpt, unwritten, "--seed", "1") is None


def test_a_full_disk_is_said_before_anything_is_drawn(ckpt, out, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    assert "x.npy: cannot be made, it takes 0 MB ([Errno 28] No space left on device)" in main(ckpt, out)
    assert os.listdir(f"{out}.part") == ["lock"]


def test_samples_that_are_not_finite_are_not_kept(ckpt, out, monkeypatch):
    monkeypatch.setattr(sample, "sample_latents", lambda *args, **options: torch.full((3, 3, 8, 8), torch.nan))
    assert main(ckpt, out) == f"error: {ckpt}: the samples are not finite; is the checkpoint damaged?"
    assert (rows(out, "status") == MISSING).all()
