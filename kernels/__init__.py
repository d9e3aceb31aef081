"""Arrays and speed: the ground floor of nanocnn, one file a family, from the reference upwards.

Imported as `nanocnn.kernels` (a symlink); knows no tensor and imports nothing of `nanocnn`. A new kernel is a new file
in this folder: it is found, put on the board, tested and benchmarked without a line anywhere else.
"""

from . import threads

threads.configure()  # before NumPy and Numba are imported: they read the environment once

import importlib  # noqa: E402
import pkgutil  # noqa: E402

_modules = [
    importlib.import_module(f"{__name__}.{_found.name}")
    for _found in pkgutil.iter_modules(__path__)
    if not _found.ispkg
]

from . import compiled, half  # noqa: E402

for _package in ("numba_cuda", "cuda"):  # the rungs of a GPU, after all of the CPU's, the slower ones first
    importlib.import_module(f"{__name__}.{_package}")

half.offer()  # to the primitives of all families
compiled.keep(_modules)
threads.limit(threads.share())
