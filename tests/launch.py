"""Run a program under mpiexec from a test: with a time limit, its output captured, nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

NEEDS_GXX = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="no g++ to compile CUDA kernels for the emulator"
)
NEEDS_BFLOAT16 = pytest.mark.skipif(importlib.util.find_spec("ml_dtypes") is None, reason="no ml_dtypes, no bfloat16")
ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "mpi"
LAUNCHER_WORDS = ("PMI", "MPI_", "OMPI_", "PMIX_", "HYD", "SLURM_", "MV2_", "NANOCNN_")


class Outcome(NamedTuple):
    status: int
    output: str  # stdout and stderr together
    seconds: float


def mpiexec() -> str:
    """The launcher that came with mpi4py's MPI: beside this Python, else on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert found, "these tests need mpiexec: pip install 'nanocnn[mpi]'"
    return found


def environment(**extra: str) -> dict[str, str]:
    """Ours without a launcher's words (these tests may themselves run under one), with the project importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_WORDS) and k != "OMP_NUM_THREADS"}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, **extra}


def start(command: list[str], **extra: str) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that it can be ended with all its children."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**extra),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Outcome:
    """Wait for it. Past the time limit everything that it started is killed, and the test fails with its output."""
    begin = time.monotonic()
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s, a hang? It printed:\n{output}") from None
    return Outcome(process.returncode, output, time.monotonic() - begin)


def ranks(n: int, program: str, *args: object, timeout: float = 60, **extra: str) -> Outcome:
    """`mpiexec -n N python tests/mpi/PROGRAM ARGS`."""
    return finish(start_ranks(n, program, *args, **extra), timeout)


def start_ranks(n: int, program: str, *args: object, **extra: str) -> subprocess.Popen[str]:
    return start([mpiexec(), "-n", str(n), sys.executable, str(PROGRAMS / program), *map(str, args)], **extra)


def alone(*args: object, timeout: float = 60, **extra: str) -> Outcome:
    """`python ARGS`, without a launcher."""
    return finish(start([sys.executable, *map(str, args)], **extra), timeout)
