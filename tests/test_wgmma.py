"""The product of warpgroups: its descriptors, what the emulator refuses, and the kernel on shapes of several blocks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launch import NEEDS_GXX

from nanocnn.kernels.cuda import gemm
from nanocnn.kernels.cuda import resources as compilers
from nanocnn.kernels.cuda.emulated import KernelError, counting
from nanocnn.kernels.cuda.launch import Kernel
from nanocnn.kernels.cuda.resources import compiled, parse
from nanocnn.kernels.cuda.source import FOLDER, target
from nanocnn.kernels.dispatch import to_device
from nanocnn.kernels.matmul import matmul

PLANTED = Path(__file__).parent / "planted_wgmma.cu"
SWIZZLES = {"none": (0, 1), "128 bytes": (1, 8), "64 bytes": (2, 4), "32 bytes": (3, 2)}  # mode, pieces of a row


def descriptor(begin, leading, stride, mode):
    """As a number that is added to the address of the tiles."""
    return begin >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def swizzled(rows, pieces):
    """Rows of so many pieces of 16 bytes, as the swizzle of so many leaves them; (rows, pieces, 8) numbers.

    In the manual's pictures, each line of 128 bytes permutes its pieces by one number more: by the row, where a row is
    such a line; by every second or fourth row, where lines hold so many.
    """
    out = np.empty_like(rows)
    for row in range(len(rows)):
        for piece in range(pieces):
            out[row, piece ^ row // (8 // pieces) % pieces] = rows[row, piece]
    return out


def image_of(a, b, swizzle, depth):
    """Shared memory with A (64 x 16) and B (16 x 128) from number `depth` of a row of A on, and both descriptors."""
    mode, pieces = SWIZZLES[swizzle]
    rng = np.random.default_rng(1)
    if pieces == 1:  # the 8 numbers of a row, then those 8 further along the depth
        whole_a = a.reshape(64, 2, 8).transpose(1, 0, 2)
        whole_b = b.reshape(2, 8, 16, 8).transpose(0, 2, 1, 3)  # 8 rows of 8 columns, the next columns, the next rows
        of_a, of_b = dict(leading=64 * 16, stride=8 * 16), dict(leading=16 * 8 * 16, stride=8 * 16)
    else:
        whole_a = rng.standard_normal((64, pieces * 8)).astype(np.float16)
        whole_a[:, depth : depth + 16] = a
        whole_a = swizzled(whole_a.reshape(64, pieces, 8), pieces)
        columns = b.reshape(16, -1, pieces, 8).transpose(1, 0, 2, 3)  # as many as a row has, one after the other
        whole_b = np.stack([swizzled(part, pieces) for part in columns])
        of_a, of_b = dict(leading=0, stride=128 * pieces), dict(leading=16 * 16 * pieces, stride=128 * pieces)
    image = np.concatenate([whole_a.ravel(), whole_b.ravel()])
    first = descriptor(2 * depth, mode=mode, **of_a), descriptor(whole_a.nbytes, mode=mode, **of_b)
    return image, *(np.uint64(d).astype(np.int64) for d in first)


def product(swizzle="128 bytes", depth=0, mistake=0, watch=True, threads=128):
    """C, and the right one, of the planted kernel."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 16)).astype(np.float16), rng.standard_normal((16, 128)).astype(np.float16)
    image, of_a, of_b = image_of(a, b, swizzle, depth)
    given, c = to_device(image, "emulated"), to_device(np.full((64, 128), 7, np.float32), "emulated")
    call = given, c, image.size // 8, of_a, of_b, mistake
    if watch:
        with counting():
            Kernel(PLANTED, "one_product")((1,), (threads,), *call, shared=image.nbytes + 1024)
    else:
        Kernel(PLANTED, "one_product")((1,), (threads,), *call, shared=image.nbytes + 1024)
    return np.asarray(c), a.astype(np.float64) @ b.astype(np.float64)


# ------------------------------------------------------------------ the emulated instruction


@NEEDS_GXX
@pytest.mark.parametrize(("swizzle", "depth"), [("none", 0), ("32 bytes", 0), ("64 bytes", 16), ("128 bytes", 48)])
def test_descriptors_are_read_as_the_manual_has_them(swizzle, depth):
    got, want = product(swizzle, depth)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


MISTAKES = {
    "no proxy fence": (1, r"reads byte \d+ .*thread \d+ has written with no fence_proxy_async\(\) since"),
    "no wgmma_fence": (2, r"wgmma without wgmma_fence\(\)"),
    "no wait": (5, "the thread ends, and has not waited for this wgmma"),
    "no commit": (6, "the thread ends, and has not waited for this wgmma"),
    "overwritten": (7, r"race: byte \d+ of dynamic shared memory is written while this wgmma may read it"),
    "copied over": (8, r"race: byte \d+ of dynamic shared memory is written while this wgmma may read it"),
    "out of bounds": (10, r"out of bounds: wgmma reads address \d+"),
    "uninitialised": (11, "uninitialised: load of 16 bytes from byte .* of dynamic shared memory"),
    "no barrier": (12, "uninitialised: load of 16 bytes from byte .* of dynamic shared memory"),
}


@NEEDS_GXX
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name):
    number, message = MISTAKES[name]
    with pytest.raises(KernelError, match=message) as caught:
        product(mistake=number)
    lines = PLANTED.read_text().splitlines()
    here = next(i for i, line in enumerate(lines, 1) if line.endswith("// HERE"))
    assert re.search(rf"planted_wgmma\.cu:{here}: .*\[thread \(", str(caught.value))


@NEEDS_GXX
def test_mistakes_of_sums_and_of_warps_are_found():
    early, _ = product(mistake=3)  # what is read too early is no number
    assert np.isnan(early).all()
    with pytest.raises(KernelError, match=r"planted_wgmma\.cu:\d+: a sum of wgmma was written to before"):
        product(mistake=4)
    with pytest.raises(KernelError, match="threads 0 and 64 are of one warpgroup, and have issued different wgmmas"):
        product(mistake=9)
    with pytest.raises(KernelError, match="wgmma in a block of no whole warpgroups"):
        product(threads=96)


@NEEDS_GXX
def test_most_mistakes_are_found_without_counting_too():
    """Stores of a thread to shared memory are seen while counting alone; copies always."""
    for name in ("no wgmma_fence", "no wait", "no commit", "copied over", "out of bounds"):
        with pytest.raises(KernelError, match=MISTAKES[name][1]):
            product(mistake=MISTAKES[name][0], watch=False)
    got, want = product(watch=False)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ the kernel


def halves(m, k, n):
    rng = np.random.default_rng(m)
    return (to_device(rng.standard_normal(shape).astype(np.float16), "emulated") for shape in ((m, k), (k, n)))


def wgmma(a, b, kernel=gemm.WARPGROUPS):
    """C, whose memory was full of NaN, by another build of the kernel if one is given."""
    c = to_device(np.full((a.shape[0], b.shape[1]), np.nan, np.float16), "emulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "WARPGROUPS", kernel)
        return np.asarray(matmul.variants["cuda_wgmma"].body(a, b, c))


def close(a, b, got):
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    return bool(np.abs(got - want).max() <= 2e-3 * np.abs(want).max())


@NEEDS_GXX
@pytest.mark.parametrize("shape", [(136, 328, 264), (257, 72, 8), (1, 1032, 520)])
def test_blocks_and_steps_that_end_at_the_edges(shape):
    a, b = halves(*shape)
    with counting():
        assert close(a, b, wgmma(a, b))


@NEEDS_GXX
def test_narrower_tiles_and_fewer_stages():
    a, b = halves(200, 264, 136)
    with counting() as report, gemm.WARPGROUP_TILES.using(BLOCK_N=128, STAGES=3):
        assert close(a, b, wgmma(a, b))
    assert report.blocks == 2 * 2


@NEEDS_GXX
def test_tiles_are_read_and_written_without_conflicts():
    """All of memory in whole sectors, all of shared memory in as few turns as can be: what the swizzle is for."""
    a, b = halves(128, 64, 256)
    with counting() as report:
        assert close(a, b, wgmma(a, b))
    for memory, kind in (("global", "load"), ("global", "store"), ("shared", "load"), ("shared", "store")):
        assert report.total(memory, kind).units == report.total(memory, kind).ideal
    by_products = [line for line in report.lines.values() if line.memory == "shared" and line.bytes == 80 << 10]
    assert len(by_products) == 1  # 2 warpgroups, 4 instructions: 64 x 16 and 16 x 256 halves each


PLANTS = {  # in the kernel itself: what is another, and what comes of it
    "no swizzle": ("swizzled(r, t % 8)", "r * 64 + t % 8 * 8", None),
    "no cp_commit": ("cp_commit();", "", None),
    "a stage too few": ("STAGES - 2", "STAGES - 1", "is written while this wgmma may read it"),
}


@NEEDS_GXX
@pytest.mark.parametrize("plant", PLANTS)
def test_a_kernel_with_a_mistake_is_wrong(plant, tmp_path):
    right, wrong, message = PLANTS[plant]
    text = (FOLDER / "gemm_wgmma.cu").read_text()
    assert right in text
    mine = tmp_path / "gemm_wgmma.cu"
    mine.write_text(text.replace(right, wrong))
    a, b = halves(128, 384, 256)
    if message:
        with pytest.raises(KernelError, match=message):
            wgmma(a, b, Kernel(mine, "gemm_wgmma"))
    else:
        assert not close(a, b, wgmma(a, b, Kernel(mine, "gemm_wgmma")))


# ------------------------------------------------------------------ its compiler


def test_it_is_compiled_for_hopper_alone():
    assert target("gemm_wgmma.cu") == "sm_90a"
    assert compilers.architectures("gemm_wgmma.cu") == ("sm_90a",)
    assert target("gemm.cu") is None
    assert compilers.architectures("gemm.cu") == compilers.ARCHITECTURES
    with pytest.raises(compilers.CompileError, match=r"wgmma.* not supported on .target 'sm_90'"):
        compiled("gemm_wgmma.cu", "sm_90")


TILES = [gemm.WARPGROUP_TILES.default, *gemm.WARPGROUP_TILES.others]


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_no_product_waits_for_another(tiles):
    """ptxas would say so (C7510 and its neighbours), and make a kernel that is right and slow."""
    report = compiled("gemm_wgmma.cu", "sm_90a", **tiles).report
    assert "C75" not in report, report
    (used,) = parse(report).values()
    assert used.spilled == 0


def test_its_instructions_are_hoppers(tmp_path):
    """Four products for 64 numbers of depth, B turned on its way; its loop waits for all but the last group."""
    (tmp_path / "cubin").write_bytes(compiled("gemm_wgmma.cu", "sm_90a").cubin)
    (program,) = (path for folder in compilers._of_the_wheels() for path in folder.glob("*/bin/nvdisasm"))
    text = subprocess.run([program, "-c", tmp_path / "cubin"], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"HGMMA\.64x256x16\.F32 .*tnspB", text)) == text.count("HGMMA") == 4
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", text)) == 1
    assert "HMMA" not in text.replace("HGMMA", "")


def test_the_compiler_says_where_products_would_wait(monkeypatch, tmp_path):
    """The test above could fail: of sums that are touched between two products, ptxas does say so."""
    text = (FOLDER / "gemm_wgmma.cu").read_text().replace("wgmma_wait<1>();", "sum[0] += 1;\n")
    (tmp_path / "gemm_wgmma.cu").write_text(text)
    monkeypatch.setattr(compilers, "FOLDER", tmp_path)
    for header in FOLDER.glob("*.cuh"):
        (tmp_path / header.name).write_text(header.read_text())
    assert "C75" in compiled("gemm_wgmma.cu", "sm_90a").report
