"""sample.py --npz: processes share batches, stopped runs go on to the same bytes."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from tests.helpers import save_model
from tests.test_distributed import launch_variables
from tests.test_runs import FORKS

FLAGS = "--npz 17 --batch 3 --steps 2 --device cpu".split()
BATCHES = [0, 3, 6, 9, 12, 15]  # their first images; the last has two


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A packed file of a model that draws 8x8 pixels of five classes."""
    return save_model(tmp_path_factory.mktemp("ckpt") / "packed.pt", prediction="v")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out/x.npz"


def main(ckpt, out, *flags):
    """Run sample.py here -> None, or the message with which it ended."""
    argv = [*FLAGS, "--ckpt", str(ckpt), "--out", str(out), *flags]
    try:
        sample.run_main(lambda: sample.main(argv))
    except SystemExit as e:
        return re.sub(r" \(\w+.py:\d+\)$", "", e.code)  # the place in the code


def batches(out):
    """The first images of the batches that are drawn."""
    return sorted(int(path.stem) for path in Path(f"{out}.part").glob("*.npy"))


def draw_and_die(ckpt, out, rank, world, last):
    """One process of several. It notes what it draws, and kills itself before the batch `last`."""
    os.environ |= launch_variables(rank, world, port=1)  # nobody listens there: there is no group
    sample_latents = sample.sample_latents

    def sample_latents_and_note(model, y, index, **options):
        if index[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(out.with_name(f"drawn-{rank}"), "a") as file:
            print(int(index[0]), file=file)
        return sample_latents(model, y, index, **options)

    sample.sample_latents = sample_latents_and_note
    with open(out.with_name(f"said-{rank}"), "w") as sys.stdout:
        message = main(ckpt, out)
    sys.exit(message)


def start(*arguments):
    process = FORKS.Process(target=draw_and_die, args=arguments)
    process.start()
    return process


@pytest.fixture
def unwritten(ckpt, out):
    """A run that has drawn all images, which then did not fit on the disk as one file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a batch has 704 bytes
    try:
        message = main(ckpt, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message == f"error: {out}: cannot be written ([Errno 27] File too large)"
    assert os.listdir(out.parent) == ["x.npz.part"]
    assert batches(out) == BATCHES
    return out


@pytest.mark.parametrize("changes, labels", [
    (dict(class_names=["0", "1", "10", "11", "2"]), [0, 1, 10, 11, 2]),  # as a released TerDiT
    (dict(num_classes=12), list(range(12))),  # all of them, where a grid shows eight
])
def test_the_file_is_what_adm_reads(out, changes, labels):
    """arr_0 uint8 NHWC; arr_1 the data set's own class indices, the classes in turn."""
    assert main(save_model(out.with_name("m.pt"), **changes), out) is None
    data = np.load(out)
    assert data.files == ["arr_0", "arr_1"]
    assert (data["arr_0"].shape, data["arr_0"].dtype) == ((17, 8, 8, 3), np.uint8)
    assert data["arr_1"].tolist() == (labels * 4)[:17]
    assert data["arr_1"].dtype == np.int64
    dates = {entry.date_time for entry in zipfile.ZipFile(out).infolist()}
    assert dates == {(1980, 1, 1, 0, 0, 0)}  # equal images make equal bytes, whenever


def test_processes_are_killed_and_others_go_on_to_the_bytes_of_one(ckpt, out):
    """Started by hand, without torchrun. The first process is killed, too, and later one of two."""
    three = [start(ckpt, out, rank, 3, last) for rank, last in [(0, 9), (1, 3), (2, None)]]
    for process in three:
        process.join()
    assert [process.exitcode for process in three] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert out.with_name("said-2").read_text() == ""  # the first one speaks
    assert batches(out) == [0, 6, 15]
    assert not out.exists()
    settings = Path(f"{out}.part/settings.json")
    first = settings.stat()

    second = start(ckpt, out, 1, 2, 3)  # dies at once
    second.join()
    out.with_name("drawn-0").unlink()
    whole = start(ckpt, out, 0, 2, None)
    whole.join()
    assert whole.exitcode == 0
    drawn = out.with_name("drawn-0").read_text().split()
    assert drawn == ["12", "9", "3"]  # its own, then what the other left, from the last one on
    assert settings.stat() == first
    assert main(ckpt, out.with_name("y.npz")) is None
    assert out.read_bytes() == out.with_name("y.npz").read_bytes()


def test_only_what_is_missing_is_drawn(ckpt, unwritten, capsys):
    for path in Path(f"{unwritten}.part").glob("*.npy"):
        np.save(path, np.full_like(np.load(path), 7))
    Path(f"{unwritten}.part/000000006.npy").unlink()
    assert main(ckpt, unwritten) is None
    images = np.load(unwritten)["arr_0"]
    assert [i for i in range(17) if (images[i] != 7).any()] == [6, 7, 8]
    shown = capsys.readouterr()
    assert "sampling: 100.0%, " in shown.err
    assert "; 3 images of 2 steps in " in shown.out
    assert "x.npz.part holds the same images; it may be deleted\n" in shown.out


def test_only_the_same_run_goes_on(ckpt, unwritten, tmp_path):
    for flags, difference in [
        ("--seed 1", "seed=0, this command says 1:"),
        ("--cfg 3", "cfg_scale=1.5, this command says 3.0:"),
        ("--guided-channels 2", "guided_channels=None, this command says 2:"),
        ("--steps 3", "steps=2, this command says 3:"),
        ("--sampler ddim", "sampler='dpm', this command says 'ddim':"),
        ("--batch 4", "batch=3, this command says 4:"),
        ("--npz 16", "n=17, this command says 16:"),
        ("--classes 1 2", "classes=[0, 1, 2, 3, 4], this command says [1, 2]:"),
        ("--dtype bf16", "dtype='fp32', this command says 'bf16':"),
        (f"--ckpt {save_model(tmp_path / 'other.pt', seed=1)}", "checksum="),
    ]:
        message = main(ckpt, unwritten, *flags.split())
        assert f"x.npz.part was made with {difference}" in message
        assert message.endswith(": take another --out, or delete that folder")
    assert main(shutil.copy(ckpt, tmp_path / "copy.pt"), unwritten) is None


def test_the_settings_are_those_of_whoever_comes_first(tmp_path):
    path = tmp_path / "settings.json"
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(sample.agree_on, path, dict(seed=i % 2)) for i in range(8)]
    seed = json.loads(path.read_text())["seed"]
    refused = [i for i, job in enumerate(jobs) if isinstance(job.exception(), ValueError)]
    assert refused == [i for i in range(8) if i % 2 != seed]
    assert os.listdir(tmp_path) == ["settings.json"]


def test_memory_does_not_grow_with_the_number_of_images(out):
    settings = dict(n=1000, batch=50)  # 12 MB

    def draw_black(index, progress):
        return -torch.ones(len(index), 3, 64, 64)

    tracemalloc.start()
    assert sample.sample_npz(out, draw_black, np.arange(10), settings) == 1000
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    data = np.load(out)
    assert data["arr_0"].shape == (1000, 64, 64, 3)
    assert not data["arr_0"].any()


def test_samples_that_are_not_finite_are_not_kept(ckpt, out, monkeypatch):
    monkeypatch.setattr(sample, "sample_latents", lambda *args, **options: torch.tensor(torch.nan))
    assert main(ckpt, out) == "error: the samples are not finite; is the checkpoint damaged?"
    assert batches(out) == []
