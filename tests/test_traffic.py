"""`bench --device emulated`: what the rungs of a ladder ask of memory, counted."""

from __future__ import annotations

import numpy as np
import pytest
from launch import NEEDS_GXX, alone

from nanocnn import traffic
from nanocnn.bench import BenchError
from nanocnn.kernels.dispatch import device_of

pytestmark = NEEDS_GXX


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    return traffic.count("matmul", *rng.standard_normal((2, 64, 64)).astype(np.float32))


def test_each_rung_asks_for_less(counts):
    """64 x 64 x 64 numbers, two loads for each product by the first rung; in sectors, each of the next has fewer."""
    counted = [c for c in counts if not c.note]
    assert [c.variant for c in counted][:3] == ["cuda_naive", "cuda_coalesced", "cuda_tiled"]
    loads = [c.report.total("global", "load") for c in counted]
    assert loads[0].bytes == loads[1].bytes == 2 * 64**3 * 4
    assert loads[2].bytes == loads[0].bytes // 32  # each number serves 32 sums
    sectors = [load.units for load in loads]
    assert sectors == sorted(sectors, reverse=True)
    assert sectors[0] > 3 * sectors[1] > 9 * sectors[2]
    assert all(c.report.total("global", "store").bytes == 64 * 64 * 4 for c in counted)
    assert all(c.error < 1e-5 for c in counted)
    assert {c.variant for c in counts if "it can with --dtype float16" in c.note} == {"cuda_tensor", "cuda_wgmma"}


def test_the_command():
    command = ["-m", "nanocnn", "bench", "matmul", "40", "24", "64", "--device", "emulated", "--lines"]
    outcome = alone(*command, timeout=120)
    assert outcome.status == 0, outcome.output
    assert "cuda_vectorised" in outcome.output
    assert "gemm.cu:" in outcome.output
    assert "not counted: cuda_tensor (gemm.py:" in outcome.output
    halves = alone(*command, "--dtype", "float16", timeout=120)
    assert halves.status == 0, halves.output
    assert "gemm_tensor.cu:" in halves.output
    assert "gemm_wgmma.cu:" in halves.output


def test_what_cannot_be_counted():
    with pytest.raises(BenchError, match=r"layer_norm has no CUDA kernel; there are kernels of: .*conv2d.*softmax"):
        traffic.count("layer_norm", np.ones((2, 3), np.float32))
    with pytest.raises(BenchError, match="there is no primitive 'mat'"):
        traffic.count("mat")
    outcome = alone("-m", "nanocnn", "bench", "layer_norm", "--device", "emulated")
    assert outcome.status == 2
    assert "bench: layer_norm has no CUDA kernel" in outcome.output
    outcome = alone("-m", "nanocnn", "bench", "relu", "--dtype", "float16")
    assert outcome.status == 2
    assert "--dtype float16: the CPU's kernels are of float32 and float64" in outcome.output


def test_arrays_move_in_nests():
    x = np.ones(3)
    moved = traffic.on_emulator([x, (x, {"a": x}), 5])
    assert device_of(moved[0]) == device_of(moved[1][0]) == device_of(moved[1][1]["a"]) == "emulated"
    assert moved[2] == 5
    assert device_of(x) == "cpu"
