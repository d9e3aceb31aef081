"""Machines with narrower vectors than this one's: compiled for them by force, what runs there is right.

What Numba compiles for is settled when it is imported, so each target has a process of its own, and an empty cache.
Compiling takes the time, half as long as all other tests together. So of every variant there is one call, on one of the
targets: the convolutions on the one, the rest and a training step on the other (both have 16 registers, and thus the
same register tile). LLVM optimises little, since the vectors are as narrow and a mistake is as wrong. And of the rungs
of Winograd's engine, which differ in their matrices alone, the one with the smallest matrices runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import alone
from test_kernels import CASES, OURS, VARIANTS, arrays_in, assert_equals_reference

import nanocnn as nc
from nanocnn import functional as F
from nanocnn.kernels import simd
from nanocnn.models import alexnet_cifar

AVX2 = "+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"
NARROWER = {  # NUMBA_CPU_NAME -> (bytes of a vector, NUMBA_CPU_FEATURES, what runs, in which precision)
    "haswell": (32, AVX2, "conv2d", "float32"),
    "x86-64": (16, "+sse2", "rest", "float64"),
}
TARGETS = [name for name, (bytes_, *_) in NARROWER.items() if bytes_ < simd.WIDTH]
LEFT_OUT = "winograd4", "parity", "fp32"  # the last converts, and calls the others
CHOSEN = [(primitive, variant) for primitive, variant in VARIANTS if variant not in LEFT_OUT]
PARTS = {part: [v for v in CHOSEN if v[0].startswith("conv2d") == (part == "conv2d")] for part in ("conv2d", "rest")}


def run_for(target, cache, *command):
    """python COMMAND, compiled for the target; its output."""
    bytes_, features, *_ = NARROWER[target]
    words = dict(NUMBA_CPU_NAME=target, NUMBA_CPU_FEATURES=features, NUMBA_OPT="1", EXPECTED_WIDTH=str(bytes_))
    outcome = alone(*command, timeout=600, NUMBA_CACHE_DIR=str(cache), **words)
    assert outcome.status == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize("target", TARGETS)
def test_vectors_and_the_register_tile(target, tmp_path):
    """The tests of both, whole."""
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("simd", "tile")]
    run_for(target, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not second_process", *files)


@pytest.mark.parametrize("target", TARGETS)
def test_variants_and_a_training_step(target, tmp_path):
    """By `check` below."""
    *_, part, dtype = NARROWER[target]
    output = run_for(target, tmp_path, __file__, part, dtype)
    assert output.splitlines()[-1] == f"{len(PARTS[part])} variants are right"


def check(part, dtype):
    """What runs in the other process."""
    assert int(os.environ["EXPECTED_WIDTH"]) == simd.WIDTH
    for primitive, variant in PARTS[part]:
        try:
            assert_equals_reference(primitive, variant, *largest_call(primitive, variant, dtype))
        except Exception as error:
            error.add_note(f"in {variant} of {primitive}")
            raise
    if part == "rest":
        check_training(dtype)
    print(len(PARTS[part]), "variants are right")


def largest_call(primitive, variant, dtype):
    """Of the example calls that the variant can do, the one with the most numbers."""
    p = OURS[primitive]
    calls = CASES[primitive](np.random.default_rng(7), dtype)
    able = [(args, kwargs) for args, kwargs in calls if p.variants[variant] in p.candidates(*args, **kwargs)]
    return max(able, key=lambda call: sum(a.size for a in arrays_in(call)))


def check_training(dtype):
    """A step with the fastest variants ends where one with the references does.

    Convolution is matrix products here, which are compiled already: its further rungs have had their turn.
    """
    matrices = {name: "upto:blocked" for name in OURS if name.startswith("conv2d")}
    rng = np.random.default_rng(7)
    x, labels = rng.standard_normal((8, 32, 32, 3)).astype(dtype), rng.integers(0, 10, 8)
    ends = []
    for policy, choices in (("reference", {}), ("fastest", matrices)):
        with nc.using(policy, **choices):
            nc.manual_seed(7)
            model = alexnet_cifar(width=0.1, batch_norm=True).to(dtype)
            optimizer = nc.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            loss = F.cross_entropy(model(nc.Tensor(x)), nc.Tensor(labels))
            loss.backward()
            optimizer.step()
            ends.append([loss.data, *(p.data for p in model.parameters())])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    check(sys.argv[1], getattr(np, sys.argv[2]))
