"""The first rungs of the GPU's ladders, in Numba CUDA: kernels of a few lines of Python.

They run on a GPU, and without one in Numba's simulator, where a thread of the GPU is a thread of Python. Imported
before the kernels in CUDA C++, which stand above them; nothing of Numba's CUDA package is imported before a launch.
"""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
