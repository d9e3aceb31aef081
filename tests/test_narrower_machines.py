"""Machines with narrower vectors than this one's: compiled for them by force, what runs there is right.

What Numba compiles for is settled when it is imported, so each target has a process of its own, and an empty cache.
Compiling takes the time. So there is one call of every variant whose file works with vectors by name, on one of the
targets: the convolutions on the one, the rest on the other (both have 16 registers, and thus the same register tile).
LLVM optimises little, since the vectors are as narrow and a mistake is as wrong. And of the rungs of Winograd's engine,
which differ in their matrices alone, the one with the smallest matrices runs. Gradients of images are left out, which
are convolutions with other weights.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import alone
from test_kernels import CASES, OURS, VARIANTS, arrays_in, assert_equals_reference

from nanocnn.kernels import simd

AVX2 = "+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"
NARROWER = {  # NUMBA_CPU_NAME -> (bytes of a vector, NUMBA_CPU_FEATURES, what runs, in which precision)
    "haswell": (32, AVX2, "conv2d", "float32"),
    "x86-64": (16, "+sse2", "rest", "float64"),
}
TARGETS = [name for name, (bytes_, *_) in NARROWER.items() if bytes_ < simd.WIDTH]
WIDE = re.compile(r"^from \.(simd|rows|tile|pack|gemm|winograd) import|^from \. import rows", re.M)


def is_wide(primitive, variant):
    """Whether its file works with vectors by name; what LLVM makes of a plain loop is LLVM's."""
    return WIDE.search(inspect.getsource(sys.modules[OURS[primitive].variants[variant].body.__module__]))


LEFT_OUT = "winograd4", "parity", "fp32"  # the last converts, and calls the others
CHOSEN = [v for v in VARIANTS if v[0] != "conv2d_grad_x" and v[1] not in LEFT_OUT and is_wide(*v)]
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
def test_variants(target, tmp_path):
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
    print(len(PARTS[part]), "variants are right")


def largest_call(primitive, variant, dtype):
    """Of the example calls that the variant can do, the one with the most numbers."""
    p = OURS[primitive]
    calls = CASES[primitive](np.random.default_rng(7), dtype)
    able = [(args, kwargs) for args, kwargs in calls if p.variants[variant] in p.candidates(*args, **kwargs)]
    return max(able, key=lambda call: sum(a.size for a in arrays_in(call)))


if __name__ == "__main__":
    check(sys.argv[1], getattr(np, sys.argv[2]))
