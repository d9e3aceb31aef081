"""Do rounding errors harm learning? That all ways start alike, that the verdict is the one it says, and that what
diverges is recorded. Tiny networks, no accuracy of use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment

from nanocnn.data import Loader, load

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "experiments" / "convergence.py"
sys.path.insert(0, str(SCRIPT.parent))  # a script's neighbours are found beside it

import convergence  # noqa: E402

TINY = ["--quick", "--width", "0.05", "--batch", "8", "--train-size", "16", "--test-size", "10", "--epochs", "2"]


def run(*words):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)


@pytest.fixture
def options(monkeypatch, tmp_path):
    """options(*words): what the script makes of them."""

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["convergence.py", "--out", str(tmp_path), *map(str, words)])
        return convergence.arguments()

    return parse


def data_of(args):
    return load("shapes", val=0, train_size=args.train_size, test_size=args.test_size)


# ------------------------------------------------------------------ a whole run


def test_an_experiment_leaves_a_table_a_result_and_a_picture(tmp_path):
    done = run(*TINY, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "convergence.json").read_text())
    assert (result["kind"], result["status"]) == ("convergence", "finished")
    assert result["command"] == " ".join(["python experiments/convergence.py", *TINY])
    assert result["machine"]["processor"]["name"]
    assert (result["options"]["epochs"], result["options"]["batch_norm"]) == (2, True)
    assert result["criterion"] in done.stdout
    ways = list(result["ways"])
    assert ways[:3] == ["im2col", "F2", "F4"]
    wanted = [(model, way, seed) for model in ("alexnet", "resnet18") for seed in (0, 1) for way in ways]
    assert [(r["model"], r["way"], r["seed"]) for r in result["runs"]] == wanted

    first_losses = {(r["model"], r["way"], r["seed"]): r["first_loss"] for r in result["runs"]}
    for (model, _, seed), loss in first_losses.items():  # the same weights and the same batch
        assert loss == pytest.approx(first_losses[model, "im2col", seed], rel=1e-4)
        assert loss != pytest.approx(first_losses[model, "im2col", 1 - seed], rel=1e-4)
    for r in result["runs"]:
        assert r["diverged"] is None
        assert len(r["loss"]) == len(r["accuracy"]) == 2
        assert all(loss > 0 for loss in r["loss"])
        assert all(0 <= accuracy <= 1 for accuracy in r["accuracy"])
        assert r["seconds"] > 0
        ran = {variant for variants in r["variants"].values() for variant in variants}
        assert ("winograd4" in ran, "winograd2" in ran) == (r["way"] == "F4", r["way"] == "F2")
        assert r["way"] != "im2col" or ran == {"reference"}

    assert [(row["model"], row["way"]) for row in result["verdicts"]] == [(m, w) for m, w, seed in wanted if seed == 0]
    assert result["verdicts"] == convergence.judge(result["runs"])
    for row in result["verdicts"]:
        assert row["low"] <= row["mean"] <= row["high"]
        assert (row["verdict"] is None) == (row["way"] == "im2col")
        assert row["verdict"] is None or row["verdict"]["words"] in done.stdout
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------ the same training


@pytest.mark.parametrize("norm", ["--batch-norm", "--no-batch-norm"])
def test_pytorch_trains_the_same_alexnet(options, norm):
    """Several steps agree: weights, augmented batches, momentum, decay and learning rates; and so does the test."""
    pytest.importorskip("torch")
    args = options(*TINY, norm, "--train-size", "32")
    data = data_of(args)
    ours = convergence.Ours("alexnet", "im2col", args, data, 3)
    theirs = convergence.PyTorch("alexnet", args, data, 3)
    augment = convergence.common.make_augment(args, data)
    for batch in Loader(data.train, args.batch, augment=augment, seed=3).epoch(0):
        assert theirs.step(batch, 0.02) == pytest.approx(ours.step(batch, 0.02), rel=1e-5)
    tests = Loader(data.test, 8, shuffle=False)
    assert theirs.test(tests) == pytest.approx(ours.test(tests), rel=1e-4)


@pytest.mark.parametrize("way", ["F4", "PyTorch"])
def test_a_run_that_diverges_is_recorded(options, way, tmp_path):
    if way == "PyTorch":
        pytest.importorskip("torch")
    args = options(*TINY, "--no-batch-norm", "--lr", "1e12")
    found = convergence.train("alexnet", way, 0, args, data_of(args))
    assert found["diverged"]["epoch"] in (1, 2)
    assert found["diverged"]["step"] > 1
    assert "the loss " in found["diverged"]["reason"]
    assert len(found["loss"]) == len(found["accuracy"]) == found["diverged"]["epoch"] - 1
    assert convergence.final(found) is None
    assert f"diverged in epoch {found['diverged']['epoch']}, step" in convergence.line(found)
    json.dumps(found, allow_nan=False)
    calm = found | dict(way="im2col", loss=[2.0, 1.0], accuracy=[0.1, 0.2], diverged=None)
    ways = {"im2col": "", way: ""}
    convergence.picture(dict(runs=[calm, found], ways=ways), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_ways_that_start_apart_are_an_error():
    reference = dict(model="alexnet", way="im2col", seed=0, first_loss=2.3)
    for loss in (2.3, 2.3001, None):
        convergence.demand_same_start(reference | dict(way="F4", first_loss=loss), reference)
    with pytest.raises(convergence.ConvergenceError, match=r"alexnet, seed 0: the first loss is 2\.4.* with F4"):
        convergence.demand_same_start(reference | dict(way="F4", first_loss=2.4), reference)


# ------------------------------------------------------------------ the verdict


def verdict(own, reference):
    return convergence.verdict(convergence.figures(own), convergence.figures(reference))


def test_figures_are_of_the_runs_that_finished():
    found = convergence.figures([0.5, None, 0.7])
    assert (found["runs"], found["diverged"], found["low"], found["high"]) == (3, 1, 0.5, 0.7)
    assert (found["mean"], found["deviation"]) == pytest.approx((0.6, 0.02**0.5))
    assert convergence.figures([0.5])["deviation"] is None
    nothing = convergence.figures([None, None])
    assert (nothing["diverged"], nothing["mean"], nothing["low"]) == (2, None, None)


@pytest.mark.parametrize(
    ("own", "within", "overlap", "words"),
    [
        ([0.71, 0.69, 0.70], True, True, "within im2col's range"),
        ([0.90, 0.50, 0.70], True, True, "within im2col's range"),  # the mean decides, not the spread
        ([0.68, 0.68, 0.68], True, True, "within im2col's range"),  # on its edge
        ([0.66, 0.67, 0.69], False, True, "outside: 0.67 points below im2col's lowest; ranges overlap"),
        ([0.60, 0.61, 0.62], False, False, "outside: 7.00 points below im2col's lowest; ranges do not overlap"),
        ([0.75, 0.75, 0.75], False, False, "outside: 3.00 points above im2col's highest; ranges do not overlap"),
        ([0.70, None, 0.70], False, True, "outside: 1 of 3 runs diverged, of im2col's 0; ranges overlap"),
        ([None, None, None], False, None, "outside: 3 of 3 runs diverged, of im2col's 0"),
    ],
)
def test_a_verdict_says_whether_the_mean_lies_in_the_range_of_the_reference(own, within, overlap, words):
    found = verdict(own, [0.68, 0.72, 0.70])
    assert (found["within"], found["overlap"]) == (within, overlap)
    assert found["words"].startswith(words)


def test_a_difference_is_measured_in_the_larger_standard_deviation():
    found = verdict([0.61, 0.61, 0.61], [0.68, 0.72, 0.70])  # deviations 0 and 0.02
    assert (found["difference"], found["deviations"]) == pytest.approx((-0.09, -4.5))
    assert found["words"].endswith("means differ by -9.00 points, 4.5 standard deviations")
    assert verdict([0.5, 0.9], [0.68, 0.72])["deviations"] == pytest.approx(0, abs=1e-9)
    alike = verdict([0.7, 0.7], [0.7, 0.7])
    assert (alike["within"], alike["deviations"]) == (True, None)


def test_without_a_range_there_is_no_verdict():
    assert verdict([0.7], [0.7])["within"] is None
    assert verdict([0.7], [0.7])["words"].startswith("no verdict: one run of im2col has no range")
    assert verdict([0.7, 0.7], [None, 0.7])["within"] is None
    assert verdict([None, None], [None, None])["words"].startswith("no verdict: nothing to compare")
    assert verdict([None, 0.7, 0.7], [None, 0.69, 0.71])["within"] is True  # no more often than the reference


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--models", "vgg"], "argument --models: invalid choice: 'vgg'"),
        (["--ways", "F8"], "argument --ways: invalid choice: 'F8'"),
        (["--train-size", "100"], "--train-size 100: expected one batch of 128 images at least (--batch)"),
        (["--epochs", "0"], "expected a positive integer"),
        (["--out", f"{__file__}/x"], "--out: [Errno"),
    ],
)
def test_bad_options_are_named(options, capsys, words, text):
    with pytest.raises(SystemExit) as ended:
        options(*words)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_an_error_is_one_line_and_no_traceback(tmp_path):
    done = run("--data", "imagenet", "--out", tmp_path)
    assert done.returncode == 1
    assert "DataError: unknown data set 'imagenet'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_pytorch_is_left_out_where_it_is_missing_unless_it_is_asked_for(options, monkeypatch, capsys):
    monkeypatch.setattr(convergence.peers, "missing", lambda name: ["torch"])
    assert options().ways == ["im2col", "F2", "F4"]
    assert options("--ways", "F4").ways == ["im2col", "F4"]
    with pytest.raises(SystemExit):
        options("--ways", "PyTorch")
    assert "PyTorch is not installed: pip install torch" in capsys.readouterr().err
