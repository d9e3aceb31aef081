"""What is missing for the device `cuda`: each cause has its own words and its own command."""

from __future__ import annotations

import types

import numpy as np
import pytest
from stand_in import Array, forget, stand_in

import nanocnn as nc
from nanocnn.kernels.cuda import device
from nanocnn.kernels.cuda.device import DeviceError, check
from nanocnn.kernels.cuda.device_memory import held, shortage, watched
from nanocnn.kernels.cuda.launch import Kernel
from nanocnn.kernels.dispatch import ChoiceError, to_device, using
from nanocnn.kernels.matmul import matmul
from nanocnn.kernels.narrow import NARROW


@pytest.fixture(autouse=True)
def nothing_is_known():
    forget()
    yield
    forget()


def test_what_can_be_used_is_used(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path)
    assert not device.used()
    assert to_device(np.ones((2, 3), np.float32), "cuda").shape == (2, 3)
    assert device.used()


@pytest.mark.parametrize(
    ("facts", "cause", "command"),
    [
        (dict(wheels=("cupy-cuda12x", "cupy-cuda13x")), "2 CuPy wheels", "uninstall -y cupy-cuda12x cupy-cuda13x"),
        (dict(driver=0), "no NVIDIA driver", "docker run --gpus all"),
        (dict(driver=12080), "for CUDA 12.8, and CuPy for CUDA 13", "uninstall -y cupy-cuda13x, then "),
        (dict(driver=12080), "too new", "[cuda12]'; or install a driver of version 580 or later"),
        (dict(driver=11040, runtime=12090), "for CUDA 11.4, and CuPy for CUDA 12", "install a driver of version 525"),
        (dict(gpus=0), "no GPU that it shows", "nvidia-smi -L"),
        (dict(capability="61"), "compute capability 6.1, and our kernels need 7.5", "CUDA_VISIBLE_DEVICES=NUMBER"),
    ],
)
def test_each_cause_has_its_remedy(facts, cause, command, monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, **facts)
    for _ in range(2):  # an error is not kept: it may have been mended
        with pytest.raises(DeviceError) as error:
            to_device(np.ones(1), "cuda")
        assert cause in str(error.value)
        assert command in str(error.value)
        assert "emulated" in str(error.value)
    assert not device.used()


@pytest.mark.parametrize(("driver", "extra", "before"), [(0, "cuda13", True), (12080, "cuda12", False)])
def test_without_cupy_the_drivers_cuda_says_which(driver, extra, before, monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, driver=driver, wheels=())
    monkeypatch.delitem(device.importlib.util.sys.modules, "cupy")
    monkeypatch.setattr("sys.path", [str(tmp_path)])  # no real one either
    with pytest.raises(DeviceError, match="CuPy is not installed") as error:
        check()
    assert f"[{extra}]'" in str(error.value)
    assert ("no NVIDIA driver" in str(error.value)) == before


def test_an_older_cupy_runs_on_a_newer_driver(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, runtime=12090, wheels=("cupy-cuda12x",))
    check()


def test_hidden_gpus_are_told_from_none(monkeypatch, tmp_path):
    def none() -> int:
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    cupy = stand_in(monkeypatch, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cupy.cuda.runtime.getDeviceCount = none
    with pytest.raises(DeviceError, match=r"no CUDA-capable device.*CUDA_VISIBLE_DEVICES is ''"):
        check()


def test_a_compiler_of_another_cuda_is_found_out(monkeypatch, tmp_path):
    def missing() -> None:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    cupy = stand_in(monkeypatch, tmp_path)
    cupy.cuda.nvrtc.getVersion = missing
    with pytest.raises(DeviceError, match=r"NVRTC, cannot be loaded \(libnvrtc.so.13.*\[cuda13\]"):
        check()


def test_a_broken_cupy_says_why(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path)
    monkeypatch.delitem(device.importlib.util.sys.modules, "cupy")
    (tmp_path / "cupy.py").write_text("raise ImportError('undefined symbol: cudaWhatever')")
    with pytest.raises(DeviceError, match=r"undefined symbol: cudaWhatever.*uninstall -y cupy-cuda13x"):
        check()


@pytest.mark.parametrize(("capability", "able"), [("75", False), ("80", True), ("120", True)])
def test_tensor_rungs_need_ampere(capability, able, monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, capability=capability)
    a, b = Array((64, 64), np.float16), Array((64, 64), np.float16)
    assert device.copies_asynchronously(a) == able
    assert ("cuda_tensor" in {v.name for v in matmul.candidates(a, b)}) == able
    with using(matmul="cuda_tensor"):
        if able:
            assert matmul.choose(a, b).name == "cuda_tensor"
        else:
            with pytest.raises(ChoiceError, match="matmul=cuda_tensor cannot do this call"):
                matmul.choose(a, b)


@pytest.mark.parametrize(("capability", "able"), [("80", False), ("89", False), ("90", True), ("100", False)])
def test_warpgroups_are_of_hopper_alone(capability, able, monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, capability=capability)
    a, b = Array((64, 64), np.float16), Array((64, 64), np.float16)
    assert device.has_warpgroups(a) == able
    assert ("cuda_wgmma" in {v.name for v in matmul.candidates(a, b)}) == able
    assert matmul.choose(a, b).name != "cuda_wgmma"  # "fastest" is cuBLAS


def test_a_kernel_for_a_target_is_compiled_by_ourselves(monkeypatch, tmp_path):
    """CuPy compiles for the GPU's plain architecture: it is given a file of instructions in place of the source."""

    class RawModule:
        def __init__(self, path):
            self.path = path

        def get_function(self, name):
            return types.SimpleNamespace(path=self.path, name=name)

    monkeypatch.setenv("NANOCNN_CACHE", str(tmp_path))
    cupy = stand_in(monkeypatch, tmp_path)
    cupy.RawModule = RawModule
    for _ in range(2):  # the second time it is there
        built = Kernel("gemm_wgmma.cu", "gemm_wgmma")._for_the_gpu((("STAGES", 3),), 200_000)
        assert (built.name, built.max_dynamic_shared_size_bytes) == ("gemm_wgmma", 200_000)
        (file,) = (tmp_path / "cuda").iterdir()
        assert str(file) == built.path
        assert file.read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("capability", "version", "said"),
    [
        ("75", "14.1.0", r"bf16 needs a GPU of compute capability 8\.0 .*this one is of 7\.5\. To do: precision=fp16"),
        ("80", "13.6.0", r"bf16 needs CuPy 14 .*this is CuPy 13\.6\.0\. To do: .*pip install -U cupy-cuda13x; or"),
        ("80", "14.1.0", None),
    ],
)
def test_bfloat16_needs_ampere_and_cupy_14(capability, version, said, monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, capability=capability).__version__ = version
    device.check_half("precision=fp16", NARROW["fp16"])
    if said is None:
        device.check_half("precision=bf16", NARROW["bf16"])
    else:
        with pytest.raises(DeviceError, match=said):
            device.check_half("precision=bf16", NARROW["bf16"])


def test_a_kernel_that_finds_no_headers_says_what_brings_them(monkeypatch, tmp_path):
    class CompileException(Exception):
        """As CuPy's."""

    class RawModule:
        def __init__(self, code, options):
            assert "relu" in code
            assert "-DREAL=float" in options

        def get_function(self, name):
            raise CompileException(said)

    cupy = stand_in(monkeypatch, tmp_path)
    cupy.RawModule, cupy.cuda.compiler = RawModule, types.SimpleNamespace(CompileException=CompileException)
    relu = Kernel("elementwise.cu", "relu")
    arguments = [Array((4,)) if p.pointer else 4 for p in relu.signature.parameters]
    said = 'ptx.cuh(5): catastrophic error: cannot open source file "cuda_fp16.h"'
    with pytest.raises(DeviceError, match=r"no headers of CUDA \(cuda_fp16.h\).*\[cuda13\].*CUDA_PATH"):
        relu((1,), (32,), *arguments)
    said = "elementwise.cu(9): error: expected a ';'"
    with pytest.raises(CompileException, match="expected a ';'"):
        relu((1,), (32,), *arguments)


def test_what_a_kernel_is_given_on_a_gpu(monkeypatch, tmp_path):
    class RawModule:
        def __init__(self, code, options):
            pass

        def get_function(self, name):
            return lambda grid, block, arguments, shared_mem: cupy.said.append((name, grid, block, *arguments))

    cupy = stand_in(monkeypatch, tmp_path)
    cupy.RawModule = RawModule
    y, bias = Array((6, 4)), Array((4,))
    Kernel("elementwise.cu", "epilogue")((1,), (32,), y, bias, None, 1, 4, 24)
    ((name, grid, block, *given, residual, relu, channels, count),) = cupy.said
    assert (name, grid, block, given) == ("epilogue", (1, 1, 1), (32, 1, 1), [y, bias])
    assert (residual, residual.nbytes) == (0, 8)  # a null pointer: of None some versions of CuPy make another address
    assert [(a, a.dtype) for a in (relu, channels, count)] == [(1, np.int32), (4, np.int32), (24, np.int64)]


# ---------------------------------------------------------------- memory


class TooMuch(MemoryError):
    """As CuPy's: `cupy.cuda.memory.OutOfMemoryError`."""

    def __init__(self, size: int, total: int):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


def test_a_shortage_says_who_wanted_how_much_and_what_takes_less(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path)
    check()

    class Greedy(nc.tensor.Op):
        def forward(self, x):
            raise TooMuch(12_000_000_000, 70_000_000_000)

    with pytest.raises(MemoryError) as error:
        Greedy.apply(nc.Tensor(np.ones((2, 3), np.float32)))
    with using("reference", graph="on", fuse="on"):
        text = shortage(error.value)
    assert "not enough memory for 12.00 GB; asked for by Greedy.forward(float32[2, 3])" in text
    assert "the GPU has 80.00 GB, of which 1.00 GB are free" in text
    assert "our pool holds 70.00 GB, 60.00 GB of it in arrays" in text
    assert "a smaller batch" in text
    assert "graph=off" in text
    assert "fuse=on" not in text
    assert "policy fastest" in text


def test_backward_says_who_it_was_too():
    class Greedy(nc.tensor.Op):
        def forward(self, x):
            return x + 1

        def backward(self, gy):
            raise TooMuch(2_000_000, 0)

    y = Greedy.apply(nc.Tensor(np.ones(3, np.float32), requires_grad=True))
    with pytest.raises(MemoryError) as error:
        y.backward(np.ones(3, np.float32))
    text = shortage(error.value)
    assert "not enough memory for 2.00 MB; asked for by Greedy.backward(float32[3])" in text
    assert "GPU" not in text  # none was used


def test_what_is_moved_without_room_is_named(monkeypatch, tmp_path):
    def none(array, order):
        raise TooMuch(array.nbytes, 0)

    cupy = stand_in(monkeypatch, tmp_path)
    cupy.asarray = none
    with pytest.raises(MemoryError) as error:
        to_device(np.ones((2, 3), np.float32), "cuda")
    assert "asked for by an array to be moved to the device: float32[2, 3]" in shortage(error.value)


def test_the_peak_is_that_of_what_is_held_at_once(monkeypatch, tmp_path):
    cupy = stand_in(monkeypatch, tmp_path)
    with watched() as nothing:
        assert nothing is None
    assert held() is None
    check()
    assert held() == dict(in_use=60 * 10**9, pool=70 * 10**9, free=10**9, total=80 * 10**9)
    hook = cupy.cuda.MemoryHook.entered
    with watched() as peak:
        for size in (512, 1024, 2048):
            hook[0].malloc_postprocess(device_id=0, size=size - 1, mem_size=size, mem_ptr=8, pmem_id=1)
        hook[0].free_postprocess(device_id=0, mem_size=1024, mem_ptr=8, pmem_id=1)
        hook[0].malloc_postprocess(device_id=0, size=511, mem_size=512, mem_ptr=8, pmem_id=1)
        hook[0].malloc_postprocess(device_id=0, size=10**9, mem_size=10**9, mem_ptr=0, pmem_id=0)  # there was no room
    assert not hook
    assert (peak.now - 60 * 10**9, peak.most - 60 * 10**9) == (3072, 3584)


def test_a_wrong_answer_of_the_driver_is_no_driver(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: types.SimpleNamespace(cuDriverGetVersion=lambda n: 999))
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        check()
