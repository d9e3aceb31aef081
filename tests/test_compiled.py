"""Compiled kernels on disk: found again, never found wrongly, and never in the way of a run."""

from __future__ import annotations

import itertools
import os
import sys
from importlib import import_module
from types import ModuleType

import pytest
from launch import ROOT, alone, finish, start
from numba.core import caching, config
from numba.extending import is_jitted

from nanocnn.kernels import compiled, elementwise, update

HELPER = """
from numba import njit
FACTOR = 2
@njit
def scale(x):
    return FACTOR * x
"""
KERNEL = """
from numba import njit, vectorize
from .helper import scale
@njit(cache=True)
def run(x):
    return scale(x) + x
@njit(cache=True)
def apply(task):
    return task.step(3)
@vectorize(cache=True)
def triple(x):
    return 3 * x
"""
TASK = """
from typing import NamedTuple
from numba import njit
from numba.extending import overload_method, types
from .kernel import apply
class Task(NamedTuple):
    weight: int
@overload_method(types.NamedUniTuple, "step")
def step(task, x):
    return lambda task, x: task.weight * x + 1
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of kernels, and what a new process would make of it: results and hits."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, text in (("__init__", ""), ("helper", HELPER), ("kernel", KERNEL), ("task", TASK)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    config.reload_config()
    runs = itertools.count()

    def run():
        package = ModuleType(f"toy_{next(runs)}_{tmp_path.name}")  # a new name, for Python to import it anew
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, package.__name__, package)
        helper, kernel, task = (import_module(f"{package.__name__}.{name}") for name in ("helper", "kernel", "task"))
        compiled.keep([helper, kernel, task])
        results = kernel.run(7), kernel.apply(task.Task(5)), int(kernel.triple(4))
        hits = [sum(f.stats.cache_hits.values()) for f in (kernel.run, kernel.apply)]
        return " ".join(map(str, [*results, "hits", *hits]))

    run.folder = folder
    run.place = dict(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), NUMBA_CACHE_DIR=str(tmp_path))
    run.files = lambda: sorted(tmp_path.rglob(f"*{compiled.END}"))
    yield run
    monkeypatch.undo()
    config.reload_config()


def test_a_second_run_compiles_nothing(toy):
    assert toy() == "21 16 12 hits 0 0"
    files = toy.files()
    assert len(files) == 3
    assert toy() == "21 16 12 hits 1 1"
    assert toy.files() == files


def test_a_change_in_a_helper_s_file_reaches_the_kernel(toy):
    toy()
    (toy.folder / "helper.py").write_text(HELPER.replace("FACTOR * x", "FACTOR * x + 100"))
    assert toy() == "121 16 12 hits 0 0"
    assert len(toy.files()) == 3  # the old ones are gone
    (toy.folder / "helper.py").write_text(HELPER)
    assert toy().startswith("21 ")


def test_a_constant_that_is_computed_counts_too(toy, monkeypatch):
    text = "import os\n" + HELPER.replace("FACTOR = 2", 'FACTOR = int(os.environ.get("TOY", "2"))')
    (toy.folder / "helper.py").write_text(text)
    assert toy().startswith("21 ")
    monkeypatch.setenv("TOY", "3")
    assert toy().startswith("28 ")
    assert toy() == "28 16 12 hits 1 1"
    monkeypatch.delenv("TOY")
    assert toy() == "21 16 12 hits 1 1"  # as on a second host: its files are still there


def test_a_class_that_an_argument_brings_with_it_counts_too(toy):
    toy()
    (toy.folder / "task.py").write_text(TASK.replace("x + 1", "x + 2"))
    assert toy() == "21 17 12 hits 1 0"


def test_a_broken_file_is_compiled_anew(toy):
    toy()
    empty, torn, changed = toy.files()
    empty.write_bytes(b"")
    torn.write_bytes(torn.read_bytes()[:500])
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    assert toy() == "21 16 12 hits 0 0"
    assert toy() == "21 16 12 hits 1 1"


def test_ranks_that_start_together_on_an_empty_cache(toy):
    """Each first needs other arguments: with Numba's own index they take each other's numbers."""
    program = """
import sys
from nanocnn.kernels import compiled
import toy.helper, toy.kernel
compiled.keep([toy.helper, toy.kernel])
numbers = [7, 0.5, 2j, True]
first = int(sys.argv[1])
for number in numbers[first:] + numbers[:first]:
    assert toy.kernel.run(number) == 3 * number, number
print("right", sum(toy.kernel.run.stats.cache_hits.values()))
"""
    started = [start([sys.executable, "-c", program, str(i)], **toy.place) for i in range(4)]
    outcomes = [finish(process) for process in started]
    assert [(o.status, o.output.split()[0]) for o in outcomes] == [(0, "right")] * 4, outcomes
    assert alone("-c", program, "2", **toy.place).output.split() == ["right", "4"]
    assert len(toy.files()) == 4
    assert not [p for p in toy.folder.parent.rglob("run*") if p.is_file() and p.suffix != compiled.END]


def test_what_one_process_compiles_the_others_wait_for(toy):
    program = """
import toy.helper, toy.kernel
from nanocnn.kernels import compiled
compiled.keep([toy.helper, toy.kernel])
toy.kernel.run(1)
print(sum(toy.kernel.run.stats.cache_misses.values()))
"""
    started = [start([sys.executable, "-c", program], **toy.place) for _ in range(4)]
    assert sorted(finish(process).output.split()[-1] for process in started) == ["0", "0", "0", "1"]


def test_a_process_that_failed_to_compile_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    key = ((), "machine", "code")
    first, second = (compiled.Shelf(str(tmp_path), update._scale.py_func) for _ in range(2))
    assert first.load(key) is None  # and compiles, and fails
    assert first.load(key) is None  # and tries again
    monkeypatch.setattr(compiled, "PATIENCE", 0.1)
    assert second.load(key) is None
    second.save(key, "code")
    assert first.load(key) == second.load(key) == "code"
    first.save(key, "code")
    assert [path.suffix for path in tmp_path.iterdir()] == [compiled.END]


def test_a_cache_that_cannot_be_written_costs_only_the_compilation(tmp_path):
    shelf = compiled.Shelf(str(tmp_path / "gone"), update._scale.py_func)
    key = ((), "machine", "code")
    shelf.save(key, [1, 2])
    assert shelf.load(key) is None
    (tmp_path / "gone").mkdir()
    shelf.save(key, [1, 2])
    assert shelf.load(key) == [1, 2]
    assert shelf.load(((), "another machine", "code")) is None
    shelf.flush()
    assert shelf.load(key) is None


def test_every_kernel_of_ours_is_kept_so():
    found = 0
    for module in (elementwise, update):
        for kernel in vars(module).values():
            if is_jitted(kernel) and isinstance(kernel._cache, caching.Cache):
                assert isinstance(kernel._cache._cache_file, compiled.Shelf), kernel
                found += 1
    assert found > 10
    assert isinstance(elementwise._erf._dispatcher.cache._cache_file, compiled.Shelf)


def test_the_closure_of_imports():
    names = {name.rpartition(".")[2] for name in compiled._closure("nanocnn.kernels.conv2d")}
    assert {"conv2d", "im2col", "matmul", "elementwise", "vecmath", "memory"} <= names
    assert "update" not in names
    assert compiled._closure("nanocnn.kernels.vecmath") == ("nanocnn.kernels.vecmath",)
