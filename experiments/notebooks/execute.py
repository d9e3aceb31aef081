#!/usr/bin/env python
"""Run the notebooks from top to bottom and keep what they print and draw: after a change of one, or of what it shows.

Cells tagged `measured` show figures that differ from run to run; what any other cell prints, a test compares with what
is committed. `exercise` marks a cell to fill in, `solution` the folded one below it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def execute(path: Path, timeout: float = 120) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; `path` is only read. Raises CellExecutionError, or after `timeout` s in a cell.

    It runs in the root folder of the source tree, where `import nanocnn` finds it, installed or not.
    """
    notebook = nbformat.read(path, as_version=4)
    places = {"metadata": {"path": str(ROOT)}}
    options = dict(record_timing=False, coalesce_streams=True)  # neither times nor the pace of printing are kept
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=places, **options).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("metadata", {}).clear()
    notebook.metadata.language_info = {"name": "python"}  # the interpreter's version would change with each machine
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="files; else all of this folder")
    for path in parser.parse_args().notebooks:
        start = time.perf_counter()
        notebook = execute(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
