"""A worker: `python -m peers NAME PIPE`, one peer in one process, which waits on the pipe until it is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import pickle
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

WARM_UP = 3  # steps: the first compiles, the second still allocates
LOSSES = 3  # of the check: the second and third depend on the update


class Worker:
    """Each method answers one question of the parent."""

    def __init__(self, name: str):
        self.peer = importlib.import_module(f"peers.{name}")
        for package in self.peer.NEEDS:
            importlib.import_module(package)
        self.imported = memory("VmRSS")

    def ready(self) -> None:
        """The framework is imported, and that is all."""

    def prepare(self, mode: str, path: str) -> dict[str, float]:
        """Build the network and warm up; the seconds of a step, and the most memory that it and the network take."""
        with open(path, "rb") as file:
            self.task = pickle.load(file)
        self.mode = mode
        self.run = self.peer.training(self.task)[0] if mode == "train" else self.peer.inference(self.task)
        for _ in range(WARM_UP):
            self.run()
        with contextlib.suppress(OSError):  # a kernel without it counts what compiling took, too
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        return dict(seconds=min(self.turn(1)), memory=memory("VmHWM") - self.imported)

    def turn(self, steps: int) -> list[float]:
        """Seconds of each of so many steps, after one that fills the caches again."""
        self.run()
        return timed(self.run, steps)

    def check(self):
        """The logits; of training the losses of the first steps and the first gradients, without dropout."""
        if self.mode == "infer":
            return self.run()
        step, gradients = self.peer.training(dataclasses.replace(self.task, dropout=0.0))
        first = gradients()
        losses = [step() for _ in range(LOSSES)]
        del step, gradients
        gc.collect()
        return losses, first

    def layer(self, layer):
        """Build one convolution: the results of its directions, or of those that this peer can do."""
        import numpy as np  # here: nanocnn is imported before it

        self.directions = self.peer.convolution(layer)
        return {name: np.asarray(run()) for name, run in self.directions.items()}

    def layer_turn(self, direction: str, steps: int) -> list[float]:
        """Seconds of each of so many calls."""
        self.directions[direction]()
        return timed(self.directions[direction], steps)


def timed(run, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def memory(key: str) -> int:
    """Bytes: VmRSS is what this process holds now, VmHWM the most that it ever held.

    Not getrusage()'s ru_maxrss: that one starts from the parent's memory, which a small process never exceeds.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[3])
    pipe = Connection(int(sys.argv[2]))
    # Some frameworks take as many threads as they find cores, whatever they are told; so they find the right number.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    worker = None
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            worker = worker or Worker(name)
            pipe.send((True, getattr(worker, method)(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    main()
