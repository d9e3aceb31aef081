"""What the README says is true: its examples run, its commands are the ones that CI runs, its files exist."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import nanocnn as nc
from nanocnn.__main__ import main
from nanocnn.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_ci_runs_the_second_command():
    command = next(line for block in blocks("bash") for line in block.splitlines() if "-m pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_kernel_example_is_a_kernel():
    source = next(block for block in blocks("python") if "@Primitive" in block)
    names = {"__name__": "nanocnn.kernels.example", "__package__": "nanocnn.kernels"}
    try:
        exec(compile(source, "README.md", "exec"), names)
        leaky_relu = dispatch.primitives["leaky_relu"]
        assert list(leaky_relu.variants) == ["reference", "numba"]
        x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
        results = {name: variant.body(x, 0.1) for name, variant in leaky_relu.variants.items()}
        np.testing.assert_allclose(results["numba"], results["reference"], rtol=1e-6)
        assert results["numba"].dtype == np.float32
    finally:
        dispatch.primitives.pop("leaky_relu", None)


def test_the_model_example_learns():
    source = next(block for block in blocks("python") if "class Tiny" in block)
    names = {"images": np.ones((2, 8, 8, 3), np.float32), "labels": np.array([1, 2]), "__name__": "example"}
    exec(compile(source, "README.md", "exec"), names)
    assert names["loss"].item() > 0
    assert nc.Tensor is type(names["loss"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (folder / target).exists(), f"{page} links to {target}"


def help_of(words: list[str], monkeypatch, capsys) -> str:
    """What `python WORDS --help` prints. In this process: there are many, and starting each takes a second and more."""
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    run: Callable[[], object] = partial(runpy.run_path, str(ROOT / words[0]), run_name="__main__")
    if words[:2] == ["-m", "nanocnn"]:
        run = partial(main, [*words[2:], "--help"])
    with pytest.raises(SystemExit) as ended:
        run()
    printed = capsys.readouterr()
    assert ended.value.code == 0, f"{' '.join(words)}\n{printed.err}"
    return printed.out


def test_the_commands_take_their_options(monkeypatch, capsys):
    """Every option in a command line of ours is one that the program's --help names."""
    monkeypatch.syspath_prepend(ROOT / "experiments")  # a script's neighbours are found beside it
    lines = [line.split(" # ")[0].rstrip("\\ ") for text in PAGES.values() for line in text.splitlines()]
    lines += [" ".join(words.split()) for text in PAGES.values() for words in re.findall(r"`(python [^`]+)`", text)]
    helps: dict[str, str] = {}
    seen = 0
    for line in lines:
        found = re.search(r"(experiments/\w+\.py|data/prepare\.py|-m nanocnn \w+)(( [^`|&]*)?)$", line)
        if not found or line.startswith(("#", "@", "|")):
            continue
        if found[1] not in helps:
            helps[found[1]] = help_of(found[1].split(), monkeypatch, capsys)
        for option in re.findall(r"(?<=\s)--[a-z-]+", found[2]):
            assert option in helps[found[1]], f"{line}: {found[1]} has no {option}"
        seen += 1
    assert seen >= 20
