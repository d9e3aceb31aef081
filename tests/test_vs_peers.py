"""The comparison with other frameworks: what it measures, what it refuses. Tiny networks, no figure of use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "experiments" / "vs_peers.py"


@pytest.fixture
def script(monkeypatch):
    """vs_peers.py as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import vs_peers

    return vs_peers


def run(out: Path, *options: str) -> tuple[dict, str]:
    """The result file and what was printed."""
    command = [sys.executable, str(SCRIPT), "--quick", "--batch", "4", "--out", str(out), *options]
    outcome = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert (out / "vs_peers.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "vs_peers.json").read_text()), outcome.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_alone(tmp_path):
    result, printed = run(tmp_path, "--peers", "ours", "--models", "alexnet", "--threads", "1")
    assert [entry["mode"] for entry in result["networks"]] == ["train", "infer"]
    assert result["command"] == (
        "python experiments/vs_peers.py --quick --batch 4 --peers ours --models alexnet --threads 1"
    )
    assert set(result["peers"]) == {"ours"}
    assert result["machine"]["processor"]["name"]
    assert result["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}\+?", result["commit"])
    for entry in result["networks"]:
        assert [row["setting"] for row in entry["rows"]] == ["fastest", "captured"]
        for row in entry["rows"]:
            assert len(row["seconds"]) == 1
            assert row["median"] == row["minimum"] == row["seconds"][0] > 0
            assert row["environment"] == {"NANOCNN_THREADS": "1"}
        assert {difference for difference, _ in entry["rows"][1]["check"].values()} == {0}
    train = result["networks"][0]["rows"][0]
    assert train["memory"] > 1e6  # the weights, their gradients and momentum alone
    assert "ours (captured): loss 0.0e+00" in printed


def test_pytorch_computes_the_same(tmp_path):
    pytest.importorskip("torch")
    result, printed = run(tmp_path, "--peers", "pytorch", "--models", "resnet18")
    assert len(result["networks"]) == 2
    for entry in result["networks"]:
        assert [row["setting"] for row in entry["rows"]] == ["fastest", "captured", "contiguous", "channels_last"]
        assert entry["rows"][0]["check"] == {}
        for row in entry["rows"][1:]:
            expected = {"loss", "gradient"} if entry["mode"] == "train" else {"logits"}
            assert set(row["check"]) == expected
            most = max(difference for difference, _ in row["check"].values())
            assert most == 0 if row["peer"] == "ours" else 0 < most < 0.05
            assert row["peer"] == "ours" or row["environment"]["THP_MEM_ALLOC_ENABLE"] == "1"
    assert printed.count("ours / the best of PyTorch") == 2


def test_layers(tmp_path):
    pytest.importorskip("torch")
    result, printed = run(tmp_path, "--layers", "--peers", "pytorch", "--models", "alexnet")
    first, *others = result["layers"]
    assert first["layer"] == "3 -> 8, 32x32, 3x3 stride 2"
    assert first["direction"] == "forward"
    assert first["flops"] == 2 * 4 * 16 * 16 * 9 * 3 * 8
    assert [entry["direction"] for entry in others[:4]] == ["grad_w", "forward", "grad_x", "grad_w"]
    assert len(result["layers"]) == 14  # five layers in three directions, without the gradient of the images
    for entry in result["layers"]:
        assert all(difference < 1e-3 for row in entry["rows"] for difference, _ in row["check"].values())
    assert printed.count("grad_w") == 5
    assert all(len(line) <= 120 for line in printed.splitlines() if "all times" not in line)


@pytest.mark.parametrize("name", ["jax", "onnxruntime", "openvino", "tensorflow"])
def test_layers_of_the_others(name, tmp_path, script):
    if script.peers.missing(name):
        pytest.skip(f"{name} is not installed")
    result, _ = run(tmp_path, "--layers", "--peers", name, "--models", "alexnet")
    trains = bool(script.peers.load(name).TRAIN)
    for entry in result["layers"]:
        theirs = trains or entry["direction"] == "forward"
        assert [row["peer"] for row in entry["rows"]] == ["ours", name][: 1 + theirs]
        assert all(difference < 1e-3 for row in entry["rows"] for difference, _ in row["check"].values())


def test_a_layer_line_has_a_column_for_each_framework(script):
    """Each in its best setting, empty where it cannot do that; medians and minima are compared with the best."""
    peers = {name: dict(title=title) for name, title in (("ours", "nanocnn"), ("a", "A framework"), ("b", "B"))}
    row = {"peer": "ours", "setting": "x", "median": 0.002, "minimum": 0.001}
    a = [
        {"peer": "a", "setting": "slow", "median": 0.008, "minimum": 0.003},
        {"peer": "a", "setting": "fast", "median": 0.004, "minimum": 0.004},
    ]
    entry = dict(layer="64 -> 64, 32x32, 3x3", direction="grad_w", rows=[row, *a])
    line = script._report.layer_line(entry, dict(peers=peers))
    assert line.split()[-5:] == ["grad_w", "2.00", "4.00", "0.50", "0.33"]
    lines = script._report.layer_header(dict(peers=peers)).splitlines()
    assert len(line) == len(lines[-1])
    assert lines[-1].index("A framework") + len("A framework") == line.index("4.00") + 4
    alone = script._report.layer_line({**entry, "rows": [row]}, dict(peers={"ours": peers["ours"]}))
    assert alone.split()[-2:] == ["grad_w", "2.00"]


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_kept(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "vs_peers.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert script.commit() is None
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    (tmp_path / "a.txt").write_text("a")
    git(tmp_path, "init")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-m", "a")
    git(tmp_path, "tag", "v1")
    (tmp_path / "untracked").write_text("")
    clean = script.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "a.txt").write_text("b")
    assert script.commit() == clean + "+"
    monkeypatch.setenv("PATH", "")
    assert script.commit() is None


def test_what_takes_long_at_first_is_said_once(script, monkeypatch):
    said = []
    monkeypatch.setattr(script, "say", said.append)
    monkeypatch.setattr(script, "PATIENCE", 0.01)
    comparison = script.Comparison.__new__(script.Comparison)
    comparison.told = False
    for name, lines in (("pytorch", 0), ("ours", 1), ("ours", 1)):
        with comparison.patience(SimpleNamespace(name=name)):
            time.sleep(0.2)
        assert len(said) == lines
    assert "kernels are compiled" in said[0]
    comparison.told = False
    monkeypatch.setattr(script, "PATIENCE", 5)
    with comparison.patience(SimpleNamespace(name="ours")):
        pass
    assert len(said) == 1


def test_what_the_user_said_of_the_processor_is_kept(script):
    process = sys.modules["peers._process"]
    for name in ("NUMBA_CPU_NAME", "NUMBA_CACHE_DIR", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        assert process.KEPT.match(name)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_ENABLE_ONEDNN_OPTS", "NUMBA_DISABLE_JIT"):
        assert process.OTHERS.match(name)
        assert not process.KEPT.match(name)


def refused(script, monkeypatch, capsys, tmp_path, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["vs_peers.py", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as error:
        script.arguments()
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_options_are_named(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(script.peers, "missing", lambda name: ["openvino", "onnx"] if name == "openvino" else [])
    for options, words in (
        (["--peers", "theano"], "unknown peer 'theano'; there are: ours, pytorch, jax"),
        (["--peers", "openvino"], "openvino is not installed: pip install openvino onnx"),
        (["--peers", "onnxruntime", "--modes", "train"], "onnxruntime can do nothing of this; it does: infer"),
        (["--threads", "9999"], "--threads 9999: this process may use"),
        (["--use", "conv2d=fast"], "conv2d has no choice 'fast'"),
        (["--rounds", "0"], "expected a positive integer"),
        (["--out", f"{__file__}/x"], "--out: [Errno"),
    ):
        assert words in refused(script, monkeypatch, capsys, tmp_path, *options)


def test_the_command_is_kept_without_its_folder(script):
    words = ["--quick", "--out", "there", "--batch", "4", "--out=here"]
    assert script.common.without_folder(words) == ["--quick", "--batch", "4"]


def test_a_peer_that_is_not_installed_is_left_out_unless_it_is_asked_for(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.peers, "missing", lambda name: [] if name == "ours" else [name])
    monkeypatch.setattr(sys, "argv", ["vs_peers.py", "--out", str(tmp_path)])
    assert script.Comparison(script.arguments()).names == ["ours"]


def test_a_framework_that_computes_something_else_is_an_error(script):
    gradients = {"a": np.ones((2, 3)), "b": np.ones(4)}
    ours = [2.3, 2.2, 2.1], (2.3, gradients)
    same = script.compare("train", ours, ours)
    assert same == {"loss": (0, "losses of three steps"), "gradient": (0, "b")}
    for theirs in (
        ([2.3, 2.2, 2.0], (2.3, gradients)),  # another update
        (ours[0], (2.3, {**gradients, "b": np.ones(4) * 1.1})),
        (ours[0], (2.3, {**gradients, "b": np.full(4, np.nan)})),
        (ours[0], (2.3, {**gradients, "a": np.ones((3, 2))})),
        (ours[0], (2.3, {"a": gradients["a"]})),
    ):
        row = dict(peer="x", setting="y", check=script.compare("train", theirs, ours))
        with pytest.raises(script.Disagreement, match=r"x \(y\) disagrees with nanocnn: (loss|gradient) of .* differ"):
            script.demand_agreement([row])
    logits = script.compare("infer", np.ones((2, 10)) * 1.01, np.ones((2, 10)))
    assert logits["logits"][0] == pytest.approx(0.01)


def test_a_worker_says_what_went_wrong(script, monkeypatch):
    monkeypatch.setitem(sys.modules["peers._process"].ENVIRONMENT, "PYTHONPATH", str(ROOT))
    process = script.Process("ours", "fastest", 1)
    try:
        with pytest.raises(script.PeerFailed, match=r"(?s)ours \(fastest\) failed:.*no attribute 'nonsense'"):
            process.ask("nonsense")
        process.process.kill()
        with pytest.raises(script.PeerFailed, match=r"ours \(fastest\) ended with status -9"):
            process.ask("turn", 1)
    finally:
        process.close()


def test_every_peer_defines_what_the_others_need(script):
    peers = script.peers
    assert peers.names()[:2] == ["ours", "pytorch"]
    for name in peers.names():
        peer = peers.load(name)
        assert isinstance(peer.TITLE, str)
        assert script.abilities(name)
        assert bool(peer.TRAIN) == hasattr(peer, "training")
        assert bool(peer.INFER) == hasattr(peer, "inference")
        assert bool(getattr(peer, "LAYERS", {})) == hasattr(peer, "convolution")
        for setting in {**peer.TRAIN, **peer.INFER}:
            assert all(isinstance(value, str) for value in peer.environment(setting, 2).values())
