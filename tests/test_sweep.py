"""Launch configurations: what the source says, what else may be tried, and what each takes of a multiprocessor."""

from __future__ import annotations

import numpy as np
import pytest
from launch import NEEDS_GXX, alone

from nanocnn import sweep
from nanocnn.__main__ import main
from nanocnn.bench import BenchError
from nanocnn.kernels.cuda import gemm, softmax
from nanocnn.kernels.cuda.launch import Kernel, launches
from nanocnn.kernels.cuda.occupancy import Occupancy, occupancy
from nanocnn.kernels.cuda.source import macros
from nanocnn.kernels.cuda.tunable import Tunable, asked
from nanocnn.kernels.dispatch import DeviceError, to_device

SOFTMAX = "-m", "nanocnn", "bench", "softmax", "--size", "4", "--batch", "2"


def test_macros_are_read_and_computed():
    found = macros("gemm.cu")
    assert (found["TILE"], found["BLOCK_M"], found["THREADS"]) == (32, 64, 256)
    assert macros("gemm.cu", THREAD_M=8)["THREADS"] == 128  # BLOCK_M / THREAD_M * (BLOCK_N / THREAD_N)
    assert macros("gemm.cu", "TILE", "WIDE") == {"TILE": 32, "WIDE": 128}
    assert macros("batch_norm.cu")["THREADS"] == 256  # of reduce.cuh, which it includes
    assert "REAL" not in macros("elementwise.cu")  # a type, and no number


def test_others_hold_inside_a_block():
    t = Tunable("a rule", {"a": 1, "b": 2}, {"b": 3})
    assert t.others == [{"a": 1, "b": 3}]
    with asked() as looked:
        assert t["b"] == 2
    assert looked == [t]
    with t.using(b=5):
        assert (t["a"], t["b"], t.different()) == (1, 5, {"b": 5})
        with t.using(a=7):
            assert (t["a"], t["b"]) == (7, 2)
        assert t["b"] == 5
        with pytest.raises(ZeroDivisionError), t.using(a=7):
            raise ZeroDivisionError
        assert t["b"] == 5
    assert not t.different()
    with pytest.raises(ValueError, match="no c to choose; there are: a, b"), t.using(c=1):
        pass


def test_a_kernel_is_compiled_with_what_differs():
    kernel = Kernel("gemm.cu", "gemm_tiled", gemm.TILES)
    assert kernel["TILE"] == 32
    assert kernel._defines() == {}
    with gemm.TILES.using(TILE=8):
        assert kernel["TILE"] == 8
        assert kernel._defines() == {"TILE": 8}
    mixed = Tunable("", {**macros("reduce.cuh", "THREADS"), "each": 8})
    with mixed.using(THREADS=64, each=2):  # `each` is the launch's, and no macro
        assert Kernel("update.cu", "sum_of_squares", mixed)._defines() == {"THREADS": 64}


# As cuda_occupancy.h of CUDA 13.0 computes it: registers, threads, shared bytes, architecture.
OCCUPANCIES = [
    ((32, 256, 0, "sm_90"), (8, 64, "warps")),
    ((32, 1024, 8192, "sm_90"), (2, 64, "warps")),
    ((64, 256, 8320, "sm_90"), (4, 32, "registers")),
    ((139, 256, 16640, "sm_90"), (1, 8, "registers")),
    ((128, 256, 94720, "sm_90"), (2, 16, "registers")),
    ((128, 256, 94720, "sm_80"), (1, 8, "shared memory")),
    ((40, 256, 150000, "sm_90"), (1, 8, "shared memory")),
    ((40, 256, 200000, "sm_80"), (0, 0, "shared memory")),
    ((255, 512, 0, "sm_80"), (0, 0, "registers")),
    ((16, 32, 0, "sm_80"), (32, 32, "blocks")),
    ((33, 100, 512, "sm_90"), (12, 48, "registers")),
]


@pytest.mark.parametrize(("launch", "expected"), OCCUPANCIES)
def test_occupancy(launch, expected):
    assert occupancy(*launch) == Occupancy(*expected)
    assert occupancy(*launch).share == expected[1] / 64


@NEEDS_GXX
def test_every_configuration_is_run_checked_and_counted(monkeypatch):
    """64 x 64 x 64: a smaller tile loads each number more often."""
    monkeypatch.setattr(gemm.REGISTER_TILES, "others", [])
    a, b = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    trials = sweep.sweep("matmul", a, b)
    tiled = {t.label: t for t in trials if t.variant == "cuda_tiled"}
    assert list(tiled) == ["default", "TILE=16", "TILE=8"]
    assert [t.launches[0].block for t in tiled.values()] == [(32, 32, 1), (16, 16, 1), (8, 8, 1)]
    loads = [t.report.total("global", "load").bytes for t in tiled.values()]
    assert loads == [2 * 64**3 * 4 // tile for tile in (32, 16, 8)]
    assert all(t.error < 1e-5 for t in trials)
    assert "TILE=32: the most threads" in tiled["default"].rules[0]
    assert [t.label for t in trials if t.variant == "cuda_naive"] == ["default", "m=32 n=8", "m=8 n=32"]
    used, room = sweep.takes(tiled["TILE=16"].launches[0])
    assert used.shared == 2 * 16 * 16 * 4
    assert room.warps == 64


@NEEDS_GXX
def test_a_configuration_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(softmax.WARPS, "others", [dict(warps=2), dict(warps=33)])
    fine, two, many = sweep.sweep("softmax", np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32))
    assert (fine.note, two.note) == ("", "")
    assert two.launches[0].threads == 64
    assert "(32, 33, 1) threads; expected 1 or more, 1024 threads at most" in many.note
    with softmax.WARPS.using(warps=1), launches() as ran:
        x = to_device(np.ones((3, 4), np.float32), "emulated")
        softmax.softmax_cuda(x)
    assert [(r.grid, r.block) for r in ran] == [((3, 1, 1), (32, 1, 1))]


@NEEDS_GXX
def test_the_command():
    outcome = alone(*SOFTMAX, "--sweep", "--device", "emulated")
    assert outcome.status == 0, outcome.output
    assert "warps=4: four warps, a row each" in outcome.output
    assert "warps=16" in outcome.output
    assert "WRONG" not in outcome.output


def test_what_cannot_be_swept(capsys):
    with pytest.raises(BenchError, match="layer_norm has no CUDA kernel"):
        sweep.sweep("layer_norm", np.ones((2, 3), np.float32))
    bench = SOFTMAX[2:]
    assert main([*bench, "--sweep"]) == 2
    assert "--sweep is for launches of CUDA kernels: choose --device emulated" in capsys.readouterr().err
    assert main([*bench, "--device", "cuda"]) == 2
    assert "--device cuda measures launches only, with --sweep" in capsys.readouterr().err
    try:
        to_device(np.ones(1), "cuda")
    except DeviceError:
        assert main([*bench, "--sweep", "--device", "cuda"]) == 2
        assert "bench: cannot use the device 'cuda'" in capsys.readouterr().err
