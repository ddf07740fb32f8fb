"""Several processes (gloo, on this CPU) train what one trains, and read each other's states."""

import multiprocessing
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

# A server that has imported already what a first step needs. The processes that it forks start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers", "torch._dynamo", "torch.distributed.fsdp"])
FLAGS = "--batch 12 --image-size 8 --steps 10 --save-every 5 --grid 4 --dtype fp32 --lr 2e-3 --device cpu --out".split()


def train_small(flags, environment, pause=0.0):
    """What one process does: train.py with a small model and few digits, each loss noted in OUT/losses.txt.

    The sizes are odd on purpose: no matrix divides evenly over 3 processes, and each alpha lies on one process alone.
    """
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


def start(n, out, *flags):
    """Start n processes as torchrun would -> the processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    names = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    arguments = [*FLAGS, str(out), *map(str, flags)]
    processes = []
    for rank in map(str, range(n)):
        environment = names | dict(RANK=rank, LOCAL_RANK=rank)
        processes.append(FORKS.Process(target=train_small, args=(arguments, environment)))
        processes[-1].start()
    return processes


def train_on(n, out, *flags):
    """Train on n processes to the end -> the loss of each step."""
    losses = out / "losses.txt"
    losses.unlink(missing_ok=True)
    for process in start(n, out, *flags):
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
    _, two, losses, _ = runs
    shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run/state-0000010.pt").unlink()
    assert train_on(n, tmp_path / "run") == pytest.approx(losses[5:], rel=1e-5)


def test_a_batch_that_does_not_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ranks", lambda: (0, 2))
    with pytest.raises(ValueError, match="^--batch 7 does not split evenly over 2 processes$"):
        train.main([*FLAGS, str(tmp_path), "--batch", "7"])


def test_a_process_that_is_killed_ends_the_other(runs, tmp_path):
    killed, other = start(2, tmp_path, "--save-every", 1)
    while killed.is_alive() and not train.states(tmp_path):
        time.sleep(0.01)
    killed.kill()
    other.join()
    step = load_run(tmp_path)["step"]
    assert other.exitcode == 1 and step < 10
    assert train_on(2, tmp_path) == pytest.approx(runs[2][step:], rel=1e-5)


def test_a_launcher_that_is_told_to_stop_takes_its_processes_along(runs, tmp_path):
    """Both save at the same step and exit. The same command goes on."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=2 -m tests.test_distributed".split()
    with subprocess.Popen([sys.executable, *launcher, *FLAGS, str(tmp_path)], cwd=ROOT) as process:
        while process.poll() is None and not (tmp_path / "losses.txt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    step = load_run(tmp_path)["step"]
    assert process.returncode != 0 and step < 10
    assert train_on(2, tmp_path) == pytest.approx(runs[2][step:], rel=1e-5)


def test_two_processes_learn_from_full_precision_and_a_teacher_as_one_does(tmp_path):
    train_on(1, tmp_path / "full", "--full-precision", "--steps", 5)
    flags = ("--steps", 5, "--init", tmp_path / "full", "--teacher", tmp_path / "full/full.pt")
    alone = train_on(1, tmp_path / "alone", *flags)
    assert train_on(2, tmp_path / "together", *flags) == pytest.approx(alone, rel=1e-3)
    [row] = read_log(tmp_path / "alone/log.csv")
    [row_of_two] = read_log(tmp_path / "together/log.csv")
    assert row_of_two["distill"] == pytest.approx(row["distill"], rel=1e-3) and row["distill"] > 0


if __name__ == "__main__":
    train_small(sys.argv[1:], {}, pause=0.2)
