"""Every CUDA source compiles for the GPUs that we name, and keeps the budget that is written beside each kernel."""

from __future__ import annotations

import shutil

import pytest

from nanocnn.kernels.cuda import resources as compilers
from nanocnn.kernels.cuda.resources import CompileError, Resources, architectures, parse, resources
from nanocnn.kernels.cuda.source import FOLDER, NARROW, REAL, signatures
from nanocnn.kernels.dispatch import DeviceError

SOURCES = sorted(path.name for path in FOLDER.glob("*.cu"))
BUILDS = [(file, architecture) for file in SOURCES for architecture in architectures(file)]


@pytest.mark.parametrize(("file", "architecture"), BUILDS)
def test_a_source_keeps_its_budget(file, architecture):
    found = resources(file, architecture)
    assert set(found) == set(signatures(file))
    for name, kernel in signatures(file).items():
        assert kernel.registers is not None, f"write its budget above {name} in {file}: // at most N registers, ..."
        used = found[name]
        assert used.spilled == 0, f"{name} of {file} spills {used.spilled} bytes"
        assert used.registers <= kernel.registers, f"{name} of {file}"
        assert used.shared <= kernel.shared, f"{name} of {file}"
        assert used.registers > kernel.registers - 48, f"{name} of {file}: the budget is far more than it needs"


def macros_of(file):
    """By which the types of its arrays are named."""
    kinds = {p.kind for kernel in signatures(file).values() for p in kernel.parameters}
    return [kind.upper() for kind in (REAL, NARROW) if kind in kinds]


@pytest.mark.parametrize(("file", "macro"), [(file, macro) for file in SOURCES for macro in macros_of(file)])
def test_a_source_keeps_its_budget_in_bfloat16(file, macro):
    for architecture in architectures(file) if "tensor.cu" in file else architectures(file)[-1:]:
        found = resources(file, architecture, **{macro: "__nv_bfloat16"})
        for name, kernel in signatures(file).items():
            assert found[name].spilled == 0, f"{name} of {file} spills {found[name].spilled} bytes"
            assert found[name].registers <= kernel.registers, f"{name} of {file}"
            assert found[name].shared <= kernel.shared, f"{name} of {file}"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc on PATH, and the wheels bring NVRTC alone")
@pytest.mark.parametrize(("file", "architecture"), [("gemm.cu", "sm_90"), ("gemm_wgmma.cu", "sm_90a")])
def test_nvcc_keeps_the_budget_too(file, architecture, monkeypatch):
    """It is asked where there is no NVRTC; the tests above have asked that, as dev brings it."""
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    compilers._nvrtc.cache_clear()
    found = resources(file, architecture)
    for name, kernel in signatures(file).items():
        assert found[name].spilled == 0
        assert found[name].registers <= kernel.registers
        assert found[name].shared <= kernel.shared
    monkeypatch.setattr(compilers.shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match=r"neither nvcc on PATH nor NVRTC .* pip install .*\[nvrtc\]'"):
        resources(file, architecture)


def test_of_two_compilers_that_of_the_drivers_cuda_is_taken(monkeypatch, tmp_path):
    files = ("cu13/lib/libnvrtc.so.13", "cu13/include/cuda_fp16.h", "cuda_nvrtc/lib/libnvrtc.so.12")
    for name in (*files, "cuda_nvrtc/include/nvrtc.h", "cuda_runtime/include/cuda_fp16.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(compilers, "_of_the_wheels", lambda: [tmp_path])
    monkeypatch.setattr(compilers.ctypes, "CDLL", str)
    found = compilers._nvrtc.__wrapped__
    assert found(13) == (f"{tmp_path}/cu13/lib/libnvrtc.so.13", (f"-I{tmp_path}/cu13/include",))
    library, includes = found(12)
    assert library == f"{tmp_path}/cuda_nvrtc/lib/libnvrtc.so.12"
    assert set(includes) == {f"-I{tmp_path}/cuda_nvrtc/include", f"-I{tmp_path}/cuda_runtime/include"}
    with pytest.raises(DeviceError, match="no compiler for CUDA 11"):
        found(11)


def test_what_the_compiler_says():
    report = """ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas info    : Function properties for a
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 139 registers, used 1 barriers, 16640 bytes smem
ptxas info    : Compiling entry function 'b' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
    assert parse(report) == {"a": Resources(139, 20, 16640), "b": Resources(32, 0, 0)}


def test_a_source_that_does_not_compile(monkeypatch, tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong(float* x) { x[0] = y; }\n")
    monkeypatch.setattr(compilers, "FOLDER", tmp_path)
    with pytest.raises(CompileError, match=r'(?s)wrong.cu for sm_90:.*"y" is undefined'):
        resources("wrong.cu", "sm_90")
