"""The first rungs in Numba CUDA: right in Numba's simulator, compiled for GPUs without one, and only where they can."""

from __future__ import annotations

import json
import re
import sys

import numba
import numpy as np
import pytest
from launch import NEEDS_GXX, ROOT, alone
from test_kernels import CASES, OURS

from nanocnn import traffic
from nanocnn.kernels.dispatch import ChoiceError, DeviceError, to_device, using
from nanocnn.kernels.numba_cuda import elementwise, launch
from nanocnn.traffic import on_emulator

RUNGS = [name for name, p in OURS.items() if "numba_cuda" in p.variants]
IN_DOUBLE = {"batch_norm_stats"}  # adds up in float64 whatever comes
pytestmark = pytest.mark.skipif(launch.simulating(), reason="these tests start the simulator where they need it")


@pytest.fixture(scope="module")
def simulated():
    """What tests/in_simulator.py has compared. In one process: importing and the first kernels cost seconds."""
    outcome = alone(ROOT / "tests" / "in_simulator.py", timeout=200, NUMBA_ENABLE_CUDASIM="1")
    assert outcome.status == 0, outcome.output
    return json.loads(outcome.output.splitlines()[-1])


def test_every_rung_equals_its_reference_in_the_simulator(simulated):
    assert list(simulated["simulated"]) == RUNGS
    assert len(RUNGS) >= 13
    for name, (in_double, in_single) in simulated["simulated"].items():
        assert in_double >= 3, name
        assert in_single == 1, name


def test_the_kernels_of_the_cpu_do_not_mind_the_simulator(simulated):
    assert set(simulated["cpu"]) >= {"im2col", "max_pool2d", "relu", "batch_norm_stats"}
    assert set(simulated["cpu"].values()) == {1}


def test_the_ladder_begins_with_them():
    for name in RUNGS:
        on_a_gpu = [v.name for v in OURS[name].variants.values() if v.device == "cuda"]
        assert on_a_gpu[0] == "numba_cuda"
        assert len(on_a_gpu) > 1, f"{name} has no rung in CUDA C++ above"
        assert OURS[name].variants["numba_cuda"].auto is False


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)], ids="{0[0]}{0[1]}".format)
@pytest.mark.parametrize("name", RUNGS)
def test_it_compiles_for_a_gpu(name, cc, monkeypatch):
    """To PTX, for the arguments of its first example call in float32; nothing computes in float64 by oversight."""
    made = []
    monkeypatch.setattr(launch.jit, "launch", lambda self, grid, block, *args: made.append(self.ptx(*args, cc=cc)))
    variant = OURS[name].variants["numba_cuda"]
    calls = map(on_emulator, CASES[name](np.random.default_rng(7), np.float32))
    args, kwargs = next((args, kwargs) for args, kwargs in calls if variant.supports(*args, **kwargs))
    with using("reference"), np.errstate(all="ignore"):  # nothing was computed: what comes back is nonsense
        variant.body(*args, **kwargs)
    assert made
    for ptx in made:
        assert f".target sm_{cc[0]}{cc[1]}" in ptx
        assert len(re.findall(r"\.visible \.entry ", ptx)) == 1
        assert bool(re.search(r"\.f64\b", ptx)) == (name in IN_DOUBLE)


def test_tiles_are_in_shared_memory():
    """Two arrays of 16 x 16 floats, and a barrier on each side of their use."""
    from nanocnn.kernels.numba_cuda import gemm

    ptx = gemm._tiled.ptx(*np.zeros((3, 5, 5), np.float32))
    assert [int(size) for size in re.findall(r"\.shared .*\[(\d+)\];", ptx)] == [16 * 16 * 4] * 2
    assert ptx.count("bar.sync") >= 2


def test_without_the_simulator_the_error_says_how_to_get_it():
    x = to_device(np.ones((2, 3), np.float32), "emulated")
    with using(relu="numba_cuda"), pytest.raises(ChoiceError) as raised:
        OURS["relu"](x)
    assert "relu=numba_cuda cannot do this call: float32[2, 3] on emulated (a kernel in Numba" in str(raised.value)
    assert "set NUMBA_ENABLE_CUDASIM=1" in str(raised.value)
    assert "variants that can: reference, cuda (elementwise.py:" in str(raised.value)
    with using(relu="upto:numba_cuda"):
        assert OURS["relu"].choose(x).name == "reference"
    with using(relu="numba_cuda"), pytest.raises(ChoiceError, match="on cpu; variants that can: reference, numba"):
        OURS["relu"](np.ones(3, np.float32))


@NEEDS_GXX
def test_the_emulator_counts_only_its_own_kernels(monkeypatch):
    x = np.ones(3, np.float32)
    assert [c.variant for c in traffic.count("relu", x)] == ["cuda"]
    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", 1)
    monkeypatch.setattr(launch.jit, "launch", lambda self, grid, block, x, y: np.copyto(y, x))  # right, and no kernel
    in_numba, ours = traffic.count("relu", x)
    assert in_numba.note == "no kernel in CUDA C++, so nothing counts what it does; error 0.0e+00"
    assert (ours.variant, ours.note) == ("cuda", "")


def test_with_the_simulator_arrays_of_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", 1)
    assert launch.lacks("emulated") == ""
    assert "unset NUMBA_ENABLE_CUDASIM" in launch.lacks("cuda")
    with pytest.raises(DeviceError, match="simulator compiles nothing"):
        elementwise._relu.ptx(np.ones(3), np.ones(3))


def test_without_nvidias_compiler_the_error_says_where_it_comes_from(monkeypatch):
    class WithoutNvvm:
        implementation = "as a package of its own"

        def compile(self, *args, **kwargs):
            raise RuntimeError("libNVVM cannot be found")

    monkeypatch.setattr(launch.jit, "_cuda", lambda self: WithoutNvvm())
    with pytest.raises(DeviceError, match=r"libNVVM cannot be found\. It comes .* pip install 'nanocnn\[nvrtc\]'"):
        elementwise._relu.ptx(np.ones(3), np.ones(3))


def test_nothing_of_cuda_is_imported_before_a_launch(simulated):
    assert simulated["early"] == []


def test_the_example_of_the_page(tmp_path):
    """docs/gpu.md's program, run as it says, prints what the page shows; its kernel is the file's."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    section = page.partition("## The first rungs, in Numba\n")[2].partition("\n## ")[0]
    kernel, program = re.findall(r"```python\n(.*?)```", section, re.S)
    assert kernel.strip() in (ROOT / "kernels" / "numba_cuda" / "im2col.py").read_text()
    (command,) = re.findall(r"```bash\n(.*?)```", section, re.S)
    variables, _, words = command.strip().partition(" python ")
    assert variables == "NUMBA_ENABLE_CUDASIM=1"
    path = tmp_path / words
    path.write_text(program)
    outcome = alone(path, NUMBA_ENABLE_CUDASIM="1")
    (shown,) = re.findall(r"```text\n(.*?)```", section, re.S)
    assert outcome.output == shown, sys.executable
