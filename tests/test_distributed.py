"""Several processes (gloo, on this CPU) train what one trains, and read each other's states."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import terdit
import train
from terdit import load_model, pack_model
from tests.conftest import ROOT
from tests.helpers import load_run, model_of, read_log, same, short_training, shorten  # noqa: F401
from tests.test_runs import FORKS

FLAGS = """--batch 12 --image-size 8 --steps 10 --save-every 5 --grid 4 --dtype fp32 --lr 2e-3
    --device cpu --out""".split()


def train_small(flags, environment, pause=0.0):
    """What one process does: train.py with a small model and few digits. OUT/losses.txt has each
    loss. No matrix divides evenly over 3 processes, and each alpha lies on one process alone."""
    os.environ |= environment
    shorten(pytest.MonkeyPatch())
    terdit.SIZES["tiny"] |= dict(dim=40, n_layers=2, n_heads=2, multiple_of=20)
    train_step = train.train_step

    def train_step_and_note(run, batch, progress):
        time.sleep(pause)
        stats = train_step(run, batch, progress)
        if train.ranks()[0] == 0:
            with open(Path(run.settings.out) / "losses.txt", "a") as file:
                print(stats.loss, file=file)
        return stats

    train.train_step = train_step_and_note
    train.run_main(lambda: train.main(flags))


def launch_variables(rank, world, port):
    """What torchrun sets for one of its processes."""
    variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return {name: str(value) for name, value in variables.items()}


def start(n, *arguments):
    """Start n processes as torchrun would -> the processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = [str(argument) for argument in arguments]
    processes = []
    for rank in range(n):
        variables = launch_variables(rank, n, port)
        processes.append(FORKS.Process(target=train_small, args=(arguments, variables)))
        processes[-1].start()
    return processes


def train_on(n, out, *flags, command=FLAGS):
    """Train on n processes to the end -> the loss of each step."""
    losses = out / "losses.txt"
    losses.unlink(missing_ok=True)
    for process in start(n, *command, out, *flags):
        process.join()
        assert process.exitcode == 0
    return [float(line) for line in losses.read_text().split()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folders of one process and of two, and the loss of each step of both."""
    one = tmp_path_factory.mktemp("one")
    two = tmp_path_factory.mktemp("two")
    return one, two, train_on(1, one), train_on(2, two, "--micro-batch", 4)


def test_two_processes_train_what_one_trains(runs):
    one, two, losses, losses_of_two = runs
    assert len(losses) == 10
    assert losses_of_two == pytest.approx(losses, rel=1e-5)
    for row, row_of_two in zip(read_log(one / "log.csv"), read_log(two / "log.csv"), strict=True):
        for key in row.keys() - {"images_per_s"}:
            assert row_of_two[key] == pytest.approx(row[key], rel=1e-3), key
    averaged = pack_model(model_of(load_run(two), "ema"))  # its shapes are those of the whole model
    assert same(dict(load_model(two / "packed.pt").state_dict()), dict(averaged.state_dict()))


@pytest.mark.parametrize("n", [3, 1])
def test_other_numbers_of_processes_go_on_from_the_state_of_two(runs, tmp_path, n):
    """The state says all the rest."""
    _, two, losses, _ = runs
    shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run/state-0000010.pt").unlink()
    command = ["--device", "cpu", "--out"]
    assert train_on(n, tmp_path / "run", command=command) == pytest.approx(losses[5:], rel=1e-5)


def test_a_batch_that_does_not_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ranks", lambda: (0, 2))
    with pytest.raises(ValueError, match="^--batch 7 does not split over 2 processes$"):
        train.main([*FLAGS, str(tmp_path), "--batch", "7"])


@pytest.mark.parametrize("changes, message", [
    (dict(LOCAL_WORLD_SIZE="0"), "the variable LOCAL_WORLD_SIZE is '0', expected a number"),
    (dict(RANK="one"), "the variable RANK is 'one', expected a number"),
    ({}, "2 processes cannot meet at 127.0.0.1:{port} ("),  # another program listens there
])
def test_variables_that_cannot_be_meant_are_named(tmp_path, monkeypatch, capfd, changes, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in (launch_variables(0, 2, port) | changes).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError) as e:
            train.main([*FLAGS, str(tmp_path / "run")])
    assert str(e.value).startswith(message.format(port=port))
    assert "\n" not in str(e.value)
    waiting = f"process 0 is waiting for 2 processes at 127.0.0.1:{port}\n"
    assert (waiting in capfd.readouterr().err) == (changes == {})
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_killed_ends_the_other(runs, tmp_path):
    killed, other = start(2, *FLAGS, tmp_path, "--save-every", 1)
    while killed.is_alive() and not train.states(tmp_path):
        time.sleep(0.01)
    killed.kill()
    other.join()
    step = load_run(tmp_path)["step"]
    assert other.exitcode == 1
    assert step < 10
    assert train_on(2, tmp_path) == pytest.approx(runs[2][step:], rel=1e-5)


def test_a_launcher_that_is_told_to_stop_takes_its_processes_along(runs, tmp_path):
    """Both save at the same step and exit. The same command goes on."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    command = [sys.executable, *launcher, "-m", "tests.test_distributed", *FLAGS, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None and not (tmp_path / "losses.txt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    step = load_run(tmp_path)["step"]
    assert process.returncode != 0
    assert step < 10
    assert train_on(2, tmp_path) == pytest.approx(runs[2][step:], rel=1e-5)


def test_two_processes_start_from_full_precision_as_one_does(tmp_path):
    train_on(1, tmp_path / "full", "--full-precision", "--steps", 5)
    flags = ("--steps", 5, "--init", tmp_path / "full")
    alone = train_on(1, tmp_path / "alone", *flags)
    assert train_on(2, tmp_path / "together", *flags) == pytest.approx(alone, rel=1e-3)


if __name__ == "__main__":
    train_small(sys.argv[1:], {}, pause=0.2)
