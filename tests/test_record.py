"""The folder of a run: what is in it, what a resume does to it, and that a bad folder never costs the training."""

import contextlib
import csv
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from nanocnn import record
from nanocnn.kernels import dispatch
from nanocnn.metrics import Metrics
from nanocnn.record import RecordError, Run, peak_memory


def figures(epoch):
    return dict(
        epoch=epoch, step=10 * epoch, loss=1 / epoch, train_accuracy=0.5, test_accuracy=0.4, lr=0.1, seconds=2.0
    )


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


@contextlib.contextmanager
def full_disk():
    """No file may grow: the kernel refuses every write with a true OSError, for root as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# ------------------------------------------------------------------ metrics.csv


def test_a_row_for_each_epoch_with_one_header(tmp_path, capsys):
    run = Run(tmp_path / "runs" / "a", {"epochs": 2})
    run.epoch(**figures(1), val_accuracy=None)
    run.epoch(**figures(2), extra=np.float32(0.5))  # a column that comes later
    assert [row["epoch"] for row in rows(run.folder)] == ["1", "2"]
    assert [row["extra"] for row in rows(run.folder)] == ["", "0.5"]
    assert "val_accuracy" not in rows(run.folder)[0]
    assert int(rows(run.folder)[0]["memory"]) > 1e6
    assert "epoch 1/2  loss 1.0000  train 50.0%" in capsys.readouterr().out


def test_a_resumed_run_replaces_the_epochs_that_it_trains_again(tmp_path):
    first = Run(tmp_path, {})
    for epoch in 1, 2, 3, 4:
        first.epoch(**figures(epoch))
    second = Run(tmp_path, {})
    assert second.load_history() == first.history
    second.epoch(**{**figures(3), "loss": 7.0})
    assert [(row["epoch"], float(row["loss"])) for row in rows(tmp_path)] == [("1", 1.0), ("2", 0.5), ("3", 7.0)]


def test_history_up_to_the_checkpoint(tmp_path):
    first = Run(tmp_path, {})
    for epoch in 1, 2, 3:
        first.epoch(**figures(epoch), note="warm" if epoch == 1 else None)
    history = Run(tmp_path, {}).load_history(until=2)
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0]["note"] == "warm"


def test_a_new_run_in_an_old_folder_starts_its_own_story(tmp_path):
    for _ in range(2):
        run = Run(tmp_path, {})
        run.epoch(**figures(1))
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"epoch,step\n1,10\n2,x\n", b"epoch,step\n1,10\n\xff\xfe", b"a,b\n1,2\n"])
def test_damaged_history_is_a_warning(tmp_path, damage, capsys):
    (tmp_path / "metrics.csv").write_bytes(damage)
    run = Run(tmp_path, {})
    run.load_history()
    assert f"{tmp_path / 'metrics.csv'}: some figures of earlier epochs cannot be read" in capsys.readouterr().err
    run.epoch(**figures(3))
    assert rows(tmp_path)[-1]["epoch"] == "3"


def test_a_kill_leaves_readable_figures(tmp_path):
    """Whatever the moment of the kill: the file is renamed into place, so it is whole at any time."""
    code = """
import sys
from nanocnn.record import Run
run = Run(sys.argv[1], {})
run._draw = lambda: None
for epoch in range(1, 1_000_000):
    run.epoch(epoch=epoch % 50 + 1, step=epoch, loss=0.5)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(30):
        process.stdout.readline()
    process.kill()
    process.communicate()
    assert len(Run(tmp_path, {}).load_history()) > 1


# ------------------------------------------------------------------ TensorBoard


def test_events_can_be_read_by_tensorboard_and_forget_what_was_trained_again(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Run(tmp_path, {})
    for epoch in 1, 2, 3:
        first.epoch(**figures(epoch))
    second = Run(tmp_path, {})
    second._events = Path(f"{second._events}.later")  # the name holds the second of the start
    second.load_history(until=1)
    second.epoch(**{**figures(2), "loss": 7.0})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "accuracy/train", "accuracy/test", "lr"} <= set(events.Tags()["scalars"])
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(10, 1.0), (20, 7.0)]


def test_half_an_event_is_taken_back(tmp_path):
    pytest.importorskip("tensorboard")
    path = tmp_path / "events"
    record._add_events(path, {"epoch": 1, "step": 10}, 0)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, hard))  # the disk has room for five bytes more
    try:
        with pytest.raises(OSError, match="No space left"):
            record._add_events(path, {"epoch": 2, "step": 20}, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as without:
        without.setattr(record.importlib.util, "find_spec", lambda name: None)
        run = Run(tmp_path, {})
    run.epoch(**figures(1))
    run.finish()
    assert not list(tmp_path.glob("events*"))
    assert "pip install tensorboard" in json.loads((tmp_path / "result.json").read_text())["tensorboard"]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ result.json


@dataclass
class Machine:
    cores: int
    path: Path


class Evaluation(NamedTuple):
    loss: float


def test_result_holds_everything(tmp_path):
    run = Run(tmp_path / "deep" / "name", {"epochs": 1, "lr": np.float32(0.5), "out": Path("runs")})
    run.epoch(**{**figures(1), "loss": float("nan")})
    metrics = Metrics.of(np.array([[3, 1], [0, 4]]))
    run.finish(
        {
            "seed": np.int64(3),
            "good": np.bool_(True),
            "machine": Machine(2, Path("/x")),
            "test": metrics,
            "evaluation": Evaluation(np.float64("inf")),
            7: (1, {2}),
        }
    )
    text = (run.folder / "result.json").read_text()
    assert "NaN" not in text
    result = json.loads(text)
    assert (result["name"], result["status"]) == ("name", "finished")
    assert result["config"] == {"epochs": 1, "lr": 0.5, "out": "runs"}
    assert result["choices"] == dispatch.choices_in_force()
    assert (result["seed"], result["good"], result["7"]) == (3, True, [1, [2]])
    assert result["machine"] == {"cores": 2, "path": "/x"}
    assert result["test"]["confusion"] == [[3, 1], [0, 4]]
    assert result["test"]["accuracy"] == 0.875
    assert result["evaluation"] == {"loss": None}
    assert (result["history"][0]["loss"], result["history"][0]["step"]) == (None, 10)


def test_an_interrupted_run_says_so_even_before_its_first_epoch(tmp_path):
    Run(tmp_path, {}).finish({"status": "interrupted"})
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "curves.png").exists()


# ------------------------------------------------------------------ curves.png


@pytest.mark.parametrize("epochs", [1, 60])
def test_the_picture_is_a_picture(tmp_path, epochs):
    run = Run(tmp_path, {})
    run._draw = lambda: None
    for epoch in range(1, epochs + 1):
        run.epoch(**figures(epoch), val_loss=float("nan"))
    del run._draw
    run.finish()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_that_looks_like_mathematics():
    assert record.draw_curves([{"epoch": 1, "step": 1}], "a$b_{").startswith(b"\x89PNG")


def test_drawing_keeps_to_its_share_of_the_time(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(record, "draw_curves", lambda history, name: drawn.append(len(history)) or b"")
    run = Run(tmp_path, {})
    run.epoch(**figures(1))  # the run is too young for a picture
    run._started -= 1000
    run.epoch(**figures(2))
    assert drawn == [2]


# ------------------------------------------------------------------ ranks and folders


def test_other_ranks_leave_no_trace(tmp_path, capsys):
    run = Run(tmp_path / "runs", {}, active=False)
    assert run.load_history() == []
    run.epoch(**figures(1))
    run.finish()
    assert not (tmp_path / "runs").exists()
    assert capsys.readouterr().out == ""


def test_a_folder_below_a_file_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        RecordError, match=r"cannot write .*file/run: Not a directory\. Make room .* choose another folder"
    ):
        Run(tmp_path / "file" / "run", {})


def test_a_full_disk_is_an_error_before_training(tmp_path):
    with full_disk(), pytest.raises(RecordError, match=f"cannot write {tmp_path}: File too large"):
        Run(tmp_path, {})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_training_is_a_warning_and_keeps_the_old_figures(tmp_path, capsys):
    run = Run(tmp_path, {})
    run.epoch(**figures(1))
    run._draw()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk():
        for epoch in 2, 3:
            run.epoch(**figures(epoch))
        run._draw()
        with pytest.raises(RecordError, match=r"result\.json"):
            run.finish()
    warnings = capsys.readouterr().err.splitlines()
    for name in before:  # metrics.csv, the event file and curves.png, once each
        assert len([line for line in warnings if name in line and "the training goes on" in line]) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run.epoch(**figures(4))  # somebody made room
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]


def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    def broken(history, name):
        raise ImportError("no matplotlib")

    monkeypatch.setattr(record, "draw_curves", broken)
    run = Run(tmp_path, {})
    run.epoch(**figures(1))
    run.finish()
    assert "curves.png" in capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "finished"


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory()
    held = np.ones((before + (64 << 20)) // 8)
    assert peak_memory() >= held.nbytes
