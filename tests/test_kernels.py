"""Every variant of every primitive equals its reference. A new kernel file is tested by adding its example calls."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import numpy as np
import pytest
from launch import NEEDS_GXX

from nanocnn.kernels import dispatch
from nanocnn.kernels.cuda.emulated import counting
from nanocnn.kernels.narrow import HALVES, is_float
from nanocnn.traffic import on_emulator

# name of a primitive -> function(rng, dtype) that returns its example calls, (args, kwargs) each
CASES = {
    name: calls
    for path in sorted(Path(__file__).parent.glob("cases_*.py"))
    for name, calls in getattr(importlib.import_module(path.stem), "CASES", {}).items()
}
DTYPES = (np.float32, np.float64)
TOLERANCES = {"bfloat16": 1.6e-2, "float16": 2e-3, "float32": 2e-5, "float64": 1e-12}
CUDA_DTYPES = (np.float64, np.float16)  # and float32 where a kernel has only that
OURS = {name: p for name, p in dispatch.primitives.items() if p.__module__.startswith("nanocnn.kernels.")}
VARIANTS = [(p.name, v.name) for p in OURS.values() for v in p.variants.values() if v.device == "cpu"]
CUDA_VARIANTS = [  # in CUDA C++: those in Numba are tests/test_numba_cuda.py's
    (p.name, v.name)
    for p in OURS.values()
    for v in p.variants.values()
    if v.device == "cuda" and v.body.__module__.startswith("nanocnn.kernels.cuda.")
]


def arrays_in(value):
    """The arrays in nested lists, tuples and dicts, in order."""
    if isinstance(value, np.ndarray | np.generic | float | bool):
        return [np.asarray(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [a for v in value for a in arrays_in(v)] if isinstance(value, list | tuple) else []


def without_halves(value):
    """With halves as float32: NumPy adds up as halves what kernels add up in float32."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype in HALVES else value
    if isinstance(value, dict):
        return {name: without_halves(v) for name, v in value.items()}
    return type(value)(map(without_halves, value)) if isinstance(value, list | tuple) else value


def assert_equals_reference(primitive, variant, args, kwargs):
    """Results, and what became of the arguments, are the reference's within rounding."""
    variants = OURS[primitive].variants
    args_reference, kwargs_reference = without_halves(copy.deepcopy((args, kwargs)))
    expected = variants["reference"].body(*args_reference, **kwargs_reference)
    got = variants[variant].body(*args, **kwargs)
    mine, theirs = arrays_in([got, args, kwargs]), arrays_in([expected, args_reference, kwargs_reference])
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype or (a.dtype in HALVES and b.dtype == np.float32)
        tolerance = TOLERANCES[a.dtype.name] if is_float(a.dtype) else 0
        with np.errstate(over="ignore"):
            b = b.astype(a.dtype)  # a sum may be more than float16 holds: infinite
        a, b = without_halves((np.asarray(a), np.asarray(b)))
        scale = np.abs(b[np.isfinite(b)]).max(initial=1e-30) if tolerance else 1
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", sorted(OURS))
def test_primitive_has_example_calls(name):
    assert name in CASES, f"add example calls of {name} to a tests/cases_*.py"


# Of Winograd's engine, which takes long to compile, one rung runs in float64 too. The others differ from it in their
# matrices alone, which are exact (test_cook_toom.py).
PRECISIONS = {"fp32": (np.float16,), "winograd4": (np.float32,), "parity": (np.float32,)}
CPU_CALLS = [(*v, dtype) for v in VARIANTS for dtype in PRECISIONS.get(v[1], DTYPES)]


@pytest.mark.parametrize(
    ("primitive", "variant", "dtype"), CPU_CALLS, ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_variant_equals_reference(primitive, variant, dtype):
    p = OURS[primitive]
    rng = np.random.default_rng(7)
    compared = 0
    for args, kwargs in CASES[primitive](rng, dtype):
        if p.variants[variant] not in p.candidates(*args, **kwargs):
            continue
        assert_equals_reference(primitive, variant, args, kwargs)
        compared += 1
    assert compared, f"no example call of {primitive} is one that {variant} supports"


@NEEDS_GXX
@pytest.mark.parametrize(("primitive", "variant"), CUDA_VARIANTS, ids=lambda v: v)
def test_cuda_variant_equals_reference(primitive, variant):
    """In the emulator, which checks every access: bounds, races, barriers, memory that nobody has written."""
    p = OURS[primitive]
    compared = 0
    for dtype in (*CUDA_DTYPES, np.float32):
        if dtype == np.float32 and compared:
            break  # the same source as for float64, to a looser tolerance; tests/test_devices.py trains with it
        for args, kwargs in CASES[primitive](np.random.default_rng(7), dtype):
            given = on_emulator((args, kwargs))
            if p.variants[variant] not in p.candidates(*given[0], **given[1]):
                continue
            with counting() as report:
                assert_equals_reference(primitive, variant, *given)
            # A product is cuBLAS's, here that of emulated_cublas.cpp; and so is a pointwise convolution.
            assert report.blocks or variant in ("cublas", "cuda_pointwise"), "no kernel ran"
            compared += 1
    assert compared, f"no example call of {primitive} is one that {variant} supports"


OTHER_HALVES = [dtype.type for dtype in HALVES if dtype not in map(np.dtype, CUDA_DTYPES)]  # bfloat16
# Whose kernels are of float, or add up in memory, where halves would be added up as halves.
NOT_OF_THEM = {
    *(("matmul", f"cuda_{name}") for name in ("naive", "coalesced", "tiled", "registers", "vectorised")),
    *((f"conv2d{name}", "cuda_vectorised") for name in ("", "_grad_x", "_grad_w")),
    *((f"conv2d{name}", f"cuda_winograd{n}") for name in ("", "_grad_x") for n in (2, 4)),
    ("col2im", "cuda_atomic"),
}


@NEEDS_GXX
@pytest.mark.parametrize("dtype", OTHER_HALVES, ids=lambda v: v.__name__)
@pytest.mark.parametrize("primitive", sorted({primitive for primitive, _ in CUDA_VARIANTS} - {"update_scale_"}))
@np.errstate(invalid="ignore")  # a NaN of bfloat16 makes NumPy warn where it is compared
def test_cuda_variants_of_other_halves(primitive, dtype):
    """The same sources with another type: a few calls of each variant, all checks on."""
    p = OURS[primitive]
    for variant in (v for name, v in CUDA_VARIANTS if name == primitive):
        calls = (on_emulator(call) for call in CASES[primitive](np.random.default_rng(7), dtype))
        able = [(a, k) for a, k in calls if p.variants[variant] in p.candidates(*a, **k)]
        assert bool(able) == ((primitive, variant) not in NOT_OF_THEM), variant
        for args, kwargs in able[:: max(1, len(able) - 1)]:  # the first and the last
            with counting():
                assert_equals_reference(primitive, variant, args, kwargs)


@pytest.mark.parametrize("name", sorted(OURS))
def test_work_is_counted(name):
    """Each primitive counts its work, and the work of a call is not negative."""
    p = OURS[name]
    assert p.count_work is not None, f"register the work of {name} with @{name}.work, beside its reference"
    for args, kwargs in CASES[name](np.random.default_rng(3), np.float32):
        flops, moved = p.count_work(*args, **kwargs)
        assert flops >= 0
        assert moved >= 0
