"""Runs as people use them: stopped, killed, continued, copied, started twice, on a full disk."""

import errno
import fcntl
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch

import sample
import train
from terdit import load_model, pack_model
from tests.conftest import ROOT
from tests.helpers import load_run, model_of, read_log, run, same, save_image, shorten
from tests.helpers import short_training  # noqa: F401

# A server that has imported already what a first step needs. Processes that it forks start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers", "torch._dynamo", "torch.distributed.fsdp"])


def go_on(out, *flags):
    """Name the run folder, and what changes -> the state at the end."""
    train.main(["--device", "cpu", "--out", str(out), *map(str, flags)])
    return load_run(out)


def at_step(monkeypatch, step, action):
    """Call action() within this step, before it counts as done."""
    update_average = train.update_average

    def update_and_act(run):
        update_average(run)
        if run.step + 1 == step:
            action()

    monkeypatch.setattr(train, "update_average", update_and_act)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_ends_as_if_it_had_not(tmp_path, monkeypatch, capfd, number):
    """12 steps = 5 steps, a stop by signal, and 7 more: the same bits everywhere."""
    told = []

    def send():
        signal.raise_signal(number)
        told.append(capfd.readouterr().err)

    whole = run(tmp_path / "whole", "--steps", 12)
    halves = tmp_path / "halves"
    at_step(monkeypatch, 5, send)
    with pytest.raises(SystemExit) as e:
        run(halves, "--steps", 12)
    assert e.value.code == 128 + number
    assert told[0].endswith(f"\n{number.name}: ends after this step, and saves\n")
    advice = f"stopped at step 5; python train.py --out {halves} goes on\n"
    assert capfd.readouterr().out.endswith(advice)
    assert load_run(halves)["step"] == 5
    averaged = pack_model(model_of(load_run(halves), "ema"))
    packed = load_model(halves / "packed.pt")
    assert same(dict(packed.state_dict()), dict(averaged.state_dict()))

    signal.signal(number, signal.SIG_DFL)
    whole_command = number == signal.SIGINT
    state = run(halves, "--steps", 12) if whole_command else go_on(halves)
    assert same(state["tensors"], whole["tensors"])
    model = (tmp_path / "whole/packed.pt").read_bytes()
    assert (halves / "packed.pt").read_bytes() == model


def test_nohup_keeps_a_run_going(tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
    assert run(tmp_path, "--steps", 3)["step"] == 3


def run_in_a_process(signal_step, *arguments):
    """A run that gets SIGTERM twice in the step number signal_step."""
    patch = pytest.MonkeyPatch()
    shorten(patch)
    at_step(patch, signal_step, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
    run(*arguments)


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    arguments = (3, tmp_path, "--steps", 12, "--save-every", 2)
    process = FORKS.Process(target=run_in_a_process, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert load_run(tmp_path)["step"] == 2


def test_killed_runs_go_on_exactly(tmp_path):
    """SIGKILL at random moments of a run that saves at every step."""
    flags = ("--steps", 40, "--save-every", 1)
    killed = tmp_path / "killed"
    rng = random.Random(0)
    for _ in range(5):
        before = train.states(killed)
        process = FORKS.Process(target=run_in_a_process, args=(0, killed, *flags))
        process.start()
        while process.is_alive() and train.states(killed) == before:
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        load_model(killed / "packed.pt")  # is whole
    assert process.exitcode == -signal.SIGKILL
    assert load_run(killed)["step"] < 40
    for name in ("state.tmp", "model.tmp", "log.tmp"):
        (killed / name).write_bytes(b"what a kill has left")
    assert same(go_on(killed)["tensors"], run(tmp_path / "whole", *flags)["tensors"])
    left = ["lock", "log.csv", "packed.pt", "state-0000039.pt", "state-0000040.pt"]
    assert sorted(os.listdir(killed)) == left
    # Rows past a state were cut.
    log = read_log(killed / "log.csv")
    for row, want in zip(log, read_log(tmp_path / "whole/log.csv"), strict=True):
        assert row | dict(images_per_s=0) == want | dict(images_per_s=0)


REFUSED = {
    "--size small": "size='tiny', this command says 'small'",
    "--data x": "data=None, this command says '/.*/x'",
    "--vae x": "vae=None, this command says 'x'",
    "--image-size 12": "image_size=8, this command says 12",
    "--no-flip": "flip=True, this command says False",
    "--full-precision": "full_precision=False, this command says True",
    "--alpha-start random": "alpha_start='absmean', this command says 'random'",
    "--no-adaln-norm": "adaln_norm=True, this command says False",
    "--qk-norm": "qk_norm=False, this command says True",
    "--batch 8": "batch=4, this command says 8",
    "--lr 1e-5": "lr=0.004, this command says 1e-05",
    "--warmup 7": "warmup=50, this command says 7",
    "--beta2 0.9": "beta2=0.99, this command says 0.9",
    "--weight-decay 0": "weight_decay=0.3, this command says 0.0",
    "--ema-decay 0.9": "ema_decay=0.995, this command says 0.9",
    "--seed 1": "seed=0, this command says 1",
}
MAY_CHANGE = "steps micro_batch dtype save_every grid compile device out fresh init".split()


def test_what_a_resumed_run_may_change_and_what_not(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--steps", 2, "--micro-batch", 2, "--dtype", "bf16")
    names = {message.split("=")[0] for message in REFUSED.values()}
    settings = {f.name for f in fields(train.TrainConfig)}
    assert names == settings - {*MAY_CHANGE}, "a new setting belongs into REFUSED or MAY_CHANGE"
    advice = "leave it out, or take another --out, or --fresh"
    for flags, message in REFUSED.items():
        with pytest.raises(ValueError, match=f"^{tmp_path} was made with {message}: {advice}$"):
            go_on(tmp_path, "--steps", 3, *flags.split())

    capsys.readouterr()
    monkeypatch.setattr(train, "cpu_has", lambda *flags: False)  # fp32 would be the default
    compiled = []
    monkeypatch.setattr(train, "can_compile", compiled.append)
    flags = ["--steps", 4, "--save-every", 1, "--grid", 1, "--compile"]
    state = go_on(tmp_path, *flags, "--batch", 4, "--lr", 4e-3, "--seed", 0)
    said = capsys.readouterr().out
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert notes == ["note: steps was 2, now it is 4: the learning rate follows"]
    assert (state["step"], state["micro_batch"], state["dtype"]) == (4, 2, "bf16")
    assert compiled == ["cpu"]
    assert {"grid-0000003.png", "grid.png", "state-0000003.pt"} < {*os.listdir(tmp_path)}

    go_on(tmp_path, "--steps", 5, "--micro-batch", 4, "--dtype", "fp32", "--no-compile")
    said = capsys.readouterr().out
    assert "note: micro_batch was 2, now it is 4: sums round differently\n" in said
    assert "note: dtype was bf16, now it is fp32: products round differently\n" in said
    state = go_on(tmp_path)  # it has ended: nothing is left to do
    assert (state["step"], state["micro_batch"], state["dtype"]) == (5, 4, "fp32")


def test_an_older_state_takes_the_defaults_of_new_settings_a_newer_one_is_refused(tmp_path):
    run(tmp_path, "--steps", 2)
    path = train.states(tmp_path)[-1]
    state = torch.load(path, weights_only=True)
    for name in ("alpha_start", "weight_decay"):
        del state["settings"][name]
    torch.save(state, path)
    went_on = go_on(tmp_path, "--steps", 3, "--alpha-start", "absmean")
    assert went_on["alpha_start"] == "absmean" and went_on["weight_decay"] == 0.3  # tiny's recipe
    for part in ("settings", "config"):
        newer = state | {part: state[part] | dict(colour=1)}
        torch.save(newer, train.states(tmp_path)[-1])
        message = f"^{tmp_path}: its state is of another train.py .*'colour'"
        with pytest.raises(ValueError, match=message):
            go_on(tmp_path)


def test_fresh_starts_over_and_one_model_file_stays(tmp_path, monkeypatch):
    run(tmp_path, "--steps", 2, "--dtype", "bf16")
    before = []
    at_step(monkeypatch, 2, lambda: before.extend(os.listdir(tmp_path)))
    state = run(tmp_path, "--steps", 2, "--seed", 1, "--fresh", "--full-precision")
    assert (state["step"], state["seed"], state["dtype"]) == (2, 1, "fp32")
    assert "packed.pt" in before  # until the first save
    assert sorted(os.listdir(tmp_path)) == ["full.pt", "lock", "log.csv", "state-0000002.pt"]
    assert go_on(tmp_path, "--steps", 3)["fresh"] is False


def test_a_run_and_its_images_may_move(tmp_path, capsys):
    for name in "ab":
        save_image(tmp_path / "photos" / name / "x.png")
    run(tmp_path / "first", "--data", tmp_path / "photos", "--steps", 2)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").glob("*.*")}

    copy = tmp_path / "copy"
    state = go_on(copy, "--steps", 3)
    assert (state["step"], state["out"]) == (3, str(copy))
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "first").glob("*.*")}

    moved = (tmp_path / "photos").rename(tmp_path / "moved")
    capsys.readouterr()
    assert go_on(copy, "--steps", 4)["step"] == 4  # the cache is complete
    gone = f"{tmp_path}/photos is not there: its images are taken from {copy}/images-8\n"
    assert gone in capsys.readouterr().out
    np.save(copy / "images-8/status.npy", np.full(2, train.MISSING, np.uint8))
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/photos/a/x.png and the 1 after it"):
        go_on(copy, "--steps", 5)
    capsys.readouterr()
    assert go_on(copy, "--steps", 5, "--data", moved)["data"] == str(moved)
    assert "is not there" not in capsys.readouterr().out
    assert go_on(copy, "--steps", 6)["data"] == str(moved)  # noted in the state


def test_copies_of_states_are_neither_taken_nor_deleted(tmp_path, capsys):
    run(tmp_path, "--steps", 2)
    names = "state-0000010 (copy).pt", "state-best.pt", "state-10.pt", "state-00000011.pt"
    for name in names:
        shutil.copy(tmp_path / "state-0000002.pt", tmp_path / name)
    run(tmp_path, "--steps", 5, "--save-every", 1)
    assert "steps 2-5 of 4 images" in capsys.readouterr().out
    found = {path.name for path in tmp_path.glob("state-*")}
    assert found == {*names, "state-0000004.pt", "state-0000005.pt"}
    run(tmp_path, "--steps", 1, "--fresh")
    assert {path.name for path in tmp_path.glob("state-*")} == {*names, "state-0000001.pt"}


def test_states_that_are_cut_short_or_old_are_refused(tmp_path):
    run(tmp_path, "--steps", 2)
    path = tmp_path / "state-0000009.pt"
    content = (tmp_path / "state-0000002.pt").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    advice = r"If it is damaged, delete it to go on from the one before, or --fresh$"
    ours = r"a state of this train.py \(format 'terdit-state-5'\)"
    with pytest.raises(ValueError, match=rf"^{path}: not {ours}, or damaged \(.*\)\. {advice}"):
        go_on(tmp_path)
    torch.save(dict(format="terdit-state-4", step=9, steps=9, tensors={}), path)
    with pytest.raises(ValueError, match=rf"^{path}: not {ours}, but 'terdit-state-4'\. {advice}"):
        go_on(tmp_path)
    path.unlink()
    assert go_on(tmp_path, "--steps", 3)["step"] == 3


def test_fresh_keeps_the_old_run_until_its_first_save(tmp_path):
    run(tmp_path, "--steps", 2)
    with pytest.raises(ValueError, match="not finite: stopped"):
        run(tmp_path, "--steps", 9, "--fresh", "--lr", "1e9")
    assert [path.name for path in train.states(tmp_path)] == ["state-0000002.pt"]
    assert run(tmp_path, "--steps", 1, "--fresh")["step"] == 1
    assert [path.name for path in train.states(tmp_path)] == ["state-0000001.pt"]
    (tmp_path / "state-0000001.pt").unlink()
    with pytest.raises(ValueError, match="holds packed.pt but no state: .* or --fresh$"):
        run(tmp_path, "--steps", 1)


def test_a_full_disk_keeps_the_state_before(tmp_path):
    """The model fits and is written first, so it is never older than the state, which does not."""
    before = run(tmp_path, "--steps", 2)["tensors"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    reason = r"state-0000004.pt: cannot be written \(\[Errno 27\] File too large\)$"
    try:
        with pytest.raises(OSError, match=rf"^[^\n]*{reason}"):
            run(tmp_path, "--steps", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = ["lock", "log.csv", "packed.pt", "state-0000002.pt"]
    assert sorted(os.listdir(tmp_path)) == left
    assert same(load_run(tmp_path)["tensors"], before)
    model = (tmp_path / "packed.pt").read_bytes()
    assert run(tmp_path, "--steps", 4)["step"] == 4
    assert (tmp_path / "packed.pt").read_bytes() == model


def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    with train.locked(tmp_path):
        refusal = f"{tmp_path}: another run is at work there: .* another --out$"
        with pytest.raises(ValueError, match=refusal):
            run(tmp_path, "--steps", 1, "--fresh")
    assert os.listdir(tmp_path) == ["lock"]

    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on some network disks
    assert run(tmp_path, "--steps", 1)["step"] == 1
    warning = f"warning: {tmp_path} cannot be locked ([Errno 38] Function not implemented): "
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize("library", [np, torch])  # a MemoryError, a RuntimeError
def test_out_of_memory_is_one_line(library):
    line = "^error: out of memory; a smaller --batch or --micro-batch takes less.*$"
    with pytest.raises(SystemExit, match=line):
        sample.run_main(lambda: library.empty(1 << 60, dtype=library.uint8))


def test_a_long_step_shows_life(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))  # each look at the clock is 20 s later
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run(tmp_path, "--batch", 8, "--micro-batch", 2, "--steps", 2)
    assert capsys.readouterr().err.startswith("step 1/2: 12.5%, ")


def test_a_reader_of_the_first_line_ends_nothing(tmp_path):
    """`python train.py | head -1`."""
    save_image(tmp_path / "data/a/x.png")
    flags = "--data data --image-size 8 --steps 1 --batch 1 --grid 0 --out run --device cpu"
    command = [sys.executable, ROOT / "train.py", *flags.split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | dict(PYTHONUNBUFFERED="")  # what is said at the end meets no reader
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    assert process.stdout.readline().startswith("1 images of 1 classes, {'a': 1}")
    process.stdout.close()
    lines = process.stderr.read().splitlines()
    assert process.wait() == 0
    assert [line.split(":")[0] for line in lines] == ["reading images", "step 1/1"]
    assert (tmp_path / "run/packed.pt").is_file()


def save_without_descriptors(path):
    """What a daemon is: 0, 1 and 2 are closed, so its next file could get number 1 or 2."""

    def main():
        with open(path, "wb") as file:
            print("said")
            os.write(1, b"said by a library")
            os.write(2, b"said by a signal handler")
            file.write(b"a state")

    for descriptor in range(3):
        os.close(descriptor)
    sys.stdout = None
    sys.stderr = None
    sample.run_main(main)


def test_no_file_gets_what_is_said(tmp_path):
    process = FORKS.Process(target=save_without_descriptors, args=(tmp_path / "state",))
    process.start()
    process.join()
    assert (tmp_path / "state").read_bytes() == b"a state"
    assert process.exitcode == 0
