"""The README's tables: written from result files, checked against them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = """# title

<!-- table: networks -->
old
<!-- /table -->

words

<!-- table: layers -->
<!-- /table -->
end
"""


def row(peer: str, setting: str, median: float) -> dict:
    return dict(peer=peer, setting=setting, median=median, minimum=0.9 * median)


def result(batch: int = 128, **parts) -> dict:
    peers = dict(
        ours=dict(title="nanocnn", versions={"nanocnn": "0.1.0"}),
        pytorch=dict(title="PyTorch", versions={"torch": "2.13.0"}),
        jax=dict(title="JAX", versions={"jax": "0.10"}),
    )
    machine = dict(processor=dict(name="A processor"))
    fixed = dict(kind="vs_peers", command="python experiments/vs_peers.py", date="2026-01-02", threads=2, width=1.0)
    return dict(**fixed, batch=batch, machine=machine, peers=peers, **{"networks": [], "layers": [], **parts})


TRAIN = dict(
    model="alexnet",
    mode="train",
    rows=[
        row("ours", "fastest", 0.05),
        row("pytorch", "contiguous", 0.25),
        row("pytorch", "channels_last", 0.2),
        row("jax", "jit", 0.1),
    ],
)
LAYER = dict(
    layer="64 -> 64, 32x32, 3x3", direction="grad_w", rows=[row("ours", "fastest", 0.003), row("pytorch", "a", 0.004)]
)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "README.md").write_text(README)
    save(tmp_path, "a.json", result(networks=[TRAIN]))
    save(tmp_path, "b.json", result(layers=[LAYER]))
    save(tmp_path, "other.json", {"kind": "something else"})
    return tmp_path / "README.md"


def save(folder: Path, name: str, value: dict) -> None:
    (folder / name).write_text(json.dumps(value))


def table(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "experiments" / "table.py", "--readme", page, "--results", page.parent, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def test_tables_are_written_and_checked(page):
    assert table(page, "--check").returncode == 1
    assert page.read_text() == README
    assert table(page).returncode == 0
    text = page.read_text()
    assert "| AlexNet, training, batch 128 | **50.0 (45.0)** | 200 (180) | 100 (90.0) | 0.25 | 0.50 |" in text
    assert "PyTorch: contiguous, channels_last" in text
    assert "| 64 -> 64, 32x32, 3x3 |  |  | 3.00 (0.75, 0.75) |" in text
    assert "A processor, 2 threads, 2026-01-02" in text
    assert "torch 2.13.0" in text
    assert "`python experiments/vs_peers.py`" in text
    assert "old" not in text
    assert text.startswith("# title\n\n<!-- table: networks -->\n|")
    assert "\n\nwords\n\n" in text
    assert text.endswith("<!-- /table -->\nend\n")
    assert table(page, "--check").returncode == 0
    assert table(page).returncode == 0
    assert page.read_text() == text
    save(page.parent, "a.json", result(networks=[{**TRAIN, "mode": "infer"}]))
    outcome = table(page, "--check")
    assert outcome.returncode == 1
    assert f"run python experiments/table.py --readme {page}" in outcome.stderr


def test_runs_with_another_batch_make_one_table(page):
    save(page.parent, "c.json", result(batch=1, networks=[{**TRAIN, "rows": TRAIN["rows"][:3]}]))
    assert table(page).returncode == 0
    assert "| AlexNet, training, batch 1 | **50.0 (45.0)** | 200 (180) |  | 0.25 | 0.25 |" in page.read_text()


def test_ours_over_pytorch_has_a_column_for_each_folder(page):
    page.write_text("<!-- table: pytorch -->\n<!-- /table -->\n" + README)
    one = result(networks=[{**TRAIN, "rows": [row("ours", "captured", 0.1), *TRAIN["rows"][1:3]]}])
    save(page.parent, "c.json", {**one, "threads": 1})
    (page.parent / "narrow").mkdir()
    save(page.parent / "narrow", "a.json", result(networks=[{**TRAIN, "rows": TRAIN["rows"][:2]}]))
    save(page.parent, "d.json", result(batch=1, networks=[{**TRAIN, "rows": [TRAIN["rows"][i] for i in (0, 3)]}]))
    outcome = table(page)
    assert outcome.returncode == 0, outcome.stderr
    text = page.read_text()
    assert "| nanocnn / PyTorch, median | 2 threads | 1 thread | 2 threads, narrow |\n" in text
    assert text.count("| AlexNet, training, batch 128 | 0.25 | 0.50 | 0.20 |\n") == 1
    first = text[: text.index("<!-- /table -->")]
    assert "batch 1 |" not in first  # measured without PyTorch
    assert "narrow" not in text[len(first) :]
    save(page.parent / "narrow", "b.json", result(networks=[TRAIN]))
    assert "two result files measured AlexNet, training, batch 128, 2 threads, narrow: keep one" in table(page).stderr


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_the_pages_say_what_the_result_files_say(name):
    command = [sys.executable, ROOT / "experiments" / "table.py", "--readme", ROOT / name, "--check"]
    outcome = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr


def test_bad_input_is_named_and_nothing_written(page):
    save(page.parent, "c.json", result(networks=[TRAIN]))
    assert "two result files measured alexnet, train, 128, 2" in table(page).stderr
    save(page.parent, "c.json", {**result(), "width": 0.125})
    assert "c.json measured networks of width 0.125" in table(page).stderr
    (page.parent / "c.json").write_text("{")
    assert "c.json: no JSON" in table(page).stderr
    for name in ("a.json", "b.json", "c.json"):
        (page.parent / name).unlink()
    assert "run experiments/vs_peers.py" in table(page).stderr
    assert page.read_text() == README
    for text, word in (
        ("nothing", "expected <!-- table: NAME -->"),
        (README.replace("layers", "speed"), "table: speed -->: expected one of networks, layers, pytorch"),
        (README + "<!-- /table -->", "for each of them"),
    ):
        page.write_text(text)
        save(page.parent, "a.json", result(networks=[TRAIN]))
        outcome = table(page)
        assert outcome.returncode == 1
        assert word in outcome.stderr
        assert page.read_text() == text
