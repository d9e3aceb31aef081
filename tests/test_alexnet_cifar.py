"""The main job as its users run it: alone and under mpiexec, interrupted, killed, resumed, and given bad input.

Where a process of its own is not what is tested, the script runs in this one: to start Python, Numba and Matplotlib
takes longer than the training.
"""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, Outcome, finish, mpiexec, start

from nanocnn import checkpoint
from nanocnn.kernels import dispatch
from nanocnn.parallel import Alone

SCRIPT = ROOT / "experiments" / "alexnet_cifar.py"
SMALL = ("--data", "shapes", "--train-images", "356", "--width", "0.1", "--batch-size", "32", "--epochs", "2")


def launch(ranks: int, runs: Path, *options: str, **extra: str):
    launcher = [mpiexec(), "-n", str(ranks)] if ranks else []
    return start([*launcher, sys.executable, str(SCRIPT), "--runs", str(runs), *SMALL, *options], **extra)


def run(ranks: int, runs: Path, *options: str, timeout: float = 120, **extra: str) -> Outcome:
    return finish(launch(ranks, runs, *options, **extra), timeout)


@pytest.fixture
def run_here(monkeypatch, capfd):
    """run_here(runs, *options): what `run` does on no ranks, without a process; the same Outcome."""
    choices = dispatch._policy, dispatch._choices
    monkeypatch.syspath_prepend(SCRIPT.parent)  # a script's neighbours are found beside it
    monkeypatch.setattr(Alone, "abort", lambda self, code: sys.exit(code))  # and not the process of the tests

    def run(runs: Path, *options: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--runs", str(runs), *SMALL, *options])
        begin, status = time.monotonic(), 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            dispatch._policy, dispatch._choices = choices
        return Outcome(status, "".join(capfd.readouterr()), time.monotonic() - begin)

    return run


def final_state(folder: Path) -> dict:
    path = checkpoint.latest(folder / "checkpoints")
    assert path is not None
    return checkpoint.load(path)


def assert_bit_equal(a: dict, b: dict) -> None:
    assert a["position"]["step"] == b["position"]["step"]
    for name, array in a["model"].items():
        np.testing.assert_array_equal(array, b["model"][name], err_msg=name)
    for name, array in a["optimizer"]["state"]["momentum_buffer"].items():
        np.testing.assert_array_equal(array, b["optimizer"]["state"]["momentum_buffer"][name], err_msg=name)


def test_one_rank_and_four_learn_the_same(tmp_path):
    """20 steps, with dropout and augmentation: equal within rounding, since only the order of sums differs.

    Without Winograd, whose rule looks at the size of the batch, and whose rounding 20 steps would amplify.
    """
    rungs = [f"{name}=upto:direct" for name in ("conv2d", "conv2d_grad_x", "conv2d_grad_w")]
    for ranks, name in ((0, "alone"), (4, "four")):
        outcome = run(ranks, tmp_path, "--name", name, "--use", *rungs)
        assert outcome.status == 0, outcome.output
        assert "\x1b" not in outcome.output
        assert re.search(r"epoch 2/2  loss \d.*train .*val .*test .*images/s  comm .*%", outcome.output)
        assert re.search(r"accuracy .*precision .*recall .*F1", outcome.output)
        assert re.search(r"training .* prediction .*images/s", outcome.output)
    alone, four = final_state(tmp_path / "alone"), final_state(tmp_path / "four")
    assert alone["position"]["step"] == four["position"]["step"] == 20
    for name, array in alone["model"].items():
        np.testing.assert_allclose(four["model"][name], array, rtol=0, atol=1e-5, err_msg=name)
    for name in ("alone", "four"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["status"] == "finished"
        assert np.sum(result["test"]["confusion"]) == 2000
        assert {"seed", "choices", "variants", "machine", "history", "config", "test"} <= set(result)
        assert result["variants"]["conv2d"] == ["direct"]
        assert len((tmp_path / name / "metrics.csv").read_text().splitlines()) == 3
        assert (tmp_path / name / "curves.png").read_bytes().startswith(b"\x89PNG")


BREAKABLE = ("--batch-norm", "--train-images", "1200", "--epochs", "3", "--ema", "0.99")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    outcome = run(2, folder, "--name", "run", *BREAKABLE)
    assert outcome.status == 0, outcome.output
    return folder / "run"


def wait_for_second_epoch(process, folder: Path) -> None:
    """Until the first epoch's checkpoint is on the disk, and a little longer."""
    deadline = time.monotonic() + 60
    while not list((folder / "checkpoints").glob("*.h5")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.15)


def ranks_of(runs: Path) -> list[int]:
    """Process numbers of the Python ranks that write below `runs`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if os.fsencode(runs) in words and os.fsencode(sys.executable) == words[0]:
            found.append(int(entry.name))
    return found


def stop_by(number: int, runs: Path, unbroken: Path) -> None:
    """Train, signal mpiexec, and see that it ends early, with a checkpoint, and says how to go on."""
    process = launch(2, runs, "--name", "run", *BREAKABLE)
    wait_for_second_epoch(process, runs / "run")
    process.send_signal(number)
    outcome = finish(process, 30)
    assert outcome.status != 0
    assert "--resume" in outcome.output
    assert 0 < final_state(runs / "run")["position"]["step"] < final_state(unbroken)["position"]["step"]


def test_ctrl_c_ends_it_with_a_checkpoint(tmp_path, unbroken):
    stop_by(signal.SIGINT, tmp_path, unbroken)


def test_a_signal_ends_it_with_a_checkpoint_and_resume_goes_on_bit_for_bit(tmp_path, unbroken):
    stop_by(signal.SIGTERM, tmp_path, unbroken)
    outcome = run(2, tmp_path, "--name", "run", *BREAKABLE, "--resume")
    assert outcome.status == 0, outcome.output
    assert "resuming in epoch" in outcome.output
    assert_bit_equal(final_state(tmp_path / "run"), final_state(unbroken))


def test_a_rank_killed_in_the_middle_of_an_epoch(tmp_path, unbroken):
    process = launch(2, tmp_path, "--name", "run", *BREAKABLE)
    wait_for_second_epoch(process, tmp_path / "run")
    os.kill(ranks_of(tmp_path)[-1], signal.SIGKILL)
    outcome = finish(process, 20)
    assert outcome.status != 0
    assert outcome.seconds < 10
    outcome = run(2, tmp_path, "--name", "run", *BREAKABLE, "--resume")
    assert outcome.status == 0, outcome.output
    assert_bit_equal(final_state(tmp_path / "run"), final_state(unbroken))


def test_another_number_of_ranks_can_resume(tmp_path, run_here):
    assert run(2, tmp_path, "--name", "run", "--batch-norm").status == 0
    outcome = run_here(tmp_path, "--name", "run", "--batch-norm", "--epochs", "3", "--resume")
    assert outcome.status == 0, outcome.output
    assert final_state(tmp_path / "run")["position"]["step"] == 30


def test_alone_it_needs_no_mpi4py_and_profiles(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise AssertionError('mpi4py was imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    outcome = run(0, tmp_path, "--profile", "4", "--use", "conv2d=reference", PYTHONPATH=path)
    assert outcome.status == 0, outcome.output
    assert "conv2d=reference" in outcome.output
    assert "By layer" in outcome.output
    trace = json.loads((tmp_path / "alexnet-shapes" / "trace.json").read_text())
    kinds = {event.get("cat") for event in trace["traceEvents"]}
    assert {"forward", "backward", "kernel", "layer", "data", "update"} <= kinds


def test_a_second_run_gets_a_folder_of_its_own_and_resume_takes_the_last(tmp_path, run_here):
    for expected in ("alexnet-shapes", "alexnet-shapes-2"):
        assert run_here(tmp_path, "--epochs", "1").status == 0
        assert (tmp_path / expected / "result.json").exists()
    outcome = run_here(tmp_path, "--resume", "--epochs", "2")
    assert outcome.status == 0, outcome.output
    assert final_state(tmp_path / "alexnet-shapes-2")["position"]["epoch"] == 2
    assert not (tmp_path / "alexnet-shapes-3").exists()


def test_early_stopping_ends_with_the_best_weights(tmp_path, run_here):
    outcome = run_here(tmp_path, "--patience", "1", "--epochs", "20", "--lr", "1e-9")
    assert outcome.status == 0, outcome.output
    rows = (tmp_path / "alexnet-shapes" / "metrics.csv").read_text().splitlines()
    assert len(rows) < 21
    outcome = run_here(tmp_path, "--patience", "1", "--epochs", "20", "--lr", "1e-9", "--resume")
    assert outcome.status == 0, outcome.output
    assert (tmp_path / "alexnet-shapes" / "metrics.csv").read_text().splitlines() == rows


def test_a_run_that_stopped_after_the_last_step_of_an_epoch_goes_on(tmp_path, run_here):
    """One step an epoch: wherever the signal arrives, the epoch's last step is the one that was made."""
    options = ("--name", "run", "--batch-size", "320", "--epochs", "400")
    process = launch(0, tmp_path, *options)
    wait_for_second_epoch(process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    outcome = finish(process, 30)
    assert outcome.status == 143, outcome.output
    epochs = final_state(tmp_path / "run")["position"]["epoch"] + 1
    outcome = run_here(tmp_path, *options[:-1], str(epochs), "--resume")
    assert outcome.status == 0, outcome.output
    assert final_state(tmp_path / "run")["position"]["epoch"] == epochs


def test_a_reader_that_goes_away_costs_no_figures(tmp_path):
    process = launch(0, tmp_path, "--name", "run")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) is not None
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


# ------------------------------------------------------------------ bad input: one clear error, all ranks end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--use", "conv2d=fastestt"], "conv2d has no choice 'fastestt'; there are: reference, fp32, loops, blocked"),
        (["--use", "speed=on"], "unknown primitive or switch 'speed'"),
        (["--epochs", "0"], "expected a positive integer, got '0'"),
        (["--val", "0", "--patience", "3"], "--patience"),
    ],
)
def test_bad_options_alone(tmp_path, run_here, options, message):
    outcome = run_here(tmp_path, *options)
    assert outcome.status == 2
    assert message in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (2, ["--epochs", "0"], "expected a positive integer, got '0'"),
        (2, ["--data-dir", "/nowhere", "--data", "cifar10"], "/nowhere: no such file or folder"),
        (2, ["--batch-size", "1"], "a global batch of 1 for 2 ranks"),
        (2, ["--lr", "1e30", "--no-augment"], "NonFiniteLoss"),
    ],
)
def test_bad_options(tmp_path, ranks, options, message):
    outcome = run(ranks, tmp_path, *options, timeout=40)
    assert outcome.status != 0
    assert message in outcome.output
    assert "Traceback" not in outcome.output


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    outcome = run(2, tmp_path / "file" / "runs", timeout=40)
    assert outcome.status != 0
    assert "RecordError: cannot write" in outcome.output


def make_mnist(folder: Path) -> Path:
    """Random digits in the official form."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 400), ("t10k", 40)):
        header = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + rng.bytes(n * 784))
        labels = rng.integers(0, 10, n).astype(np.uint8).tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, n], ">i4").tobytes() + labels)
    return folder


def test_what_a_run_left_is_neither_overwritten_nor_mixed(tmp_path, run_here):
    assert run_here(tmp_path, "--name", "run", "--epochs", "1").status == 0
    before = final_state(tmp_path / "run")
    for options, message in (
        ([], "holds a run: --resume goes on with it"),
        (["--resume", "--width", "0.2"], "CheckpointError"),
        (["--resume", "--seed", "1"], "seed was 0, now 1"),
        (["--resume", "--data", "mnist", "--data-dir", str(make_mnist(tmp_path))], "data was 'shapes', now 'mnist'"),
        (["--resume", "--optimizer", "adam"], "CheckpointError"),
        (["--resume", "--epochs", "2", "--lr", "1e30"], "NonFiniteLoss"),
    ):
        outcome = run_here(tmp_path, "--name", "run", *options)
        assert outcome.status == 1
        assert message in outcome.output
        assert_bit_equal(final_state(tmp_path / "run"), before)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails in the middle, as root and not."""
    process = launch(2, tmp_path, "--name", "run", *BREAKABLE)
    wait_for_second_epoch(process, tmp_path / "run")
    for rank in ranks_of(tmp_path):
        resource.prlimit(rank, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    outcome = finish(process, 30)
    assert outcome.status != 0
    assert "CheckpointError" in outcome.output
    state = final_state(tmp_path / "run")
    assert 0 < state["position"]["epoch"] < 3


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adagrad", "lars"])
def test_every_update_rule_learns_by_default(tmp_path, run_here, optimizer):
    options = ("--optimizer", optimizer, "--no-augment", "--dropout", "0", "--batch-norm", "--epochs", "8")
    outcome = run_here(tmp_path, "--name", "run", *options)
    assert outcome.status == 0, outcome.output
    history = json.loads((tmp_path / "run" / "result.json").read_text())["history"]
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]


def test_help_teaches(tmp_path, run_here):
    outcome = run_here(tmp_path, "--help")
    assert outcome.status == 0
    for words in ("mpiexec -n 4", "--resume", "--width", "--use", "python -m nanocnn switches", "(default: 128)"):
        assert words in " ".join(outcome.output.split())
