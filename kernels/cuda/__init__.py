"""CUDA kernels: sources (.cu), what compiles and launches them, and the emulator that runs them without a GPU.

A family is a .cu file and a .py file of its name, which registers its kernels as variants. Imported last, so that they
stand at the end of each ladder; nothing is compiled, and no CUDA package is needed, before a kernel is called.
"""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
