"""The parent's end of a worker: start it in a clean environment, ask it, end it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from . import load

ENVIRONMENT = dict(os.environ)  # as the user has it: nanocnn, when it is imported, sets variables of its own
EXPERIMENTS = Path(__file__).resolve().parent.parent
# What a user has exported for one of them would slow another: each starts from its own defaults.
OTHERS = re.compile(r"(OMP|GOMP|KMP|MKL|OPENBLAS|NUMBA|NANOCNN|TF|XLA|ORT|TORCH|DNNL|ONEDNN)_")
# What all of them were told of the processor: to compile for, or to keep to.
KEPT = re.compile(r"NUMBA_(CPU_|CACHE_DIR)|(ONEDNN|DNNL)_MAX_CPU_ISA|MKL_ENABLE_INSTRUCTIONS")


class PeerFailed(RuntimeError):
    """A worker could not do what it was asked, or is gone."""


class Process:
    """One peer in one setting, in a process of its own."""

    def __init__(self, name: str, setting: str, threads: int):
        self.name, self.setting = name, setting
        self.pipe, theirs = Pipe()
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed by close())
        clean = {k: v for k, v in ENVIRONMENT.items() if not OTHERS.match(k) or KEPT.match(k)}
        paths = [str(EXPERIMENTS), ENVIRONMENT.get("PYTHONPATH", "")]
        own = load(name).environment(setting, threads)
        # -P: no folder of the caller's in front of the frameworks, least of all this one, with its own tensorflow.py
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "peers", name, str(theirs.fileno()), str(threads)],
            env={**clean, "PYTHONPATH": ":".join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": "", **own},
            pass_fds=[theirs.fileno()],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        theirs.close()  # so that the pipe ends when the worker does

    def ask(self, method: str, *arguments: Any) -> Any:
        """The worker's answer. Raises PeerFailed with its traceback, or with its last words if it is gone."""
        try:
            self.pipe.send((method, arguments))
            fine, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            status = self.process.wait()
            self.log.seek(0)
            words = "\n".join(self.log.read().splitlines()[-20:])
            raise PeerFailed(f"{self.name} ({self.setting}) ended with status {status}:\n{words}") from None
        if not fine:
            raise PeerFailed(f"{self.name} ({self.setting}) failed:\n{answer}")
        return answer

    def close(self) -> None:
        """End it."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()
        self.log.close()
