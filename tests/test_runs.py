"""Runs as people use them: stopped, killed, started twice, with damaged or hostile states; and what they print."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from terdit import load_model
from tests.helpers import load_run, read_log, run, short_training  # noqa: F401

# The average ----------------------------------------------------------------------------------------------------------


def test_the_average_warms_up():
    """Against the recurrence, by hand: the decay at n averaged weights is (1 + n) / (10 + n), at most 0.5 here."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = train.AveragedModel(model, multi_avg_fn=train.warmed_up_average(0.5))
    want = 0.0
    for n in range(20):
        model.weight.data.fill_(n)
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0
        want = decay * want + (1 - decay) * n
    assert ema.module.weight.item() == pytest.approx(want, rel=1e-6)


def test_a_short_run_forgets_its_random_start():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = train.AveragedModel(model, multi_avg_fn=train.warmed_up_average(0.9999))
    model.weight.data.fill_(1)
    ema.update_parameters(model)
    model.weight.data.fill_(0)
    for _ in range(99):
        ema.update_parameters(model)
    assert ema.module.weight.item() < 1e-6  # a decay of 0.9999 from the start would leave 0.99


# A run that has not ended ---------------------------------------------------------------------------------------------


def draw(ckpt, folder):
    """sample.py --ckpt CKPT -> the picture's pixels."""
    path = folder / "drawn.png"
    sample.main(["--ckpt", str(ckpt), "--n", "4", "--steps", "2", "--out", str(path), "--device", "cpu"])
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("flags, file", [([], "packed.pt"), (["--full-precision"], "full.pt")])
def test_a_stopped_run_can_be_sampled_and_exported(tmp_path, capsys, flags, file):
    out = tmp_path / "run"
    run(out, "--steps", 3, *flags)
    exported = (out / file).read_bytes()
    want = draw(out / file, tmp_path)
    (out / file).unlink()
    capsys.readouterr()
    assert np.array_equal(draw(out, tmp_path), want)
    shown = capsys.readouterr().out
    assert "the averaged weights of a training state" in shown
    assert "state-0000003" in shown
    assert np.array_equal(draw(out / "state-0000003", tmp_path), want)
    assert not (out / file).exists()

    train.main(["--export", "--out", str(out)])
    assert (out / file).read_bytes() == exported
    assert np.array_equal(draw(out, tmp_path), want)


def test_the_newest_of_a_run_folder_is_taken(tmp_path):
    run(tmp_path, "--steps", 2)
    assert sample.find_checkpoint(tmp_path) == tmp_path / "packed.pt"
    os.utime(tmp_path / "packed.pt", (1, 1))  # as if the run had gone on and were stopped then
    assert sample.find_checkpoint(tmp_path) == tmp_path / "state-0000002"
    assert train.read_init(tmp_path)[0] == load_model(tmp_path / "packed.pt").config  # --init takes a run folder, too
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in it: a run folder holds packed.pt"):
        load_model(sample.find_checkpoint(tmp_path / "empty"))
    with pytest.raises(ValueError, match="empty holds no state of a run"):
        train.main(["--export", "--out", str(tmp_path / "empty")])


def test_fewer_steps_than_are_done_are_refused_with_the_cure(tmp_path):
    run(tmp_path, "--steps", 3)
    with pytest.raises(ValueError, match="at step 3 already, --steps says 2: --export writes the model as it is"):
        run(tmp_path, "--steps", 2)


# How runs end ---------------------------------------------------------------------------------------------------------


def at_step(monkeypatch, step, action):
    """Call action() within the update of this step."""
    update = train.AveragedModel.update_parameters
    steps_done = 0

    def update_and_act(*args):
        nonlocal steps_done
        steps_done += 1
        if steps_done == step:
            action()
        update(*args)

    monkeypatch.setattr(train.AveragedModel, "update_parameters", update_and_act)


def end_of(out, *flags):
    """Run until it ends itself -> its exit code, and the step that it saved."""
    with pytest.raises(SystemExit) as e:
        run(out, "--steps", 12, *flags)
    return e.value.code, load_run(out)["step"]


def test_a_terminal_that_is_closed_between_two_lines_changes_nothing(tmp_path, monkeypatch):
    """SIGHUP comes first, and only then a line that nobody can read."""
    reading_end, writing_end = os.pipe()

    def hang_up():
        os.close(reading_end)
        signal.raise_signal(signal.SIGHUP)

    with open(writing_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        at_step(monkeypatch, 3, hang_up)
        assert end_of(tmp_path) == (128 + signal.SIGHUP, 4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_saved_and_are_told_at_once(tmp_path, monkeypatch, capfd, number):
    told = []

    def send():
        signal.raise_signal(number)
        told.append(capfd.readouterr().err)

    at_step(monkeypatch, 3, send)
    assert end_of(tmp_path) == (128 + number, 4)
    assert told == [f"\n{number.name}: ends after this step, and saves\n"]


def test_nohup_keeps_a_run_going(tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
    assert run(tmp_path, "--steps", 3)["step"] == 3


def test_a_closed_stdout_ends_a_run_saved(tmp_path, monkeypatch):
    """`train.py | head`: the reader goes away. All that is printed later goes nowhere, and nothing fails."""
    monkeypatch.setattr(sample.Progress, "LINE_SECONDS", 0)
    reading_end, writing_end = os.pipe()
    with open(writing_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        at_step(monkeypatch, 3, lambda: os.close(reading_end))
        assert end_of(tmp_path) == (128 + signal.SIGTERM, 4)


def interrupt_save(monkeypatch, times):
    """Send Ctrl-C as often in the middle of the next save."""
    save = train.dcp.save

    def interrupted_save(*args, **kwargs):
        monkeypatch.setattr(train.dcp, "save", save)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(train.dcp, "save", interrupted_save)


def test_a_second_ctrl_c_does_not_interrupt_a_save(tmp_path, monkeypatch, capfd):
    interrupt_save(monkeypatch, times=2)
    assert end_of(tmp_path, "--save-every", 4) == (128 + signal.SIGINT, 5)
    assert "SIGINT: once more ends without saving" in capfd.readouterr().err


def test_a_third_ctrl_c_does_and_is_said_as_it_is(tmp_path, monkeypatch):
    run(tmp_path, "--steps", 2)
    interrupt_save(monkeypatch, times=3)
    with pytest.raises(SystemExit) as e:
        train.run_main(lambda: run(tmp_path, "--steps", 4))
    assert e.value.code.startswith(f"stopped while {tmp_path}/state-0000004 was written, which is lost")
    assert e.value.code.endswith("state-0000002 is whole")
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-0000002"]


def test_a_process_whose_launcher_was_killed_ends(monkeypatch):
    monkeypatch.setattr(sample, "ranks", lambda: (0, 2))
    stop = train.StopSignal()
    stop.sync()
    assert not stop.requested
    monkeypatch.setattr(os, "getppid", lambda: sample.PARENT + 1)
    stop.sync()
    assert stop.requested
    assert stop.received == signal.SIGTERM


def test_a_clock_that_stands_still_is_survived(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert run(tmp_path, "--steps", 12, "--grid", 2, "--sample-every", 6)["step"] == 12


def test_images_per_second_leave_out_the_first_step(tmp_path, monkeypatch):
    """A first step of 100 seconds, as compiling takes, then 2 seconds a step of 4 images."""
    now = 1000.0
    train_step = train.train_step

    def timed_step(run, batch, show_part):
        nonlocal now
        now += 2 if run.step else 100
        return train_step(run, batch, show_part)

    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(train, "train_step", timed_step)
    run(tmp_path, "--steps", 30)
    assert [row["images_per_s"] for row in read_log(tmp_path / "log.csv")] == [2, 2, 2]


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_at_a_grid_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", no_space)
    with pytest.raises(OSError, match=r"grid-0000002.png: cannot be written \(.*No space left"):
        run(tmp_path, "--steps", 4, "--grid", 2, "--sample-every", 2)


def test_a_full_disk_at_export_names_the_file(tmp_path, monkeypatch):
    run(tmp_path, "--steps", 2)
    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match=r"packed.pt: cannot be written \(.*No space left"):
        run(tmp_path, "--steps", 2)


# Two runs in one folder -----------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with train.locked(tmp_path):
        with pytest.raises(ValueError, match=f"--out {tmp_path}: process {os.getpid()} on .* trains there: wait"):
            run(tmp_path, "--steps", 1, "--fresh")
    assert os.listdir(tmp_path) == ["lock"]
    assert run(tmp_path, "--steps", 1)["step"] == 1


HOLD_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_no_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, tmp_path / "lock"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another process trains there"):
            run(tmp_path, "--steps", 1)
        process.kill()
    assert run(tmp_path, "--steps", 1)["step"] == 1


def test_a_folder_that_cannot_be_locked_is_told(tmp_path, monkeypatch, capsys):
    def flock(file, flags):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(sample.fcntl, "flock", flock)
    assert run(tmp_path, "--steps", 1)["step"] == 1
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out


# Damaged and hostile states -------------------------------------------------------------------------------------------


@pytest.fixture
def two_states(tmp_path):
    """A run folder with the states of steps 1 and 2, and the newer one."""
    run(tmp_path / "run", "--steps", 2, "--save-every", 1)
    return tmp_path / "run", tmp_path / "run/state-0000002"


def zero_4_kb(state):
    file = next(state.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[20000:24096] = bytes(4096)
    file.write_bytes(content)


def cut_index(state):
    file = state / ".metadata"
    file.write_bytes(file.read_bytes()[:100])


def change_run_json(**changes):
    def change(state):
        file = state / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


DAMAGES = [
    (zero_4_kb, r"__0_0.distcp has changed since it was written"),
    (lambda state: next(state.glob("*.distcp")).unlink(), r"__0_0.distcp is missing"),
    (cut_index, r"\.metadata has changed"),
    (lambda state: (state / "run.json").write_bytes(b"\xff\xfe"), "run.json: UnicodeDecodeError"),
    (lambda state: (state / "run.json").write_text("[]"), "run.json: TypeError"),
    (lambda state: (state / "run.json").write_text("[" * 100000), "run.json: RecursionError"),
    (change_run_json(step="2"), "step='2'"),
    (change_run_json(config=3), "run.json: TypeError"),
    (change_run_json(config={"dim": "x"}), "dim='x', expected a whole number"),
    (change_run_json(checksums=None), "checksums=None"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_damaged_states_are_refused_by_name(two_states, tmp_path, damage, message):
    out, state = two_states
    damage(state)
    for flags in ([out, "--steps", 3], [tmp_path / "tuned", "--steps", 1, "--init", state]):
        with pytest.raises(ValueError, match=rf"state-0000002: damaged \(.*{message}.*\); delete it") as e:
            run(*flags)
        assert "\n" not in str(e.value)
    if (state / "run.json").read_bytes()[:1] == b"{":
        with pytest.raises(ValueError, match=f"state-0000002: damaged .*{message}"):
            draw(state, tmp_path)
    shutil.rmtree(state)
    assert run(out, "--steps", 2)["step"] == 2


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_state_runs_nothing(two_states, tmp_path):
    """Its index is a pickle, and whoever writes it can write its checksum too."""
    out, state = two_states
    target = tmp_path / "hacked"
    (state / ".metadata").write_bytes(pickle.dumps(Evil(target)))
    change_run_json(checksums=train.file_checksums(state))(state)
    for use in (lambda: draw(state, tmp_path), lambda: run(out, "--steps", 3)):
        with pytest.raises(ValueError, match=r"state-0000002: damaged .*speaks of posix.mkdir, and may be hostile"):
            use()
    assert not target.exists()


def enlarge(index, name):
    index.state_dict_metadata[name].size = torch.Size((10**6, 10**6))


def replace_by_text(index, name):
    index.state_dict_metadata[name] = "text"


@pytest.mark.parametrize("change, message", [(enlarge, "speaks of 4,000,0.* bytes"), (replace_by_text, "no attribute")])
def test_a_made_up_index_is_refused(two_states, tmp_path, change, message):
    _, state = two_states
    index = pickle.loads((state / ".metadata").read_bytes())
    change(index, "ema.final_layer.linear.weight")
    (state / ".metadata").write_bytes(pickle.dumps(index))
    change_run_json(checksums=train.file_checksums(state))(state)
    with pytest.raises(ValueError, match=f"state-0000002: damaged .*{message}"):
        draw(state, tmp_path)


def test_a_log_that_is_not_utf_8_loses_its_damaged_rows(tmp_path, capsys):
    run(tmp_path, "--steps", 20, "--save-every", 20)
    with open(tmp_path / "log.csv", "ab") as file:
        file.write(b"21,\xff\xfe\x00\n")
    run(tmp_path, "--steps", 30)
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [10, 20, 30]
    assert "log.csv: a damaged row is left out" in capsys.readouterr().out


def test_a_state_in_bf16_goes_on_in_bf16_anywhere(tmp_path, monkeypatch):
    flags = ["--image-size", "8", "--batch", "4", "--grid", "0", "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(train, "bf16_is_fast", lambda device: True)
    train.main([*flags, "--steps", "1"])
    monkeypatch.setattr(train, "bf16_is_fast", lambda device: False)
    train.main([*flags, "--steps", "2"])
    assert load_run(tmp_path)["dtype"] == "bf16"
    with pytest.raises(ValueError, match="was trained with dtype='bf16', this command says 'fp32'"):
        train.main([*flags, "--steps", "3", "--dtype", "fp32"])


# What people see ------------------------------------------------------------------------------------------------------


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    progress = sample.Progress(100, "reading images")
    for second in range(40):
        now = 100.0 + second
        progress(1)
    assert capsys.readouterr().err == "reading images  16%, 79 s left\nreading images  31%, 67 s left\n"


def test_the_curve_is_drawn_at_every_grid(tmp_path, monkeypatch):
    drawn_at = []
    draw_curve = train.draw_curve

    def note_and_draw(out):
        drawn_at.append(read_log(out / "log.csv")[-1]["step"])
        draw_curve(out)

    monkeypatch.setattr(train, "draw_curve", note_and_draw)
    run(tmp_path, "--steps", 220, "--batch", 2, "--grid", 2, "--sample-every", 100)
    assert drawn_at == [100, 200, 220]
    pixels = np.asarray(Image.open(tmp_path / "curve.png")).reshape(-1, 3)
    for colour in ((70, 130, 180), (255, 140, 0), (46, 139, 87)):  # loss, val_loss, flipped
        assert (pixels == colour).all(1).sum() > 20


def test_a_log_with_fewer_columns_goes_on(tmp_path):
    """As a train.py wrote it that did not know teachers."""
    run(tmp_path, "--steps", 20)
    path = tmp_path / "log.csv"
    lines = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    run(tmp_path, "--steps", 30)
    assert [row["step"] for row in read_log(path)] == [10, 20, 30]
    assert path.read_text().splitlines()[1] == lines[1] + ","


def test_the_curve_of_given_rows(tmp_path):
    row = ["" for _ in train.Log.FIELDS]
    lines = [",".join(train.Log.FIELDS)]
    for step, loss in ((50, "0.5"), (100, "1.0")):
        row[0] = str(step)
        row[1] = loss
        lines.append(",".join(row))
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    train.draw_curve(tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "curve.png"))
    is_loss = (pixels == (70, 130, 180)).all(2)
    y, x = np.nonzero(is_loss[:, :540])  # without the legend
    assert abs(x.min() - (60 + 280)) <= 1  # half of the steps
    assert abs(y[x == x.min()].mean() - (20 + 100)) <= 2  # half of the highest
    assert not (pixels == (255, 140, 0)).all(2)[:, :540].any()


def test_terminals_that_are_closed_do_not_stop_sampling(monkeypatch):
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    monkeypatch.setattr(sample.Progress, "LINE_SECONDS", 0)
    with open(writing_end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        progress = sample.Progress(2)
        progress(1)
        progress(1)


