"""Train for ever, until something goes wrong on the last rank. Arguments: what, and the switch `reduce`."""

import os
import signal
import sys
import threading
import time

import tiny

from nanocnn.buckets import make_buckets
from nanocnn.kernels.dispatch import use
from nanocnn.parallel import GradientAverager, connect

what, reduce = sys.argv[1:]
comm = connect(quiet=True)
use(reduce=reduce)
if comm.rank == 0:
    print("connected", flush=True)
named = tiny.parameters()
averager = GradientAverager(make_buckets(named, 2000), comm)
last = comm.rank == comm.size - 1


def go_wrong():
    if what == "exception" and last:
        raise LookupError("what went wrong")
    if what == "thread" and last:
        threading.Thread(target=lambda: {}["what went wrong"]).start()
        time.sleep(60)
    if what == "kill" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit" and last:
        sys.exit(3)
    if what == "early" and last:
        raise SystemExit  # one step less than the others
    if what == "exit on all":
        sys.exit(3)
    if what == "long ending":  # one rank may be busy for long after the others have ended
        time.sleep(3.0 if comm.rank == 0 else 0)
        sys.exit(0)


for step in range(10**9):
    if step == 5:
        go_wrong()
    averager.zero()
    tiny.loss(named, *tiny.batch(step), averager.weight(1, comm.size)).backward()
    averager.finish()
