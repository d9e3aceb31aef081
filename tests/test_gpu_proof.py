"""The proof on a GPU: its checks can fail, its sections cannot stop each other, its reports say what happened."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from launch import NEEDS_GXX, ROOT, alone

from nanocnn.kernels import dispatch
from nanocnn.kernels.cuda.launch import Kernel
from nanocnn.kernels.dispatch import Primitive, xp_of
from nanocnn.kernels.narrow import HALVES

sys.path.insert(0, str(ROOT / "experiments"))  # a script's neighbours are found beside it

import gpu_proof as script
from proof import Context, correct, sections

EMULATED = Context("emulated", quick=True)
HALF_TYPES = [half.cuda for half in HALVES.values()]


@NEEDS_GXX
def test_sections_run_one_by_one_and_leave_two_reports(tmp_path):
    words = ["--device", "emulated", "--quick", "--only", "copies", "launches", "--out"]
    done = alone(ROOT / "experiments" / "gpu_proof.py", *words, tmp_path, timeout=120)
    assert done.status == 0, done.output
    told = json.loads((tmp_path / "gpu_proof.json").read_text())
    assert list(told["sections"]) == ["copies", "launches"]
    assert told["sections"]["copies"]["rows"] == [{"what": "copies", "ran": False, "note": "needs a GPU"}]
    assert told["machine"]["processor"]
    text = (tmp_path / "gpu_proof.txt").read_text()
    assert "not run  copies: 1 not run (" in text
    assert "== launches: what a launch costs the host" in text
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_proof.json", "gpu_proof.txt"}


def test_all_sections_together_take_less_than_nine_minutes():
    assert sum(section.seconds for section in sections.values()) <= script.BUDGET < 9 * 60
    assert all(section.about for section in sections.values())


def test_a_section_that_fails_or_hangs_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_proof.py", "--device", "emulated", "--out", str(tmp_path)])
    args = script.arguments()
    found = script.run(args, "kernels", 0.3)
    assert (found["rows"], found["wrong"]) == ([], "ended after 0 s, its limit")
    assert not script.passed(found)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "missing.py"))
    found = script.run(args, "kernels", 20)
    assert "ended with status 2: " in found["wrong"]
    assert "missing.py" in found["wrong"]


def test_reports_say_what_failed():
    good = dict(rows=[dict(a=1, ok=True), dict(b="x", note="why")], wrong="", seconds=1.2, about="good")
    idle = dict(
        rows=[dict(a=1, ok=True), dict(what="c", ran=False, note="no time")], wrong="", seconds=1.0, about="idle"
    )
    bad = dict(rows=[dict(a=1.23456, ok=False), dict(a=2.0, ok=True)], wrong="", seconds=3.0, about="bad")
    cut = dict(rows=[dict(a=1)], wrong="ended after 5 s, its limit", seconds=5.0, about="cut")
    nothing = dict(rows=[], wrong="", seconds=0.0, about="nothing")
    assert [script.passed(found) for found in (good, idle, bad, cut, nothing)] == [True, True, False, False, False]
    text = script.text_of(dict(good=good, idle=idle, bad=bad, cut=cut), dict(date="today", device="cuda", quick=False))
    assert "passed   good: 1 of 1 checks passed, 1 row (1 s)" in text
    assert "passed   idle: 1 of 1 checks passed, 1 not run (1 s)" in text
    assert "FAILED   bad: 1 of 2 checks passed (3 s)" in text
    assert "FAILED   cut: 1 row, ended after 5 s, its limit (5 s)" in text
    assert "1.235  NO" in text
    assert "why" in text


def test_differences():
    x = np.array([1.0, 4.0, np.nan, np.inf])
    assert correct.difference([x], [x]) == 0
    half = np.array([1.0, 3.0], np.float16)
    assert correct.difference([half], [np.array([1.0, 4.0])]) == 0.25 / correct.TOLERANCES["float16"]
    assert correct.difference([half.astype(np.float64)], [np.array([1.0, 4.0])]) == 0.25 / 1e-11
    assert correct.difference([np.array([1.0, np.nan])], [np.array([1.0, 4.0])]) == np.inf
    assert correct.difference([np.array([1, 2])], [np.array([1, 3])]) == np.inf
    assert correct.difference([np.zeros(2)], [np.zeros(3)]) == np.inf


@pytest.fixture
def planted(monkeypatch):
    """A primitive with three kernels, of which one is right."""
    primitives = dispatch.primitives

    @Primitive
    def planted_double(x):
        """2 x"""
        return 2 * x

    @planted_double.variant("right", device="cuda", supports=dispatch.anything)
    def right(x):
        return x + x

    @planted_double.variant("wrong", device="cuda", supports=dispatch.anything)
    def wrong(x):
        return x + x * x.dtype.type(1.1)

    @planted_double.variant("leaves_one_out", device="cuda", supports=dispatch.anything)
    def leaves_one_out(x):
        y = xp_of(x).empty(x.shape, x.dtype)
        y[:-1] = 2 * x[:-1]
        return y

    monkeypatch.setattr(dispatch, "primitives", {"planted_double": planted_double})
    calls = {"planted_double": lambda rng, dtype: [((rng.standard_normal(n).astype(dtype),), {}) for n in (5, 6)]}
    monkeypatch.setattr(correct, "example_calls", lambda: calls)
    yield
    del primitives["planted_double"]


def test_a_wrong_kernel_is_found(planted):
    rows = list(correct.kernels(EMULATED))
    assert len(rows) == 3 * (2 + len(HALVES))  # of each dtype
    for row in rows:
        assert row["ok"] == (row["kernel"] == "planted_double=right"), row
    assert next(r["of_allowed"] for r in rows if "leaves" in r["kernel"]) == np.inf


def test_all_that_a_gpu_needs_is_compiled_at_once(monkeypatch):
    built = set()
    monkeypatch.setattr(Kernel, "_for_the_gpu", lambda kernel, defines, shared: built.add((kernel.file, defines)))
    assert correct.build_for_gpu() == len(built)
    assert {(file, defines) for file, defines in built if file == "gemm.cu"} == {("gemm.cu", ())}
    assert {defines for file, defines in built if file == "elementwise.cu"} == {
        (("REAL", real),) for real in ("float", "double", *HALF_TYPES)
    }
    assert {defines for file, defines in built if file == "gemm_tensor.cu"} == {
        (("NARROW", half),) for half in HALF_TYPES
    }
    assert {file for file, _ in built} == {path.name for path in correct.FOLDER.glob("*.cu")}


@NEEDS_GXX
def test_what_numba_compiles_is_no_business_of_the_sanitizer():
    kernels = {
        f"{p.name}={v.name}" for p, v, _, _ in correct.on_device(Context("emulated", quick=True, sanitized=True))
    }
    assert "matmul=cuda_tiled" in kernels
    assert not any("numba" in kernel for kernel in kernels)


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, dict(ok=True, note="")),
        ("========= Invalid __global__ write of size 4 bytes\n=========  at relu", 9, dict(ok=False)),
        ("========= Target application returned an error", 1, dict(ok=False)),
        ("========= COMPUTE-SANITIZER", None, dict(note="ended at its limit; COMPUTE-SANITIZER")),
        ("========= Invalid __shared__ read of size 4 bytes", None, dict(ok=False)),
    ],
)
def test_what_the_sanitizer_says(tmp_path, words, status, expected):
    (tmp_path / "words").write_text(words)
    (tmp_path / "kernels.jsonl").write_text("{}\n{}\n")
    code = "import time; time.sleep(60)" if status is None else f"raise SystemExit({status})"
    process = subprocess.Popen([sys.executable, "-c", code])
    context = Context("cuda", True, time.monotonic() + (3 if status is None else 60))
    row = correct.told(context, "memcheck", process, tmp_path)
    assert row["checks"] == 2
    assert {name: row.get(name) for name in expected} == expected
    assert ("ok" in row) == ("ok" in expected)
