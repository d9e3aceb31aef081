"""Train until asked to stop; each rank then says after which step. Argument: "deaf" to finish no step after that."""

import os
import sys
import time

import tiny

from nanocnn.buckets import make_buckets
from nanocnn.parallel import GradientAverager, StopRequest, connect

comm = connect(quiet=True)
named = tiny.parameters()
averager = GradientAverager(make_buckets(named, 2000), comm)
with StopRequest(announce=comm.rank == 0) as stop:
    pids = comm.all_gather_object(os.getpid())
    if comm.rank == 0:
        print("ready", *pids, flush=True)
    for step in range(10**9):
        averager.zero()
        tiny.loss(named, *tiny.batch(step), averager.weight(1, comm.size)).backward()
        averager.finish()
        if stop.agreed(comm):
            break
        time.sleep(0.01)
    if "deaf" in sys.argv:
        time.sleep(60)
comm.barrier()
print(f"stopped after step {step}\n", end="", flush=True)
sys.exit(stop.exit_code)
