"""Which GPU is whose: a rank takes one by its number among the ranks of its host."""

from __future__ import annotations

from ..kernels.cuda import device
from .comm import Comm, plural


def pick(comm: Comm) -> str:
    """Make this rank's GPU the current one, and say in a line what the ranks here have. Raises DeviceError.

    With more ranks than GPUs, some share one. Alone, the GPU that is current stays so. The choice is this thread's,
    as CUDA has it: another one that is to use the GPU says `cupy.cuda.Device(number).use()` itself.
    """
    device.check()
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if comm.size > 1:
        cupy.cuda.Device(comm.local_rank % count).use()
    number = cupy.cuda.Device().id
    name = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
    words = f"rank {comm.rank} on GPU {number} of {count}, {name}"
    if comm.local_size > count:
        words += f"; {plural(comm.local_size, 'rank')} of this host share {plural(count, 'GPU')}"
    return words
