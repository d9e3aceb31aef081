"""The emulator: CUDA kernels run on the CPU, what they do is counted, and what they must not do is an error."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from launch import NEEDS_GXX, alone

from nanocnn.kernels.cuda.emulated import KernelError, counting
from nanocnn.kernels.cuda.launch import Kernel
from nanocnn.kernels.dispatch import DeviceError, device_of, to_device

pytestmark = NEEDS_GXX
PLANTED = Path(__file__).parent / "planted.cu"


def kernel(name, **defines):
    return Kernel(str(PLANTED), name, **defines)


def emulated(*values, dtype=np.float32):
    found = [to_device(np.asarray(v, dtype), "emulated") for v in values]
    return found if len(found) > 1 else found[0]


def place_of(name):
    """The lines of planted.cu that say HERE, one of which the message must name: a race has two sides."""
    lines = PLANTED.read_text().splitlines()
    numbers = [str(i) for i, line in enumerate(lines, 1) if line.endswith(f"// HERE {name}")]
    assert numbers
    return rf"planted\.cu:({'|'.join(numbers)})\b"


# ------------------------------------------------------------------ running


def test_arrays_of_the_device():
    x = emulated(np.arange(6).reshape(2, 3))
    assert device_of(x) == device_of(x + 1) == device_of(x[1:]) == device_of(x @ x.T) == "emulated"
    assert to_device(x, "emulated") is x
    y = to_device(x, "cpu")
    assert type(y) is np.ndarray
    y[...] = 7
    assert x[0, 0] == 0


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("n", [1, 31, 32, 1000])
def test_adds(n, watch):
    x, y = emulated(*np.random.default_rng(0).standard_normal((2, n)))
    z = emulated(np.full(n, np.nan))
    if watch:
        with counting():
            kernel("adds")((-(-n // 64),), (64,), x, y, z, n)
    else:
        kernel("adds")((-(-n // 64),), (64,), x, y, z, n)
    np.testing.assert_array_equal(z, x + y)


def test_sum_by_shuffles_and_atomics():
    x, y = emulated(np.arange(1000), [0])
    with counting() as report:
        kernel("sum")((8,), (128,), x, y, 1000)
    assert y[0] == 1000 * 999 / 2
    assert report.blocks == 8
    assert report.barriers == 0
    assert report.meetings == 8 * 4 * 5  # blocks, warps, shuffles
    assert report.total("global", "atomic").requests == 8 * 4
    assert report.total("global", "load").bytes == 4000


def test_warp_functions():
    x = np.random.default_rng(1).integers(1, 50, 64).astype(np.int32)
    out = emulated(np.zeros((64, 10)), dtype=np.int32)
    kernel("warp_functions")((1,), (64,), emulated(x, dtype=np.int32), out)
    lane, warp = np.arange(64) % 32, np.arange(64) // 32 * 32
    of = lambda lanes: x[warp + lanes]  # noqa: E731
    np.testing.assert_array_equal(out[:, 0], np.where(lane >= 3, of((lane - 3) % 32), x))
    np.testing.assert_array_equal(out[:, 1], np.where(lane + 5 < 32, of((lane + 5) % 32), x))
    np.testing.assert_array_equal(out[:, 2], of(lane ^ 6))
    np.testing.assert_array_equal(out[:, 3], of(lane // 16 * 16 + 9))
    votes = [sum(1 << i for i in range(32) if x[w + i] % 3 == 0) for w in (0, 32)]
    np.testing.assert_array_equal(out[:, 4].astype(np.uint32), np.repeat(votes, 32))
    assert (out[:, 5] == np.repeat([(x[w : w + 32] == 7).any() + 2 for w in (0, 32)], 32)).all()
    assert (out[:, 6] == (x % 2).sum()).all()
    np.testing.assert_array_equal(out[:, 7], np.where(lane < 16, of(3 + 0 * lane), of(20 + 0 * lane)))
    bits = [bin(v).count("1") + 100 * (32 - int(v).bit_length()) + 10000 * ((v & -v).bit_length()) for v in map(int, x)]
    np.testing.assert_array_equal(out[:, 8], bits)
    assert (out[:, 9] == (x == 40).any()).all()


def test_every_type():
    a, b, c, d, e = (emulated(np.zeros(1), dtype=t) for t in (np.float64, np.float16, np.int64, np.uint32, np.uint8))
    kernel("every_type")((1,), (1,), a, b, c, d, e, 0.1, 200)
    assert (a[0], b[0], c[0], d[0], e[0]) == (np.float32(0.1), np.float16(0.1), 1 << 40, 2**32 - 1, 200)


# ------------------------------------------------------------------ counting


def test_requests_that_lie_together_take_few_sectors():
    """32 numbers in a row are 4 sectors; 32 that lie 32 bytes or more apart are 32 sectors."""
    found = {}
    for step in (1, 2, 8, 32):
        x, y = emulated(np.arange(32 * 33), np.zeros(32))
        with counting() as report:
            kernel("strided")((1,), (32,), x, y, step)
        load, store = report.total("global", "load"), report.total("global", "store")
        assert (load.requests, load.bytes, load.ideal) == (1, 128, 4)
        assert (store.units, report.barriers) == (4, 1)
        found[step] = load.units
    assert found == {1: 4, 2: 8, 8: 32, 32: 32}


def test_words_of_one_bank_take_turns():
    """Step 1: each lane has its own bank. Step 2: two lanes in each of 16. Step 32: all in one. Step 33: as step 1."""
    turns = {}
    for step in (1, 2, 32, 33):
        x, y = emulated(np.arange(32 * 33), np.zeros(32))
        with counting() as report:
            kernel("strided")((1,), (32,), x, y, step)
        shared = report.total("shared")
        assert (shared.requests, shared.ideal) == (2, 2)
        turns[step] = shared.units // 2
    assert turns == {1: 1, 2: 2, 32: 32, 33: 1}


def test_a_report_names_lines():
    x, y = emulated(np.arange(32), np.zeros(32))
    with counting() as report:
        kernel("strided")((1,), (32,), x, y, 1)
        kernel("strided")((1,), (32,), x, y, 1)
    assert report.launches == {"strided": 2}
    places = {line.place for line in report.lines.values()}
    assert all(re.fullmatch(r"planted\.cu:\d+", place) for place in places)
    assert len(report.lines) == 4
    assert {line.requests for line in report.lines.values()} == {2}


def test_nothing_is_counted_outside():
    with counting() as report:
        pass
    x, y = emulated(np.arange(32), np.zeros(32))
    kernel("strided")((1,), (32,), x, y, 1)
    assert not report.lines


# ------------------------------------------------------------------ what a kernel must not do

PLANTS = [
    ("beyond", 64, lambda x: (x, 64), r"out of bounds: store of 4 bytes 0 bytes past the end of x \(float32\[64\]\)"),
    (
        "before",
        64,
        lambda x: (x, emulated(np.zeros(64))),
        "out of bounds: load of 4 bytes .* before the beginning of x",
    ),
    ("misaligned", 1, lambda x: (x, emulated(np.zeros(4))), "misaligned: load of 16 bytes"),
    ("index_of_an_array", 32, lambda x: (x, 3), "out of bounds: index 32 of an array"),
    ("beyond_dynamic", 64, lambda x: (x,), "out of bounds: store of 4 bytes .* past the end of dynamic shared memory"),
    ("uninitialised", 64, lambda x: (x,), "uninitialised: load of 4 bytes .* no thread of this block has written"),
    ("race", 64, lambda x: (x,), r"race: .*which thread \d+ has (written|read) with no barrier between"),
    ("race_after_reading", 64, lambda x: (x,), r"race: .*which thread \d+ has (written|read) with no barrier between"),
    ("race_with_many_readers", 64, lambda x: (x,), r"race: store .* and others has read with no barrier between"),
    ("race_within_a_warp", 32, lambda x: (x, 0), "race: "),
    ("too_early", 32, lambda x: (emulated(np.zeros(128)), x, 0), "uninitialised: load"),
    ("divergent", 32, lambda x: (x,), "divergent barrier: 16 threads wait"),
    ("two_barriers", 32, lambda x: (x,), r"divergent barrier: thread 0 waits in another one, at planted.cu:\d+"),
    ("missing_lane", 32, lambda x: (x,), "waits for lane 5, which has returned"),
    ("not_in_its_mask", 32, lambda x: (x,), "its own lane 16 is missing"),
]


@pytest.mark.parametrize(("name", "threads", "args", "message"), PLANTS, ids=[p[0] for p in PLANTS])
def test_a_planted_mistake_is_found(name, threads, args, message):
    x = emulated(np.zeros(64))
    with counting(), pytest.raises(KernelError, match=message) as caught:
        kernel(name)((1,), (threads,), *args(x), shared=64)
    assert re.search(rf"{place_of(name)}: .*\[thread \(", str(caught.value))


@pytest.mark.parametrize("name", ["uninitialised_in_the_next_block", "race_of_blocks"])
def test_a_planted_mistake_between_blocks_is_found(name):
    with counting(), pytest.raises(KernelError, match=rf"{place_of(name)}: .* of block \(1, 0, 0\)"):
        kernel(name)((2,), (32,), emulated(np.zeros(32)))


def test_threads_that_can_never_go_on():
    with pytest.raises(KernelError, match=r"no thread can go on") as caught:
        kernel("halves_of_a_warp")((1,), (32,), emulated(np.zeros(32)))
    assert re.search(r"threads 0 to 15 wait in __shfl_sync at planted\.cu:\d+\n", str(caught.value))
    assert re.search(rf"threads 16 to 31 wait in __shfl_sync at {place_of('halves_of_a_warp')}", str(caught.value))


def test_what_waits_as_it_must_is_no_mistake():
    x = emulated(np.arange(32))
    with counting():
        kernel("race_within_a_warp")((1,), (32,), x, 1)
        np.testing.assert_array_equal(x, np.arange(32)[::-1])
        y = emulated(np.zeros(32))
        kernel("too_early")((1,), (32,), emulated(np.arange(128)), y, 1)
        np.testing.assert_array_equal(y, np.arange(32))


def test_after_an_error_all_is_as_before():
    x, y = emulated(np.arange(64), np.zeros(64))
    for _ in range(3):
        with pytest.raises(KernelError):
            kernel("divergent")((1,), (32,), x)
        kernel("adds")((1,), (64,), x, x, y, 64)
        np.testing.assert_array_equal(y, 2 * x)


# ------------------------------------------------------------------ launches


def test_what_a_launch_refuses():
    x, y = emulated(np.zeros(64), np.zeros(64))
    adds = kernel("adds")
    with pytest.raises(TypeError, match=r"adds takes 4 arguments \(x, y, z, n\), got 3"):
        adds((1,), (64,), x, y, y)
    with pytest.raises(TypeError, match="y points to float32; got float64"):
        adds((1,), (64,), x, emulated(np.zeros(64), dtype=np.float64), y, 64)
    with pytest.raises(TypeError, match="x points to float32; got float32, not C-contiguous"):
        adds((1,), (64,), emulated(np.zeros(128))[::2], y, y, 64)
    with pytest.raises(ValueError, match=r"n = 1.5 is no int"):
        adds((1,), (64,), x, x, y, 1.5)
    with pytest.raises(ValueError, match="1024 threads at most"):
        adds((1,), (64, 32), x, x, y, 64)
    with pytest.raises(ValueError, match="65535 blocks along y and z"):
        adds((1, 65536), (64,), x, x, y, 64)
    with pytest.raises(ValueError, match="1 or more"):
        adds((0,), (64,), x, x, y, 64)
    with pytest.raises(DeviceError, match=r"arrays of one device, 'cuda' or 'emulated'; got \['cpu'"):
        adds((1,), (64,), x, np.zeros(64, np.float32), y, 64)
    with pytest.raises(ValueError, match="has no kernel 'subtracts'; there are: adds"):
        kernel("subtracts")((1,), (1,))


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("NANOCNN_CACHE", str(tmp_path))
    x = emulated(np.zeros(64))
    with pytest.raises(
        DeviceError, match=r"compiles CUDA kernels with g\+\+, and there is none: apt-get install g\+\+"
    ):
        kernel("adds", ANOTHER=1)((1,), (64,), x, x, x, 64)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NANOCNN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = emulated(np.arange(64), np.zeros(64))
    kernel("adds", A_THIRD=1)((1,), (64,), x, x, y, 64)
    np.testing.assert_array_equal(y, 2 * x)
    assert list(tmp_path.glob("nanocnn-*/emulated/planted-*.so"))


def test_shared_memory_that_nobody_would_watch(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCNN_CACHE", str(tmp_path))
    wrong = tmp_path / "wrong.cu"
    body = "{{ if (x[0] > 0) {{ x[0] = 1; }} {} x[1] = 2; }}\n"
    end = 'extern "C" __global__ void wrong(float* x) { '
    template = "template <int N>\n__device__ __forceinline__ void tile(float* x) "
    wrong.write_text(f'#include "ptx.cuh"\n{template}{body.format("__shared__ float y[N];")}{end}tile<4>(x); }}\n')
    with pytest.raises(KernelError, match=r"wrong.cu: the template tile has __shared__ memory of its own"):
        Kernel(str(wrong), "wrong")((1,), (1,), emulated(np.zeros(2)))
    fine = tmp_path / "fine.cu"
    fine.write_text(
        f'#include "ptx.cuh"\n{template}{body.format("")}{end}__shared__ float y[4]; y[0] = 1; tile<4>(x); }}\n'
    )
    Kernel(str(fine), "wrong")((1,), (1,), emulated(np.zeros(2)))


def test_a_source_that_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCNN_CACHE", str(tmp_path))
    wrong = tmp_path / "wrong.cu"
    wrong.write_text('#include "ptx.cuh"\nextern "C" __global__ void wrong(float* x) { x[0] = y; }\n')
    with pytest.raises(KernelError, match=r"(?s)wrong.cu does not compile:.*wrong.cu:2:.*y. was not declared"):
        Kernel(str(wrong), "wrong")((1,), (1,), emulated(np.zeros(1)))
    assert not list(tmp_path.glob("emulated/wrong*"))


def test_a_file_of_ones_own_that_is_edited(tmp_path):
    """By its whole path, with a header beside it; what was edited is compiled anew."""
    mine, header, x = tmp_path / "mine.cu", tmp_path / "mine.cuh", emulated(np.zeros(2))
    takes = 'extern "C" __global__ void fill(float* x{}) {{ x[threadIdx.x] = VALUE; }}\n'

    def write(value, more=""):
        header.write_text(f"#define VALUE {value}\n")
        mine.write_text('#include "ptx.cuh"\n#include "mine.cuh"\n' + takes.format(more))
        os.utime(mine, ns=(0, next(moments)))  # some file systems count time in steps longer than this test

    moments = itertools.count(1_000_000_000)
    write(3)
    fill = Kernel(mine, "fill")
    fill((1,), (2,), x)
    assert list(x) == [3, 3]
    write(4)
    fill((1,), (2,), x)
    assert list(x) == [4, 4]
    write(5, ", int n")
    with pytest.raises(
        KernelError, match=r"mine\.cu was edited, and fill takes other arguments now: make a new Kernel"
    ):
        fill((1,), (2,), x)
    Kernel(mine, "fill")((1,), (2,), x, 1)
    assert list(x) == [5, 5]
    with pytest.raises(FileNotFoundError, match=r"no .*other\.cu; a \.cu file of your own is named by its whole path"):
        Kernel("other.cu", "fill")((1,), (2,), x)


# ------------------------------------------------------------------ what the documentation shows


def test_examples_of_the_page_print_what_they_show():
    page = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text()
    examples = re.findall(r"```python\n([^`]*)```\n\n```text\n([^`]*)```", page)
    assert len(examples) == 2
    for code, shown in examples:
        outcome = alone("-c", code, timeout=120)
        assert outcome.status == 0, outcome.output
        assert outcome.output == shown
