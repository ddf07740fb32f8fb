"""sample.py --npz: batches that processes share, runs that are stopped and go on, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import weakref
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from terdit import Config, DiT, pack_model, save_checkpoint
from tests.conftest import ROOT
from tests.helpers import RELEASED, SMALL, awake

# sample.py, which tells on stderr which images it draws. Before batch DIE_AT it kills itself, as if memory ran out.
# Rank 1 takes SECONDS longer for each batch.
TELLING_SAMPLE = r"""
import os
import signal
import time
import sample

sample_latents = sample.sample_latents

def sample_latents_that_tells(model, y, index, *rest):
    if index[0] == int(os.environ.get("DIE_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(2, f"drawing {os.environ.get('RANK', 0)} {index[0]}\n".encode())  # in one piece, others write too
    time.sleep(int(os.environ.get("RANK", 0)) * float(os.environ.get("SECONDS", 0)))
    return sample_latents(model, y, index, *rest)

sample.sample_latents = sample_latents_that_tells
sample.run_main(sample.main)
"""
FLAGS = "--npz 17 --batch 3 --steps 2 --device cpu".split()  # batches start at 0, 3, 6, 9, 12, 15; the last is smaller


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A packed file of a model that draws 8x8 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "packed.pt"
    save_checkpoint(path, pack_model(awake(DiT(Config(**SMALL, prediction="v")))))
    return path


def start(processes, ckpt, out, **environment):
    """Start what `torchrun --nproc-per-node=PROCESSES sample.py --npz ...` would."""
    script = out.parent.parent / "telling_sample.py"
    script.write_text(TELLING_SAMPLE)
    command = [sys.executable, "-u"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(script), *FLAGS, "--ckpt", str(ckpt), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def draw(processes, ckpt, out, **environment):
    """-> exit code, the first image's number of each batch that was drawn by rank, and all of stderr."""
    with start(processes, ckpt, out, **environment) as launcher:
        _, stderr = launcher.communicate()
    told = [line.split()[1:] for line in stderr.splitlines() if line.startswith("drawing ")]
    by_rank = [sorted(int(first) for rank, first in told if int(rank) == r) for r in range(processes)]
    return launcher.returncode, by_rank, stderr


def undrawn(out):
    """The first image's number of each batch of an unfinished run that has no file yet."""
    return [3 * i for i in range(6) if not (out.parent / f"{out.name}.part/images-{i:07d}.npy").exists()]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out/x.npz"


@pytest.fixture(scope="module")
def whole(ckpt, tmp_path_factory):
    """The bytes of the .npz that one process writes, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    folder.mkdir()
    code, by_rank, stderr = draw(1, ckpt, folder / "x.npz")
    assert code == 0, stderr
    assert by_rank == [[0, 3, 6, 9, 12, 15]]
    return (folder / "x.npz").read_bytes()


# Several processes ----------------------------------------------------------------------------------------------------


def test_two_processes_share_the_batches_and_give_the_bytes_of_one(ckpt, whole, out):
    code, by_rank, stderr = draw(2, ckpt, out, SECONDS="0.3")  # rank 0 waits before it writes the .npz
    assert code == 0, stderr
    assert by_rank == [[0, 6, 12], [3, 9, 15]]
    assert out.read_bytes() == whole
    assert os.listdir(out.parent) == ["x.npz"]


@pytest.mark.parametrize("processes, die_at, then", [(1, 9, 2), (2, 9, 1)])
def test_a_killed_process_loses_its_batch_alone(ckpt, whole, out, processes, die_at, then):
    """Of two processes rank 1 is killed: rank 0 must not wait for it for ever. Another number of processes goes on."""
    code, by_rank, _ = draw(processes, ckpt, out, DIE_AT=str(die_at))
    assert code != 0
    assert os.listdir(out.parent) == ["x.npz.part"]
    missing = undrawn(out)
    assert die_at in missing
    assert 3 not in missing
    code, by_rank, stderr = draw(then, ckpt, out)
    assert code == 0, stderr
    assert by_rank == [missing[rank::then] for rank in range(then)]
    assert out.read_bytes() == whole
    assert os.listdir(out.parent) == ["x.npz"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_launcher_that_ends_takes_its_processes_along(ckpt, whole, out, number):
    with start(2, ckpt, out, SECONDS="1") as launcher:
        line = ""
        while not line.startswith("drawing "):
            line = launcher.stderr.readline()
            assert line
        launcher.send_signal(number)
        launcher.communicate()  # returns when the last process has closed stderr
    assert launcher.returncode != 0
    assert os.listdir(out.parent) == ["x.npz.part"]
    missing = undrawn(out)
    assert 15 in missing
    code, by_rank, stderr = draw(1, ckpt, out)
    assert code == 0, stderr
    assert by_rank == [missing]
    assert out.read_bytes() == whole


def test_an_error_ends_all_processes_and_is_told_once(ckpt, out):
    out.with_name("x.npz.part").touch()  # where the folder should be
    code, by_rank, stderr = draw(2, ckpt, out)
    assert code != 0
    assert by_rank == [[], []]
    assert stderr.count("error: [Errno 17] File exists") == 1
    assert "[rank1]: Traceback" not in stderr


def test_several_processes_draw_no_grid(ckpt, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as e:
        sample.main(["--ckpt", str(ckpt), "--n", "4"])
    assert e.value.code == 2
    assert "for a grid start one" in capsys.readouterr().err


# Stopped and started again, in this process ---------------------------------------------------------------------------


def main(ckpt, out, *flags):
    """Run sample.py here -> None, or the message with which it ended."""
    try:
        sample.run_main(lambda: sample.main([*FLAGS, "--ckpt", str(ckpt), "--out", str(out), *flags]))
    except SystemExit as e:
        return e.code


def spoil(monkeypatch, first, action):
    """Call action(x) -> x on the latents of the batch whose first image has this number. -> list of batches drawn"""
    sample_latents = sample.sample_latents
    drawn = []

    def spoiled(model, y, index, *rest):
        x = sample_latents(model, y, index, *rest)
        if index[0] == first:
            x = action(x)
        drawn.append(index[0])
        return x

    monkeypatch.setattr(sample, "sample_latents", spoiled)
    return drawn


def press_ctrl_c(x):
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def stopped(ckpt, out):
    """Flags of a run that Ctrl-C has stopped after two of six batches."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        spoil(monkeypatch, 6, press_ctrl_c)
        message = main(ckpt, out)
    assert message == f"stopped; {out}.part keeps what is drawn: the same command goes on"
    assert undrawn(out) == [6, 9, 12, 15]
    return out


def test_ctrl_c_and_the_same_command_goes_on(ckpt, stopped, monkeypatch, capsys):
    totals = []

    class Progress(sample.Progress):
        def __init__(self, total):
            totals.append(total)
            super().__init__(total)

    monkeypatch.setattr(sample, "Progress", Progress)
    drawn = spoil(monkeypatch, None, None)
    assert main(ckpt, stopped) is None
    assert drawn == [6, 9, 12, 15]
    assert totals == [2 * 11]  # steps x the images that were left
    shown = capsys.readouterr().out
    assert f"{stopped}.part: 2 of 6 batches are drawn already" in shown
    assert "\n11 images in " in shown
    assert os.listdir(stopped.parent) == ["x.npz"]
    assert main(ckpt, stopped.with_name("y.npz")) is None
    assert stopped.read_bytes() == stopped.with_name("y.npz").read_bytes()


def test_a_run_that_was_killed_while_it_wrote_the_npz_draws_nothing_again(ckpt, out, monkeypatch):
    def full_disk(file, parts, labels):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_npz", full_disk)
        assert "x.npz: cannot be written ([Errno 28] No space left on device)" in main(ckpt, out)
    drawn = spoil(monkeypatch, None, None)
    assert main(ckpt, out) is None
    assert drawn == []
    assert os.listdir(out.parent) == ["x.npz"]


def test_a_folder_that_was_being_removed_counts_for_nothing(ckpt, out):
    part = out.with_name("x.npz.part")
    part.mkdir()
    np.save(part / "images-0000000.npy", np.zeros((3, 8, 8, 3), np.uint8))
    assert main(ckpt, out) is None
    assert np.load(out)["arr_0"][:3].max() > 0


@pytest.mark.parametrize(
    "flags, theirs, ours",
    [
        ("--seed 1", "seed=0", "1"),
        ("--cfg 3", "cfg_scale=1.5", "3.0"),
        ("--guidance-interval 0 500", "guidance_interval=None", "[0, 500]"),
        ("--guided-channels 2", "guided_channels=None", "2"),
        ("--steps 3", "steps=2", "3"),
        ("--sampler ddim", "sampler='dpm'", "'ddim'"),
        ("--batch 4", "batch=3", "4"),
        ("--npz 16", "npz=17", "16"),
        ("--classes 1 2", "classes=[0, 1, 2, 3, 4]", "[1, 2]"),
        ("--dtype bf16", "dtype='torch.float32'", "'torch.bfloat16'"),
    ],
)
def test_other_settings_are_refused(ckpt, stopped, flags, theirs, ours):
    part = stopped.with_name("x.npz.part")
    assert main(ckpt, stopped, *flags.split()) == (
        f"error: {part} holds images drawn with {theirs}, this command says {ours}: repeat the command that drew them "
        "to go on, delete the folder, or take another --out"
    )
    assert undrawn(stopped) == [6, 9, 12, 15]
    assert not stopped.exists()


def test_another_checkpoint_is_refused_and_a_copy_is_not(ckpt, stopped, tmp_path):
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "other.pt", pack_model(awake(DiT(Config(**SMALL, prediction="v")))))
    assert "x.npz.part holds images of another checkpoint" in main(tmp_path / "other.pt", stopped)
    shutil.copy(ckpt, tmp_path / "copy.pt")
    assert main(tmp_path / "copy.pt", stopped) is None


def test_two_runs_do_not_share_a_folder(ckpt, stopped):
    with sample.locked(stopped.with_name("x.npz.part")):
        message = main(ckpt, stopped)
    assert f"x.npz.part: process {os.getpid()} on " in message
    assert "draws there: wait" in message
    assert undrawn(stopped) == [6, 9, 12, 15]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [17 + 17, 11 + 17])  # a new run; one that has drawn 6: these, and all for the .npz
def test_a_small_disk_is_refused_before_anything_is_drawn(ckpt, out, monkeypatch, images, request):
    if images < 34:
        request.getfixturevalue("stopped")
    before = os.listdir(out.parent)
    needed = images * 8 * 8 * 3
    drawn = spoil(monkeypatch, None, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    message = main(ckpt, out)
    assert message.startswith(f"error: {out.parent} has too little space: the images yet to draw take 0.00 MB, and the")
    assert drawn == []
    assert os.listdir(out.parent) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert main(ckpt, out) is None


def test_samples_that_are_not_finite_are_refused_by_batch(ckpt, out, monkeypatch):
    spoil(monkeypatch, 6, lambda x: x * float("nan"))
    assert main(ckpt, out) == f"error: {ckpt}: the samples are not finite; is the checkpoint damaged?"
    assert undrawn(out) == [6, 9, 12, 15]


def test_a_damaged_batch_is_named(ckpt, stopped):
    damaged = stopped.with_name("x.npz.part") / "images-0000001.npy"
    os.truncate(damaged, damaged.stat().st_size - 1)
    assert f"error: {damaged} is damaged" in main(ckpt, stopped)
    assert os.listdir(stopped.parent) == ["x.npz.part"]
    damaged.unlink()
    assert main(ckpt, stopped) is None


def test_a_device_is_refused(ckpt, tmp_path, capsys):
    (tmp_path / "x.npz").symlink_to("/dev/null")
    assert main(ckpt, tmp_path / "x.npz") == 2
    assert "is a device or a pipe" in capsys.readouterr().err


# The file -------------------------------------------------------------------------------------------------------------


def test_the_file_is_np_savez_s(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)
    labels = np.arange(7)
    parts = [tmp_path / "0.npy", tmp_path / "1.npy"]
    np.save(parts[0], images[:4])
    np.save(parts[1], images[4:])
    with open(tmp_path / "ours.npz", "wb") as file:
        sample.write_npz(file, parts, labels)
    np.savez(tmp_path / "numpy.npz", images, labels)
    with zipfile.ZipFile(tmp_path / "ours.npz") as ours, zipfile.ZipFile(tmp_path / "numpy.npz") as numpy:
        assert ours.namelist() == numpy.namelist()
        for name in numpy.namelist():
            assert ours.read(name) == numpy.read(name)
            assert ours.getinfo(name).compress_type == zipfile.ZIP_STORED


def test_memory_holds_a_batch_and_not_the_images(out, monkeypatch):
    """Of earlier batches only the last one's bytes may be left; and what writes the .npz allocates no more than a few
    batches (numpy's memory, which tracemalloc sees)."""
    batch_bytes = 4 * 256 * 256 * 3
    to_uint8 = sample.to_uint8
    before = []
    in_bytes = []

    def draw(y, progress, index):
        assert all(tensor() is None for tensor in before)
        assert all(array() is None for array in in_bytes[:-1])
        images = torch.zeros(len(y), 3, 256, 256)
        before.append(weakref.ref(images))
        return images

    def to_uint8_that_remembers(images):
        array = to_uint8(images)
        in_bytes.append(weakref.ref(array))
        return array

    monkeypatch.setattr(sample, "to_uint8", to_uint8_that_remembers)

    tracemalloc.start()
    try:
        n = sample.sample_npz(out, draw, torch.zeros(64, dtype=torch.int64), 1, dict(batch=4), 256 * 256 * 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n == 64
    assert len(before) == len(in_bytes) == 16
    assert batch_bytes < peak < 4 * batch_bytes
    assert np.load(out)["arr_0"].shape == (64, 256, 256, 3)


def test_latents_are_decoded_by_batch_and_the_disk_is_asked_for_pixels(out, monkeypatch):
    """The released model's 4 channels of 8x8 become 64x64 pixels; the decoder here only enlarges them."""
    sizes = []

    def decode(z):
        sizes.append(len(z))
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    monkeypatch.setattr(sample, "load_decoder", lambda *args: decode)
    flags = ["--n-heads", "4", "--classes", "1", "--sampler", "dpm", "--dtype", "fp32"]
    side = 8 * sample.load_model(RELEASED["terdit"], n_heads=4).config.input_size
    needed = 2 * 17 * 3 * side**2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    assert "too little space" in main(RELEASED["terdit"], out, *flags)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert main(RELEASED["terdit"], out, *flags) is None
    assert sizes == [3, 3, 3, 3, 3, 2]
    assert np.load(out)["arr_0"].shape == (17, side, side, 3)


def test_a_batch_that_lacks_images_is_noticed_before_the_npz_is_written(ckpt, stopped):
    part = stopped.with_name("x.npz.part")
    whole = part / "images-0000000.npy"
    np.save(whole, np.load(whole)[:1])
    assert "images, not " in main(ckpt, stopped)
    assert not stopped.exists() and whole.exists()
