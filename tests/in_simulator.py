"""Every rung in Numba CUDA, in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), on the small ones of the example calls.

Prints as JSON how many calls of each were compared with the reference, and of the CPU's kernels in Numba, which must
not mind the simulator.
"""

import json
import sys

import numpy as np
from test_kernels import CASES, OURS, arrays_in, assert_equals_reference

from nanocnn.kernels.dispatch import using
from nanocnn.traffic import on_emulator

MOST = {np.float64: 600, np.float32: 400}  # numbers that go in and come out: each is a thread of Python
CALLS = {np.float64: 4, np.float32: 1}  # at most, from the first to the last; both types have one source


def compared(primitive, variant, dtype, device=on_emulator):
    """How many example calls of that dtype were small enough, taken, and equal to the reference."""
    p, able = OURS[primitive], []
    for args, kwargs in CASES[primitive](np.random.default_rng(7), dtype):
        given = device((args, kwargs))
        if p.variants[variant] in p.candidates(*given[0], **given[1]):
            results = p.variants["reference"].body(*device(args), **device(kwargs))
            if sum(a.size for a in arrays_in([args, kwargs, results])) <= MOST[dtype]:
                able.append((args, kwargs))
    taken = able[:: max(1, -(-len(able) // CALLS[dtype]))]
    for call in taken:
        with using("reference"):  # for what a rung calls: an epilogue
            assert_equals_reference(primitive, variant, *device(call))
    return len(taken)


def main():
    early = sorted(name for name in sys.modules if name.startswith(("numba.cuda", "cupy", "cuda")))
    names = [name for name, p in OURS.items() if "numba_cuda" in p.variants]
    simulated = {n: [compared(n, "numba_cuda", dtype) for dtype in MOST] for n in names}
    cpu = {n: compared(n, "numba", np.float32, lambda given: given) for n in names if "numba" in OURS[n].variants}
    print(json.dumps({"early": early, "simulated": simulated, "cpu": cpu}))


if __name__ == "__main__":
    main()
