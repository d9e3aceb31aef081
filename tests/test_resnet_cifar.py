"""ResNet-18 by the loop of the main job: its own options, and that it learns and records."""

from __future__ import annotations

import json

from launch import ROOT, alone

SCRIPT = ROOT / "experiments" / "resnet_cifar.py"


def test_it_learns_and_records(tmp_path):
    small = ["--data", "shapes", "--train-images", "256", "--width", "0.125", "--epochs", "2", "--stem", "imagenet"]
    outcome = alone(SCRIPT, "--runs", tmp_path, "--lr", "0.1", "--batch-size", "32", *small, timeout=120)
    assert outcome.status == 0, outcome.output
    assert "ResNet-18, " in outcome.output
    result = json.loads((tmp_path / "resnet-18-shapes" / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["config"]["stem"] == "imagenet"
    first, second = result["history"]
    assert second["loss"] < first["loss"]


def test_an_unknown_stem_is_refused(tmp_path):
    outcome = alone(SCRIPT, "--runs", tmp_path, "--stem", "mnist", timeout=60)
    assert outcome.status == 2
    assert "invalid choice: 'mnist'" in outcome.output
    assert not list(tmp_path.iterdir())
