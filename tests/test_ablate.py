"""The ablation: what the board says is what is measured, and the files hold what was measured."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import NEEDS_GXX, environment

from nanocnn.data import load
from nanocnn.kernels import dispatch
from nanocnn.kernels.dispatch import ChoiceError, Primitive, Switch
from nanocnn.kernels.emulated_array import Emulated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))  # a script's neighbours are found beside it

import ablate  # noqa: E402
import counted  # noqa: E402
import laboratory  # noqa: E402
from laboratory import Configuration, Laboratory, Row  # noqa: E402
from waterfall import waterfall  # noqa: E402

TINY = ["--width", "0.05", "--batch", "8", "--steps", "6", "--data", "shapes"]


@pytest.fixture(autouse=True)
def clean():
    """Whatever a test registers is gone after it."""
    primitives, switches = dict(dispatch.primitives), dict(dispatch.switches)
    yield
    for registry, kept in ((dispatch.primitives, primitives), (dispatch.switches, switches)):
        registry.clear()
        registry.update(kept)


def options(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, words)])
    return ablate.arguments()


def sample(ms, seed=0, ratio=1.0, accuracy=0.5, memory=10):
    return dict(
        seed=seed,
        seconds=[t / 1e3 for t in ms],
        ratio=ratio,
        accuracy=accuracy,
        loss=1 - (accuracy or 0),
        memory=memory,
    )


# ------------------------------------------------------------------ a whole run


def run(*words):
    command = [sys.executable, str(ROOT / "experiments" / "ablate.py"), *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)


def test_a_quick_run_leaves_a_table_files_and_a_picture(tmp_path):
    done = run("--quick", *TINY, "--bars", 1, "--only", "conv2d", "prefetch", "layer_norm", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "ablation.json").read_text())
    rows = {row["label"]: row for row in told["configurations"]}
    assert {"everything on", "conv2d=reference", "prefetch=off", "textbook", "+ all the rest"} <= set(rows)
    assert len(rows) == 6  # and one thing of the two, switched on alone
    assert "not used here: layer_norm" in done.stdout
    for label, row in rows.items():
        assert label in done.stdout
        assert row["error"] == ""
        assert len(row["samples"][0]["seconds"]) == 3  # of six steps, three warm up
        assert 0 <= row["accuracy"] <= 1
        assert row["memory"] > 50e6
        assert row["ms"] >= row["ms_min"] > 0
    assert rows["conv2d=reference"]["place"].startswith("conv2d.py:")
    assert rows["conv2d=reference"]["look"]["calls"]["conv2d"].keys() == {"reference"}
    assert "reference" not in rows["everything on"]["look"]["calls"]["conv2d"]
    assert rows["everything on"]["ratio"] == 1

    fall = told["waterfall"]
    textbook, fastest = rows["textbook"], rows["+ all the rest"]
    assert (textbook["policy"], fastest["policy"], fastest["choices"]) == ("reference", "fastest", {"graph": "on"})
    assert textbook["choices"] == {"prefetch": "off"}
    assert [bar["label"] for bar in fall][::2] == ["textbook", "+ all the rest"]
    assert (fall[0]["ms"], fall[-1]["ms"]) == (textbook["ms"], fastest["ms"])
    assert fall[1]["place"] == rows[fall[1]["label"]]["place"] != ""

    lines = list(csv.DictReader((tmp_path / "ablation.csv").read_text().splitlines()))
    assert [line["label"] for line in lines] == list(rows)
    assert float(lines[0]["ms"]) == rows["everything on"]["ms"]
    assert (tmp_path / "waterfall.png").read_bytes().startswith(b"\x89PNG")


def test_everything_on_is_more_than_what_is_on_by_default():
    """The switch `graph` is off unless asked for: with everything on it is on, and what is left out is `graph=off`."""
    assert ablate.everything_on({}) == {"graph": "on"}
    assert ablate.everything_on({"graph": "off", "fuse": "off"}) == {"graph": "off", "fuse": "off"}
    asked = {"graph": "on"}
    base = ablate.Row(ablate.Configuration(ablate.BASE, "fastest", ablate.everything_on({})), dict(asked=asked, ran={}))
    found, _ = ablate.left_out(base, {}, ["graph"])
    assert [(c.label, c.choices) for c in found] == [("graph=off", {"graph": "off"})]


def test_a_ladder_is_climbed_rung_by_rung(tmp_path, monkeypatch, capsys):
    ablate.ablate(options(monkeypatch, *TINY, "--primitive", "max_pool2d", "--out", tmp_path))
    told = json.loads((tmp_path / "ablation.json").read_text())
    base, *rungs = told["configurations"]
    ladder = dispatch.primitives["max_pool2d"].rungs("cpu")
    printed = capsys.readouterr().out
    calls = sum(base["look"]["calls"]["max_pool2d"].values())
    for row in rungs:
        rung = row["label"].removeprefix("max_pool2d=")
        assert row["choices"] == {"graph": "on", "max_pool2d": f"upto:{rung}"}
        assert row["place"] == ladder[rung].place
        assert f"{row['look']['calls']['max_pool2d'][rung]}/{calls}" in printed
    idle = [name for name in ladder if name not in {row["label"].removeprefix("max_pool2d=") for row in rungs}]
    for name in idle:
        assert f"max_pool2d={name}" in printed.partition("not used here, no layer is theirs:")[2]
    assert [bar["ms"] for bar in told["waterfall"]] == [row["ms"] for row in rungs]


# ------------------------------------------------------------------ on the emulator


@NEEDS_GXX
def test_on_the_emulator_a_step_is_counted(tmp_path, monkeypatch, capsys):
    words = ["--quick", "--device", "emulated", "--bars", 1, "--only", "max_pool2d", "fuse", "graph"]
    args = options(monkeypatch, *words, "--out", tmp_path)
    assert (args.batch, args.width, args.batch_norm) == (2, 0.05, True)
    ablate.ablate(args)
    told = json.loads((tmp_path / "ablation.json").read_text())
    rows = {row["label"]: row for row in told["configurations"]}
    assert next(iter(rows)) == "everything on"
    assert {"max_pool2d=reference", "fuse=off", "textbook"} < set(rows)  # and not graph=on: that is for the CPU
    assert all(row["error"] == "" and "ms" not in row for row in rows.values())
    base, pool, unfused = (rows[name] for name in ("everything on", "max_pool2d=reference", "fuse=off"))
    assert base["kernels"] - pool["kernels"] == base["look"]["calls"]["max_pool2d"]["cuda"] == 3
    assert pool["calls"] > base["calls"] + 50  # of NumPy's: a look at each place of each window
    assert unfused["kernels"] > base["kernels"]
    assert base["bytes"] == base["sectors"] * 32 + base["bytes_of_numpy"]
    assert unfused["ratio"] == unfused["bytes"] / base["bytes"] > 1
    assert rows["textbook"]["kernels"] == 0
    assert all(row["loss"] == pytest.approx(base["loss"], rel=1e-4) for row in rows.values())
    assert told["waterfall"][0]["MB"] == rows["textbook"]["megabytes"]
    lines = list(csv.DictReader((tmp_path / "ablation.csv").read_text().splitlines()))
    assert [int(line["kernels"]) for line in lines] == [row["kernels"] for row in rows.values()]
    printed = capsys.readouterr().out
    assert "counted in the emulator and not measured" in " ".join(printed.split())
    assert (tmp_path / "waterfall.png").read_bytes().startswith(b"\x89PNG")


def test_what_numpy_does_to_arrays_of_the_device_is_counted():
    x, y = (dispatch.to_device(np.ones((4, 8), np.float32), "emulated") for _ in range(2))
    one, two = np.ones(3), np.empty(3)
    hooks = [vars(Emulated)[name] for name in ("__array_ufunc__", "__setitem__")]
    size = x.nbytes
    for work, calls, moved in (
        (lambda: x + y, 1, 3 * size),
        (lambda: np.add(x, y, out=y), 1, 3 * size),
        (lambda: x.sum(axis=0), 1, size + 8 * 4),
        (lambda: x @ y.T, 1, 2 * size + 16 * 4),
        (lambda: np.where(x > 0, x, 0), 2, (size + 32) + (32 + 2 * size)),
        (lambda: np.transpose(x), 0, 0),  # a view
        (lambda: np.add(one, one, out=two), 0, 0),  # of the CPU
    ):
        plain = work()
        with counted.numpy_counted() as numpy_did:
            result = work()
        assert (numpy_did.calls, numpy_did.bytes) == (calls, moved)
        assert dispatch.device_of(result) == dispatch.device_of(plain)
        assert result.shape == plain.shape
    with counted.numpy_counted() as numpy_did:
        np.pad(x, 1)  # which calls others
    assert numpy_did.calls == 1
    with counted.numpy_counted() as numpy_did:
        y[1:] = x[1:]
    assert (numpy_did.calls, numpy_did.bytes) == (1, 2 * 3 * 8 * 4)
    assert hooks == [vars(Emulated)[name] for name in ("__array_ufunc__", "__setitem__")]  # afterwards it is as it was


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--primitive", "conv3d"], r"no primitive or switch 'conv3d'; there are: .*conv2d, .*prefetch"),
        (["--only", "conv2d", "prefetsch"], r"no primitive or switch 'prefetsch'; there are: .*conv2d, .*prefetch"),
        (["--primitive", "prefetch"], "prefetch is a switch, not a primitive: ablate it with --only prefetch"),
        (["--use", "conv2d=slow"], "conv2d has no choice 'slow'; there are: reference"),
        (["--use", "reference"], "--use reference: the policy is what is measured here"),
        (["--primitive", "lars_update"], "alexnet calls no lars_update: there is nothing to climb"),
        (["--out", "/proc/nowhere"], "cannot make /proc/nowhere: .*choose another --out"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_says_what_can(words, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChoiceError, match=text):
        ablate.ablate(options(monkeypatch, *TINY, *words))


def test_an_error_is_one_line_and_no_traceback():
    done = run("--primitive", "conv3d")
    assert done.returncode == 1
    assert "ChoiceError: there is no primitive or switch 'conv3d'; there are: " in done.stderr
    assert "Traceback" not in done.stderr


def test_options_that_exclude_each_other(monkeypatch, capsys):
    for words, text in (
        (["--steps", "3"], "expected more than the 3 that warm up"),
        (["--only", "conv2d", "--primitive", "conv2d"], "one at a time"),
    ):
        with pytest.raises(SystemExit) as ended:
            options(monkeypatch, *words)
        assert ended.value.code == 2
        assert text in capsys.readouterr().err
    args = options(monkeypatch, "--quick", "--steps", "7")
    assert (args.width, args.steps) == (ablate.QUICK["width"], 7)


# ------------------------------------------------------------------ side by side


def test_a_configuration_that_fails_costs_its_own_row_and_no_other(monkeypatch):
    words = vars(options(monkeypatch, *TINY, "--seeds", "2"))
    lab = Laboratory("alexnet", load("shapes", val=0, train_size=48, test_size=20), words)
    base, refused, other = lab.look(
        [
            Configuration("base", "fastest", {}),
            Configuration("refused", "fastest", {"conv2d": "nonsense"}),
            Configuration("other", "fastest", {"prefetch": "off"}),
        ]
    )
    assert "ChoiceError: conv2d has no choice 'nonsense'" in refused.error
    assert not base.error
    lab.run(base, [refused, other], "test")
    assert not refused.measured
    for row in base, other:
        assert [s["seed"] for s in row.samples] == [0, 1]
        figures = row.figures()
        assert figures["seeds"] == 2
        assert figures["ms_spread"] is not None
    assert all(s["ratio"] == 1 for s in base.samples)
    with lab._workers([other], 0) as (worker,):
        worker.process.kill()
        worker.ask(1)
        assert worker.hear() is None
    assert "its process ended with status -9" in other.error


def test_a_turn_is_compared_with_the_same_turn_of_the_base():
    slow_moment = sample([*[2] * 5, *[80] * 5, 2])  # which both met
    assert laboratory._turns(slow_moment) == pytest.approx([0.002, 0.080, 0.002])


def test_figures_are_medians_of_steps_and_means_over_seeds():
    row = Row(Configuration("x", "fastest", {}))
    assert row.figures() == {}
    row.samples = [sample([1, 2, 9], 0, 1.5, 0.5, 10), sample([4, 4, 4], 1, 1.1, 0.7, 30)]
    told = row.figures()
    assert (told["ms"], told["ms_min"], told["ms_spread"]) == pytest.approx((4, 1, 2**0.5))
    assert (told["ratio"], told["memory"], told["seeds"]) == (pytest.approx(1.3), 30, 2)
    assert (told["accuracy"], told["accuracy_spread"]) == pytest.approx((0.6, 0.02**0.5))
    row.samples[1]["accuracy"] = None  # it was cut off
    assert row.figures()["accuracy"] is None
    row.samples = [sample([1, 2, 3]), sample([3, 4, 5])]  # one seed, in two groups
    assert (row.figures()["ms_spread"], row.figures()["seeds"], row.figures()["ms"]) == (None, 1, pytest.approx(3))
    row.error = "lost"
    assert not row.measured


# ------------------------------------------------------------------ what the board says


@pytest.fixture
def toys(monkeypatch):
    """A board of two primitives and a switch of three choices."""
    monkeypatch.setattr(dispatch, "primitives", {})
    monkeypatch.setattr(dispatch, "switches", {})

    @Primitive
    def big(x):
        """the big one"""

    @big.variant("middle")
    def middle(x):
        """in between"""

    @big.variant("last", auto=False)
    def last(x):
        """at the end"""

    @Primitive
    def small(x):
        """the small one"""

    @small.variant("last")
    def small_last(x):
        """at the end"""

    @small.variant("gpu", device="cuda")
    def gpu(x):
        """elsewhere"""

    Switch("mode", "how", quick="q", plain="p", plainest="pp")
    calls = {"big": {"middle": 2, "reference": 1}, "small": {"last": 3}}
    return Row(Configuration("everything on", "fastest", {}), look=dict(calls=calls, asked={"mode": "quick"}))


def test_everything_that_was_used_is_left_out_once(toys):
    found, unused = ablate.left_out(toys, {}, [])
    assert [(c.label, c.policy, c.choices) for c in found] == [
        ("big=reference", "fastest", {"big": "reference"}),
        ("small=reference", "fastest", {"small": "reference"}),
        ("mode=plain", "fastest", {"mode": "plain"}),
        ("mode=plainest", "fastest", {"mode": "plainest"}),
    ]
    assert unused == []
    assert all(c.place.startswith("test_ablate.py:") for c in found)


def test_what_was_not_used_is_named_and_what_is_fixed_stays(toys):
    toys.look["calls"]["big"] = {"reference": 2}
    toys.look["asked"] = {}
    found, unused = ablate.left_out(toys, {}, [])
    assert ([c.label for c in found], unused) == (["small=reference"], ["big", "mode"])
    found, unused = ablate.left_out(toys, {"small": "last"}, ["small", "big"])
    assert (found, unused) == ([], ["big"])


def rows_left_out(base, **ratios):
    rows = [Row(c) for c in ablate.left_out(base, {}, [])[0]]
    for row in rows:
        row.samples = [sample([1], ratio=ratios[row.configuration.label.partition("=")[0]])]
    return rows


def test_things_come_on_one_after_the_other_the_most_worthwhile_first(toys):
    out = rows_left_out(toys, big=1.5, small=1.1, mode=3.0)
    chain = ablate.one_by_one(toys, out, {}, [], 8)
    assert [(c.label, c.policy, c.choices) for c in chain] == [
        ("textbook", "reference", {"mode": "plainest"}),
        ("+ mode", "reference", {"mode": "quick"}),
        ("+ big", "reference", {"mode": "quick", "big": "fastest"}),
        ("+ small", "fastest", {}),  # with the last one everything is on
    ]
    assert chain[1].about == "how"


def test_another_precision_is_no_step_of_the_way(toys, monkeypatch):
    """It is measured where it is asked for, and the way from the textbook begins and ends in the same numbers."""
    monkeypatch.setattr(ablate, "NUMERICS", ("mode",))
    out = rows_left_out(toys, big=1.5, small=1.1, mode=3.0)
    chain = ablate.one_by_one(toys, out, {}, ["big", "small", "mode"], 8)
    assert [c.label for c in chain] == ["textbook", "+ big", "+ small", "+ all the rest"]
    assert all("mode" not in c.choices for c in chain)


def test_what_is_worth_least_comes_on_together(toys):
    out = rows_left_out(toys, big=1.5, small=1.1, mode=3.0)
    chain = ablate.one_by_one(toys, out, {}, [], 1)
    assert [c.label for c in chain] == ["textbook", "+ mode", "+ all the rest"]
    assert (chain[-1].policy, chain[-1].choices) == ("fastest", {})
    chain = ablate.one_by_one(toys, out[:1], {"mode": "plain"}, ["big"], 8)  # others are on, and were not asked about
    assert [(c.label, c.choices) for c in chain] == [
        ("textbook", {"mode": "plain"}),
        ("+ big", {"mode": "plain", "big": "fastest"}),
        ("+ all the rest", {"mode": "plain"}),
    ]
    assert [c.label for c in ablate.one_by_one(toys, [], {}, [], 8)] == ["textbook", "+ all the rest"]


def test_ladders_climb_together_by_the_names_that_they_share(toys):
    found = ablate.rungs(["big", "small"], {"mode": "plain"})
    assert [(c.label, c.choices) for c in found] == [
        ("big=reference", {"mode": "plain", "big": "upto:reference", "small": "upto:reference"}),
        ("big=middle", {"mode": "plain", "big": "upto:middle", "small": "upto:reference"}),
        ("big=last", {"mode": "plain", "big": "upto:last", "small": "upto:last"}),
    ]
    assert [c.about for c in found] == ["the big one", "in between", "at the end"]


# ------------------------------------------------------------------ the picture


def test_bars_of_a_waterfall(tmp_path):
    from matplotlib.figure import Figure

    steps = [("textbook", "", 100.0), ("+ a", "a.py:1", 40.0), ("+ b", "b.py:2", 50.0), ("+ c", "c.py:3", 20.0)]
    axes = Figure().add_subplot()
    waterfall(steps, "a title", "everything on", axes)
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 100), (40, 60), (40, 10), (20, 30), (0, 20)]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[4]
    assert colours[1] == colours[3] != colours[2]  # b costs
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("textbook", "+ a\na.py:1", "+ b\nb.py:2", "+ c\nc.py:3", "everything on")
    ]
    assert "20.0 ms, 5.0x as fast" in [text.get_text() for text in axes.texts]
    waterfall(steps, "a title", "everything on", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
