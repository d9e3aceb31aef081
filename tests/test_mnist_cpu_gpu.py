"""CPU against GPU: every rung that is here runs, agrees with the reference, and leaves its figures."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict

import pytest
from launch import NEEDS_GXX, ROOT

sys.path.insert(0, str(ROOT / "experiments"))  # a script's neighbours are found beside it

import mnist_cpu_gpu as script

TINY = ["--data", "shapes", "--train-images", "64", "--test-images", "40", "--epochs", "1", "--batch", "16"]
TINY += ["--predict", "1", "3", "--seconds", "0.001"]


@NEEDS_GXX
def test_rungs_run_agree_and_leave_figures(tmp_path, monkeypatch, capsys):
    gpu, emulated = (next(r for r in script.RUNGS if r.device == device) for device in ("cuda", "emulated"))
    captured = script.Rung("captured, 1 thread", "cpu", "", choices=dict(graph="on"), threads=1)
    monkeypatch.setattr(script, "RUNGS", (script.REFERENCE, captured, gpu, emulated))
    monkeypatch.setattr(script, "missing", lambda rung: "no GPU in this test" if rung.device == "cuda" else "")
    monkeypatch.setattr(sys, "argv", ["mnist_cpu_gpu.py", *TINY, "--out", str(tmp_path)])
    assert script.main(script.arguments()) == 0
    told, printed = json.loads((tmp_path / "result.json").read_text()), capsys.readouterr().out
    rows = told["rows"]
    assert list(rows) == ["NumPy", "captured, 1 thread", "emulated"]
    for name, row in rows.items():
        assert "error" not in row
        assert row["steps"] == 4
        assert row["worst_loss"] <= 2e-3
        assert row["memory"] > 50e6
        assert row["seconds"] > 0
        assert name in printed
    assert rows["NumPy"]["ran"]["conv2d"] == ["reference"]
    assert "reference" not in rows["captured, 1 thread"]["ran"]["conv2d"]
    assert rows["captured, 1 thread"]["threads"] == 1
    assert rows["emulated"]["ran"]["conv2d"][0].startswith("cuda")
    assert "accuracy" not in rows["emulated"]
    assert set(rows["NumPy"]["predict"]) == {"1", "3"}
    assert told["skipped"] == {gpu.name: "no GPU in this test"}
    assert f"not here: {gpu.name}: no GPU in this test" in printed
    assert told["machine"]["processor"]["name"]
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def row_of(rung, losses, accuracy=0.9):
    return dict(rung=asdict(rung), losses=losses, accuracy=accuracy)


@pytest.mark.parametrize(
    ("losses", "accuracy", "text"),
    [
        ([2.3, 2.0], 0.9, None),
        ([2.3, 2.1], 0.9, r"Numba: losses of the first steps .* off by 5.0e-02, where 0.002 is allowed"),
        ([2.3, float("nan")], 0.9, "Numba: losses"),
        ([2.3, 2.0], 0.86, r"Numba: accuracy 86.00%, the reference's is 90.00%: more apart than 1.0%"),
    ],
)
def test_a_rung_that_computes_something_else_is_an_error(losses, accuracy, text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist_cpu_gpu.py"])
    args, numba = script.arguments(), script.RUNGS[2]
    rows = {"NumPy": row_of(script.REFERENCE, [2.3, 2.0]), "Numba": row_of(numba, losses, accuracy)}
    if text is None:
        assert script.disagreements(args, rows, 10_000) == []
        assert rows["Numba"]["worst_loss"] == 0
    else:
        (found,) = script.disagreements(args, rows, 10_000)
        assert re.match(text, found)


def test_a_rung_that_fails_is_an_error_in_its_row(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["mnist_cpu_gpu.py", *TINY, "--data", "mnist", "--data-dir", str(tmp_path)])
    found = script.run(script.arguments(), script.REFERENCE)
    assert "its process ended with status 1: nanocnn.data.datasets.DataError: mnist is not in" in found["error"]


def test_what_is_missing_has_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    emulated = next(rung for rung in script.RUNGS if rung.device == "emulated")
    assert "there is none: apt-get install g++" in script.missing(emulated)
    other = script.Rung("x", "cpu", "", choices={"no_such_switch": "on"})
    assert script.missing(other) == "this version has no switch no_such_switch"
    assert script.missing(script.REFERENCE) == ""
