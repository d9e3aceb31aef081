"""Every rung in Numba CUDA, in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), on the small ones of the example calls.

Prints as JSON how many calls of each were compared with the reference, and of the CPU's kernels in Numba, which must
not mind the simulator.
"""

import json

import numpy as np
from test_kernels import CASES, OURS, arrays_in, assert_equals_reference

from nanocnn.kernels.dispatch import using
from nanocnn.traffic import on_emulator

MOST = 1000  # numbers that go in and come out: each is a thread of Python


def compared(primitive, variant, dtype, device=on_emulator):
    """How many example calls of that dtype were small enough, and equal to the reference."""
    p, count = OURS[primitive], 0
    for args, kwargs in CASES[primitive](np.random.default_rng(7), dtype):
        given = device((args, kwargs))
        if p.variants[variant] not in p.candidates(*given[0], **given[1]):
            continue
        results = p.variants["reference"].body(*device(args), **device(kwargs))
        if sum(a.size for a in arrays_in([args, kwargs, results])) > MOST:
            continue
        with using("reference"):  # for what a rung calls: an epilogue
            assert_equals_reference(primitive, variant, *device((args, kwargs)))
        count += 1
        if dtype == np.float32:
            break  # the same source as for float64, to a looser tolerance
    return count


def main():
    names = [name for name, p in OURS.items() if "numba_cuda" in p.variants]
    simulated = {n: [compared(n, "numba_cuda", dtype) for dtype in (np.float64, np.float32)] for n in names}
    cpu = {n: compared(n, "numba", np.float32, lambda given: given) for n in names if "numba" in OURS[n].variants}
    print(json.dumps({"simulated": simulated, "cpu": cpu}))


if __name__ == "__main__":
    main()
