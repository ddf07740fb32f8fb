"""Several processes (gloo, on this CPU) train what one trains, and read each other's states."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from terdit import Config, DiT, load_model, pack_model
from tests.conftest import ROOT
from tests.helpers import load_run, read_log, same, weights

# train.py with a small model and few digits, which prints the loss of each step. The sizes are odd on purpose: no
# matrix divides evenly over 3 processes, and each alpha lies on one process alone.
SMALL_TRAIN = """
import terdit
import train

terdit.SIZES["tiny"] |= dict(dim=40, n_layers=2, n_heads=2, multiple_of=20)
train.DEMO.warmup = 1
digits = train.digits
train_step = train.train_step

def few_digits(n, size, seed):
    return digits(100, size, seed)

def train_step_that_prints(run, batch, show_part=None):
    stats = train_step(run, batch)
    print("loss", stats.loss)
    return stats

def different_micro_batches(model_config, cfg, world):
    return cfg.micro_batch or max(1, 6 - 4 * train.ranks()[0])  # as where one machine has less memory free

train.digits = few_digits
train.choose_micro_batch = different_micro_batches
train.train_step = train_step_that_prints
train.run_main(train.main)
"""
FLAGS = "--batch 12 --image-size 8 --grid 4 --sample-every 7 --dtype fp32 --lr 2e-3 --device cpu".split()


def start(processes, out, *flags):
    """Start what `torchrun --nproc-per-node=PROCESSES train.py ...` would, into the folder `out`."""
    script = out.parent / "small_train.py"
    script.write_text(SMALL_TRAIN)
    command = [sys.executable, "-u"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(script), *FLAGS, "--out", str(out), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def train_on(processes, out, *flags):
    """Train to the end -> the loss of each step."""
    with start(processes, out, *flags) as launcher:
        stdout, stderr = launcher.communicate()
    assert launcher.returncode == 0, stderr[-2000:]
    return [float(line.split()[1]) for line in stdout.splitlines() if line.startswith("loss ")]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """20 steps on one process -> the run folder, the loss of each step."""
    out = tmp_path_factory.mktemp("one") / "run"
    losses = train_on(1, out, "--steps", 20)
    assert len(losses) == 20
    return out, losses


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same 20 steps on two processes, with a state at step 10, too."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, train_on(2, out, "--steps", 20, "--save-every", 10, "--micro-batch", 4)


def test_two_processes_train_what_one_trains(one, two):
    out_one, losses_one = one
    out_two, losses_two = two
    assert losses_two == pytest.approx(losses_one, rel=1e-5)
    tensors_one = load_run(out_one)["tensors"]
    tensors_two = load_run(out_two)["tensors"]
    assert {k: v.shape for k, v in tensors_two.items()} == {k: v.shape for k, v in tensors_one.items()}
    log_one = read_log(out_one / "log.csv")
    log_two = read_log(out_two / "log.csv")
    for row_one, row_two in zip(log_one, log_two):
        for key in row_one.keys() - {"images_per_s", "tflops"}:
            assert row_two[key] == pytest.approx(row_one[key], rel=1e-3), key


def test_the_exported_file_is_the_averaged_model_of_all_processes(two):
    out, _ = two
    state = load_run(out)
    model = DiT(Config(**state["config"]))
    model.load_state_dict(weights(state, "ema"))
    assert same(dict(load_model(out / "packed.pt").state_dict()), dict(pack_model(model).state_dict()))


@pytest.mark.parametrize("processes", [3, 1])
def test_other_numbers_of_processes_go_on_from_the_state_of_two(one, two, tmp_path, processes):
    _, losses_one = one
    out_two, _ = two
    shutil.copytree(out_two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/state-0000020")
    assert train_on(processes, tmp_path / "run", "--steps", 20) == pytest.approx(losses_one[10:], rel=1e-5)


def test_a_batch_that_does_not_split_is_refused(tmp_path):
    with start(2, tmp_path / "run", "--batch", 7) as launcher:
        _, stderr = launcher.communicate()
    assert launcher.returncode == 1
    assert "error: --batch 7 does not split evenly over 2 processes" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_ends_takes_its_processes_along(one, tmp_path, number):
    """Told to make room or killed: both processes save at the same step and exit. The same command goes on."""
    _, losses_one = one
    out = tmp_path / "run"
    with start(2, out, "--steps", 20) as launcher:
        line = ""
        while not line.startswith("loss "):
            line = launcher.stdout.readline()
            assert line, launcher.stderr.read()
        launcher.send_signal(number)
        launcher.communicate()  # returns when the last process has closed stdout
    assert launcher.returncode != 0
    step = load_run(out)["step"]
    assert 1 <= step < 20
    assert train_on(2, out, "--steps", 20) == pytest.approx(losses_one[step:], rel=1e-5)


def test_two_processes_learn_from_full_precision_and_a_teacher_as_one_does(tmp_path):
    for folder in ("full", "alone", "together"):
        (tmp_path / folder).mkdir()
    train_on(1, tmp_path / "full/run", "--steps", 5, "--full-precision")
    full = tmp_path / "full/run/full.pt"
    flags = ("--steps", 10, "--init", full, "--teacher", full)
    alone = train_on(1, tmp_path / "alone/run", *flags)
    together = train_on(2, tmp_path / "together/run", *flags)
    assert together == pytest.approx(alone, rel=1e-3)
    [row] = read_log(tmp_path / "alone/run/log.csv")
    [row_of_two] = read_log(tmp_path / "together/run/log.csv")
    assert row["distill"] > 0
    assert row_of_two["distill"] == pytest.approx(row["distill"], rel=1e-3)
