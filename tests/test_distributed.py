"""Several processes (gloo, on this CPU) train what one trains, and read each other's states."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from terdit import Config, DiT, load_model, pack_model
from tests.conftest import ROOT
from tests.test_train import load, part, rows

# Odd on purpose: over 3 processes no matrix divides evenly, and each alpha lies on one process alone. Prints each loss.
SMALL = """
import sys, terdit, train
terdit.SIZES["tiny"] |= dict(dim=40, n_layers=2, n_heads=2, multiple_of=20)
digits, all_sum = train.digits, train.all_sum
train.digits = lambda n, size, seed: digits(100, size, seed)
train.DEMO["warmup"] = 1
def spy(x):
    all_sum(x)
    if len(x) == 11:
        print("loss", x[1].item())
    return x
train.all_sum = spy
train.run(train.main)
"""
FLAGS = [
    "--batch",
    "12",
    "--image-size",
    "8",
    "--grid",
    "4",
    "--sample-every",
    "7",
    "--dtype",
    "fp32",
    "--lr",
    "2e-3",
    "--device",
    "cpu",
]


def train_on(n, out, *flags, check=True, stop_after=None):
    """What `torchrun --nproc-per-node=n train.py ...` does; stop_after: SIGTERM to it at a line that starts so."""
    script = out.parent / "small.py"
    script.write_text(SMALL)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
    command = [sys.executable, "-u", *launch, str(script), *FLAGS, "--out", str(out), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        if stop_after:
            while not (line := process.stdout.readline()).startswith(stop_after):
                assert line, process.stderr.read()
            process.terminate()
        done = subprocess.CompletedProcess(command, None, *process.communicate())
    done.returncode = process.returncode
    assert not check or stop_after or done.returncode == 0, done.stderr[-2000:]
    return done


def losses(done):
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss ")]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    return out, losses(train_on(1, out, "--steps", 20))


def test_two_train_what_one_trains(one, tmp_path):
    """20 steps of 1 and of 2 processes have the same losses; 3 and 1 go on from what 2 saved, and theirs are too."""
    out, want = one
    two = tmp_path / "two"
    got = losses(train_on(2, two, "--steps", 20, "--save-every", 10, "--micro-batch", 4))
    assert len(want) == 20 and got == pytest.approx(want, rel=1e-5)
    a, b = load(out)["tensors"], load(two)["tensors"]
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    for x, y in zip(rows(out / "log.csv"), rows(two / "log.csv")):
        for key in x.keys() - {"images_per_s", "tflops"}:
            assert y[key] == pytest.approx(x[key], rel=1e-3), key

    # The exported file is the averaged model of the state, whole.
    model = DiT(Config(**load(two)["config"]))
    model.load_state_dict(part(load(two), "ema."))
    packed = load_model(two / "packed.pt").state_dict()
    assert all(torch.equal(v, packed[k]) for k, v in pack_model(model).state_dict().items())

    shutil.rmtree(two / "state-0000020")
    for n in (3, 1):
        shutil.copytree(two, tmp_path / str(n))
        assert losses(train_on(n, tmp_path / str(n), "--steps", 20)) == pytest.approx(want[10:], rel=1e-5)


def test_a_batch_that_does_not_split(tmp_path):
    done = train_on(2, tmp_path / "run", "--batch", 7, check=False)
    assert done.returncode == 1 and "error: --batch 7 does not split evenly over 2 processes" in done.stderr


def test_sigterm_to_the_launcher_saves(one, tmp_path):
    """A preempted job: both processes save at the same step and exit, and the same command goes on."""
    started = train_on(2, tmp_path / "run", "--steps", 20, stop_after="loss ")
    state = load(tmp_path / "run")
    assert started.returncode != 0 and 1 <= state["step"] < 20
    rest = losses(train_on(2, tmp_path / "run", "--steps", 20))
    assert rest == pytest.approx(one[1][state["step"] :], rel=1e-5)
