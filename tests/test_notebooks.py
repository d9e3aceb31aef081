"""The notebooks run from top to bottom, show what is committed, and their exercises have solutions that pass."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest
from launch import NEEDS_GXX
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments" / "notebooks"))

from execute import NOTEBOOKS, execute  # noqa: E402

from nanocnn.kernels import dispatch  # noqa: E402

each = pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=NEEDS_GXX if path.stem == "cuda" else ()) for path in NOTEBOOKS]
)
RUNG = re.compile(r"^ (\w+) .* (conv2d\w*\.py):\d+", re.M)  # a line of the ladder: name and file
LARGEST = 400_000  # bytes: a page that a browser and a pull request show at once


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has(cell, tag):
    return tag in cell.metadata.get("tags", ())


def printed(cell):
    """Everything that a cell shows in words."""
    texts = [o.text if o.output_type == "stream" else o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "".join(texts)


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["autograd", "convolution", "cuda"]


@each
def test_runs_and_shows_what_is_committed(path):
    committed, fresh = nbformat.read(path, as_version=4), execute(path)
    for before, now in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert pictures(before) == pictures(now), now.source
        if not has(now, "measured") and not has(now, "exercise"):  # whose error is worded by Python
            assert printed(before) == printed(now), f"run experiments/notebooks/execute.py:\n{now.source}"
    assert exercises_of(fresh) == exercises_of(committed)


def test_the_rungs_that_are_shown_are_on_the_board():
    """Measured cells are not compared with what is committed, for their times differ; their rungs must be there."""
    cells = code_cells(nbformat.read(ROOT / "experiments" / "notebooks" / "convolution.ipynb", as_version=4))
    shown = {row for cell in cells for row in RUNG.findall(printed(cell))}
    variants = dispatch.primitives["conv2d"].variants.values()
    assert shown <= {(v.name, v.place.partition(":")[0]) for v in variants}
    assert len(shown) >= 6


def exercises_of(notebook):
    """The number of exercises, each of which the empty answer fails and the solution below it passes."""
    cells = code_cells(notebook)
    number = 0
    for cell, following in zip(cells, cells[1:] + cells[-1:], strict=True):
        if has(cell, "exercise"):
            number += 1
            assert has(following, "solution"), cell.source
            assert following.metadata.jupyter.source_hidden, "a solution is folded"
            assert re.fullmatch(r"\w+: not yet\. .+\n", printed(cell)), printed(cell)
            assert re.fullmatch(r"\w+: right\n", printed(following)), printed(following)
            check = re.search(r"^attempt\((check_\w+), \w+\)", cell.source, re.M)
            assert check, cell.source
            assert re.search(rf"^{check[1]}\(\w+\)$", following.source, re.M), "a wrong solution raises"
    assert number == sum(has(cell, "solution") for cell in cells) >= 2
    return number


@each
def test_is_fit_to_be_committed(path):
    """It was run in order and without errors, is small, and names no folder of the machine that it ran on."""
    assert path.stat().st_size < LARGEST
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(pictures(cell) for cell in cells)
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
        assert not re.search(r"(?<![\w.])(/\w+){2,}|[A-Z]:\\", printed(cell)), printed(cell)


def test_a_cell_that_fails_is_an_error(tmp_path):
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(path)
