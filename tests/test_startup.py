"""The start of a training, cold, warm and on two ranks at once, as experiments/startup.py measures it."""

from __future__ import annotations

import sys

import pytest
from launch import ROOT, alone

sys.path.insert(0, str(ROOT / "experiments"))  # a script's neighbours are found beside it

import startup

# A few kernels take some seconds to compile, enough for the progress line; all of AlexNet's would take a minute.
FEW = ["--width", "0.1", "--batch", "16", "--use", "reference", "conv2d=direct", "conv2d_grad_w=direct"]
# Seconds: the aim is 3 on an idle machine, and this is no timing test. More means that there is work in a warm start.
GENEROUS = 30


@pytest.fixture(scope="module")
def ways():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["startup.py", *FEW])
        patch.setenv("PYTHONPATH", str(ROOT))
        return startup.measure(startup.arguments())


def test_a_cold_start_compiles_and_says_so(ways):
    (cold,) = ways["cold"]
    assert cold.said.startswith("compiling kernels, once")
    assert cold.compiled > 0


def test_a_warm_start_compiles_nothing(ways):
    (cold,), (warm,) = ways["cold"], ways["warm"]
    assert (warm.compiled, warm.said) == (0, "")
    assert warm.seconds < min(cold.seconds, GENEROUS)
    assert warm.losses == cold.losses


def test_two_ranks_start_together_on_an_empty_cache(ways):
    (cold,), (both,) = ways["cold"], ways["two ranks, cold"]
    assert both.compiled > 0
    assert len(both.losses) == 2
    assert both.losses[0] == both.losses[1]
    assert both.losses[0] == pytest.approx(cold.losses[0], rel=1e-5)


def test_the_table(ways, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["startup.py", *FEW])
    startup.show(startup.arguments(), ways)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for way, (one,) in ways.items():
        assert f"{way} {one.seconds:.1f} {one.compiled} {one.said}".strip() in lines


def test_a_training_that_fails_is_an_error():
    outcome = alone(startup.__file__, "--width", "0.1", "--use", "conv2d=nonsense")
    assert outcome.status == 1
    assert "conv2d has no choice 'nonsense'" in outcome.output


def test_help_teaches():
    outcome = alone(startup.__file__, "--help")
    assert outcome.status == 0
    for words in ("--model resnet18", "--repeat 3", "(default: 128)"):
        assert words in outcome.output
