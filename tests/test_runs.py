"""Runs as people use them: stopped, killed, continued, started twice, on a full disk, with damaged states."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import pytest
import torch

import sample
import train
from terdit import load_model, pack_model
from tests.helpers import load_run, model_of, read_log, run, same, short_training, shorten  # noqa: F401

# A server that has imported already what a first step needs. The processes that it forks start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers", "torch._dynamo"])


def at_step(monkeypatch, step, action):
    """Call action() within this step, before it counts as done."""
    update_average = train.update_average

    def update_and_act(run):
        update_average(run)
        if run.step + 1 == step:
            action()

    monkeypatch.setattr(train, "update_average", update_and_act)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_can_be_sampled_and_ends_as_if_it_had_not(tmp_path, monkeypatch, capfd, number):
    """12 steps = 5 steps, a stop by signal, and 7 more: the same bits everywhere."""
    told = []

    def send():
        signal.raise_signal(number)
        told.append(capfd.readouterr().err)

    whole = run(tmp_path / "whole", "--steps", 12)
    at_step(monkeypatch, 5, send)
    with pytest.raises(SystemExit) as e:
        run(tmp_path / "halves", "--steps", 12)
    assert e.value.code == 128 + number
    assert told[0].endswith(f"\n{number.name}: ends after this step, and saves\n")
    assert load_run(tmp_path / "halves")["step"] == 5
    averaged = pack_model(model_of(load_run(tmp_path / "halves"), "ema"))
    assert same(dict(load_model(tmp_path / "halves/packed.pt").state_dict()), dict(averaged.state_dict()))
    flags = f"--ckpt {tmp_path / 'halves'} --n 1 --steps 1 --out {tmp_path / 'drawn.png'} --device cpu"
    sample.main(flags.split())
    assert (tmp_path / "drawn.png").exists()

    assert same(run(tmp_path / "halves", "--steps", 12)["tensors"], whole["tensors"])
    assert (tmp_path / "halves/packed.pt").read_bytes() == (tmp_path / "whole/packed.pt").read_bytes()


def test_a_second_signal_ends_a_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    at_step(monkeypatch, 3, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(SystemExit) as e:
        run(tmp_path, "--steps", 12, "--save-every", 2)
    assert e.value.code == 128 + signal.SIGINT
    assert load_run(tmp_path)["step"] == 2


def test_nohup_keeps_a_run_going(tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
    assert run(tmp_path, "--steps", 3)["step"] == 3


def run_in_a_process(*arguments):
    shorten(pytest.MonkeyPatch())
    run(*arguments)


def test_killed_runs_go_on_exactly(tmp_path):
    """SIGKILL at random moments of a run that saves at every step."""
    flags = ("--steps", 40, "--save-every", 1)
    rng = random.Random(0)
    for _ in range(5):
        before = train.states(tmp_path / "killed")
        process = FORKS.Process(target=run_in_a_process, args=(tmp_path / "killed", *flags))
        process.start()
        while process.is_alive() and train.states(tmp_path / "killed") == before:
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        load_model(tmp_path / "killed/packed.pt")  # is whole
    assert process.exitcode == -signal.SIGKILL and load_run(tmp_path / "killed")["step"] < 40
    assert same(run(tmp_path / "killed", *flags)["tensors"], run(tmp_path / "whole", *flags)["tensors"])
    assert [path.name for path in train.states(tmp_path / "killed")] == ["state-0000039.pt", "state-0000040.pt"]
    logs = [read_log(tmp_path / name / "log.csv") for name in ("whole", "killed")]  # rows past a state were cut
    for key in ("step", "loss", "val_loss", "lr", "grad_norm"):
        assert [row[key] for row in logs[0]] == [row[key] for row in logs[1]]


def test_what_a_resumed_run_may_change_and_what_not(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--steps", 2, "--micro-batch", 2, "--dtype", "bf16")
    refused = {"--seed 1": "seed", "--batch 8": "batch", "--lr 1e-5": "lr", "--no-adaln-norm": "adaln_norm",
               "--full-precision": "ternary", "--image-size 12": "input_size", "--size small": "dim"}  # fmt: skip
    for flags, name in refused.items():
        with pytest.raises(ValueError, match=f"was trained with {name}=.*use the same, another --out, or --fresh$"):
            run(tmp_path, "--steps", 3, *flags.split())
    monkeypatch.setattr(train, "cpu_has", lambda *flags: False)  # elsewhere fp32 may be the default
    train.main(f"--batch 4 --grid 0 --image-size 8 --steps 3 --device cpu --out {tmp_path}".split())
    assert "planned for 2 steps before, now 3" in capsys.readouterr().out
    state = load_run(tmp_path)
    assert (state["step"], state["micro_batch"], state["dtype"]) == (3, 2, "bf16")
    state = run(tmp_path, "--steps", 1, "--seed", 1, "--fresh")
    assert (state["step"], state["seed"], state["dtype"], len(train.states(tmp_path))) == (1, 1, "fp32", 1)


def test_damaged_states_are_refused_or_the_same(tmp_path, monkeypatch):
    """200 single bits, half of them where the file says what its parts are; then a file that was cut short."""
    monkeypatch.setitem(train.SIZES, "tiny", train.SIZES["tiny"] | dict(dim=16))
    run(tmp_path, "--steps", 2, "--save-every", 1)
    path = train.states(tmp_path)[-1]
    content = path.read_bytes()
    want = load_run(tmp_path)["tensors"]
    rng = random.Random(0)
    places = [rng.randrange(len(content)) for _ in range(100)]
    places += [rng.choice([rng.randrange(20000), -1 - rng.randrange(20000)]) for _ in range(100)]
    n_refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(train.read_state(tmp_path)["tensors"], want), place
        except ValueError as e:
            assert str(e).startswith(str(path)) and "\n" not in str(e)
            n_refused += 1
    assert n_refused > 100
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="Delete it to go on from the one before"):
        run(tmp_path, "--steps", 3)
    path.unlink()
    assert run(tmp_path, "--steps", 3)["step"] == 3


def test_a_full_disk_keeps_the_state_before(tmp_path):
    """The model fits and is written first, so it is never older than the state. The state does not fit."""
    before = run(tmp_path, "--steps", 2)["tensors"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^[^\n]*state-0000004.pt: cannot be written; [^\n]*$"):
            run(tmp_path, "--steps", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-0000002.pt"]
    assert same(load_run(tmp_path)["tensors"], before)
    model = (tmp_path / "packed.pt").read_bytes()
    assert run(tmp_path, "--steps", 4)["step"] == 4
    assert (tmp_path / "packed.pt").read_bytes() == model


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with train.locked(tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path}: another run is at work there: .* another --out$"):
            run(tmp_path, "--steps", 1, "--fresh")
    assert os.listdir(tmp_path) == ["lock"]
    assert run(tmp_path, "--steps", 1)["step"] == 1


def test_out_of_memory_is_one_line():
    with pytest.raises(SystemExit, match="^error: out of memory .* A smaller --micro-batch or --batch takes less$"):
        sample.run_main(lambda: torch.empty(1 << 60, dtype=torch.uint8))


def test_a_long_step_shows_life(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))  # each look at the clock is 20 s later
    monkeypatch.setattr(time, "time", lambda: next(clock))
    run(tmp_path, "--batch", 8, "--micro-batch", 2, "--steps", 2)
    assert capsys.readouterr().err.startswith("step 1/2: 12.5%, ")
