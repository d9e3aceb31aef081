"""What is printed where: a bar on a terminal, few and plain lines in a pipe, nothing on other ranks."""

import os
import pty
import re
import subprocess
import sys

import pytest

from nanocnn import progress
from nanocnn.progress import Progress, duration, epoch_line, size

ROW = dict(epoch=3, step=300, loss=1.25, train_accuracy=0.567, test_accuracy=0.5, images_per_second=4321.0)
ROW |= dict(communication=0.031, lr=0.05, memory=1_230_000_000, seconds=12.0)


def test_epoch_line_says_what_a_user_asks():
    line = epoch_line(ROW, epochs=20)
    assert line.startswith("epoch  3/20  loss 1.2500  train 56.7%  test 50.0%  4,321 images/s  comm 3.1%  lr 0.05")
    assert line.endswith("1.23 GB  12 s  ETA 3 min 24 s")


def test_epoch_line_leaves_out_what_is_not_known():
    assert epoch_line({"epoch": 1, "loss": float("nan")}) == "epoch 1  loss nan"
    assert "ETA" not in epoch_line(ROW, epochs=3)  # the last one


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_size():
    assert (size(312_400_000), size(1.42e9)) == ("312 MB", "1.42 GB")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test winds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run_epoch(clock, seconds_per_step, steps=100, **options):
    with Progress(total=steps, label="epoch 1/2", **options) as bar:
        for step in range(1 + options.get("done", 0), steps + 1):
            clock[0] += seconds_per_step
            bar.update(step, loss=2.0, accuracy=0.5, rate=1000)


def test_plain_lines_at_most_one_in_ten_seconds(clock, capsys):
    run_epoch(clock, seconds_per_step=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0] == "epoch 1/2  step 20/100  loss 2.0000  train 50.0%  1,000 images/s  ETA 40 s"


def test_a_short_epoch_prints_no_line(clock, capsys):
    run_epoch(clock, seconds_per_step=0.05)
    assert capsys.readouterr().out == ""


def test_steps_of_before_the_resume_do_not_count_in_the_time_left(clock, capsys):
    run_epoch(clock, seconds_per_step=1, done=80)
    assert "step 90/100" in (line := capsys.readouterr().out.splitlines()[0])
    assert line.endswith("ETA 10 s")


def test_other_ranks_print_nothing(clock, capsys):
    run_epoch(clock, seconds_per_step=20, active=False)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_no_steps_and_missing_figures(clock, capsys):
    with Progress(total=0) as bar:
        clock[0] = 11
        bar.update(0, loss=None)
    assert capsys.readouterr().out == "step 0/0  ETA 0.0 s\n"


def test_a_log_on_a_full_disk_does_not_stop_the_training():
    with open("/dev/full", "w") as full:
        code = "from nanocnn.progress import say; import os; say('a line'); os._exit(7)"
        assert subprocess.run([sys.executable, "-c", code], stdout=full, check=False).returncode == 7


def in_terminal(code, **environment):
    """What `code` writes to a terminal of its own."""
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, env={**os.environ, **environment})
    os.close(slave)
    written = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(master)
    assert process.wait() == 0
    return written.decode()


BAR = """
from nanocnn.progress import Progress
with Progress(total=3, label="epoch 1/2", interval=0) as bar:
    for step in 1, 2, 3:
        bar.update(step, loss=1.5, accuracy=0.25, rate=100)
"""


def test_a_terminal_gets_a_bar():
    written = in_terminal(BAR, TERM="xterm", COLUMNS="100")
    assert "\x1b[" in written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert re.search(r"epoch 1/2 .*3/3.*loss 1\.5000", plain)


def test_a_dumb_terminal_gets_lines():
    written = in_terminal(BAR, TERM="dumb")
    assert "\x1b" not in written
    assert written.count("epoch 1/2  step") == 3


def test_forced_colours_leave_a_pipe_plain():
    environment = {**os.environ, "FORCE_COLOR": "1"}
    written = subprocess.run([sys.executable, "-c", BAR], env=environment, capture_output=True, text=True, check=True)
    assert "\x1b" not in written.stdout
    assert written.stdout.count("step") == 3
