"""Writers that come to a bad end, run by test_checkpoint.py as a process of their own.

python checkpoint_writer.py kill ROOT       one folder ROOT/<scenario>/<k>: its writer was killed at its k-th step
python checkpoint_writer.py full FOLDER     the system refuses a file of more than 64 KB
"""

import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np

from nanocnn import checkpoint

CALLS = (
    "mkdir",
    "open",
    "write",
    "fsync",
    "close",
    "replace",
    "unlink",
    "listdir",
)  # each is a step, and a write is two


def state(who: str) -> dict:
    return {"who": who, "model": {"weight": np.full((50, 40), len(who), np.float32)}, "step": 2}


def empty(folder: Path) -> None:
    """Nothing is there."""


def older(folder: Path) -> None:
    """An older step, which the rotation deletes when the new one is safe."""
    checkpoint.save(folder, 1, state("old"))


def same_step(folder: Path) -> None:
    """The step that is saved again, with other contents."""
    checkpoint.save(folder, 2, state("old"))


def several(folder: Path) -> None:
    """More generations than are kept, the last of them of a later step: two are deleted."""
    for step in (1, 9):
        checkpoint.save(folder, step, state("old"))


def leftovers(folder: Path) -> None:
    """What earlier kills left: temporaries, and a sidecar that came too soon."""
    path = checkpoint.save(folder, 1, state("old"))
    for name in ("000002-step-2.h5.tmp", "000002-step-2.h5.sha256.tmp", "000003-step-2.h5.sha256"):
        (folder / name).write_bytes(path.read_bytes()[:99])


SCENARIOS = (empty, older, same_step, several, leftovers)


def die_at(step: int) -> None:
    """Let this process kill itself with SIGKILL at its `step`-th call of the system; a write dies half done as well."""
    taken = 0

    def reached() -> bool:
        nonlocal taken
        taken += 1
        return taken == step

    def patched(name, call):
        def wrapper(*args, **kwargs):
            if reached():
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "write" and reached():
                call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, patched(name, getattr(os, name)))


def kill(root: Path) -> None:
    for scenario in SCENARIOS:
        for step in range(1, 1000):
            folder = root / scenario.__name__ / f"{step:03d}"
            scenario(folder)
            child = os.fork()
            if child == 0:
                die_at(step)
                checkpoint.save(folder, 2, state("new"), keep=1)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if status == 0:  # it lived through all its steps
                break
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                sys.exit(f"{folder}: the writer ended with status {status}, not by SIGKILL")


def full(folder: Path) -> None:
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY)
    )  # Python ignores SIGXFSZ: EFBIG instead
    try:
        checkpoint.save(folder, 2, {"big": np.zeros(1 << 20, np.uint8)}, keep=1)
    except checkpoint.CheckpointError as error:
        print(error)


if __name__ == "__main__":
    {"kill": kill, "full": full}[sys.argv[1]](Path(sys.argv[2]))
