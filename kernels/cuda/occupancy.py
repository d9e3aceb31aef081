"""How many blocks of a kernel share a multiprocessor, and what keeps more from coming.

Loads take hundreds of cycles; while the warps of one block wait, those of another compute. So many warps are good, but
not all: registers and shared memory that go to tiles are not there for more warps, and a tile saves loads.

The limits are those of NVIDIA's table "Technical Specifications per Compute Capability" (CUDA C++ Programming Guide);
what is handed out at once, and the order of rounding, is as in cuda_occupancy.h of the CUDA toolkit.
"""

from __future__ import annotations

from typing import NamedTuple

WARP = 32
BLOCKS, WARPS = 32, 64  # of a multiprocessor, of compute capability 8.0 as of 9.0
REGISTERS = 64 << 10
PARTITIONS = 4  # of a multiprocessor: each has a quarter of its warps and registers
REGISTERS_AT_ONCE, SHARED_AT_ONCE = 256, 128  # for a warp; bytes for a block
RESERVED = 1 << 10  # bytes of shared memory of each block that are CUDA's
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10}  # bytes of a multiprocessor; a block may have all less RESERVED


class Occupancy(NamedTuple):
    """Of a multiprocessor by one kernel. `limit` is what there would have to be more of; no blocks: it cannot run."""

    blocks: int
    warps: int
    limit: str

    @property
    def share(self) -> float:
        """Of the warps that there could be."""
        return self.warps / WARPS


def occupancy(registers: int, threads: int, shared: int, architecture: str = "sm_90") -> Occupancy:
    """For blocks of so many threads, with so many registers each, and bytes of shared memory, static and dynamic."""
    warps = -(-threads // WARP)
    of_warp = _up(registers * WARP, REGISTERS_AT_ONCE)
    fits = of_warp * _up(warps, PARTITIONS) <= REGISTERS  # all partitions alike, when it is launched
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps if fits else 0
    limits = {
        "warps": WARPS // warps,
        "registers": by_registers,
        "shared memory": SHARED[architecture] // _up(shared + RESERVED, SHARED_AT_ONCE),
        "blocks": BLOCKS,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps, limit)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
