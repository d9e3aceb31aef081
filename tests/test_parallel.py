"""Ranks: alone in this process, and under mpiexec the programs of tests/mpi/, which check themselves on every rank."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import numpy as np
import pytest
from launch import NEEDS_GXX, PROGRAMS, alone, finish, ranks, start, start_ranks

from nanocnn.buckets import make_buckets
from nanocnn.parallel import Alone, GradientAverager, StopRequest, average_buffers, broadcast_parameters
from nanocnn.parallel.launcher import launched
from nanocnn.tensor import Tensor

WORDS = ["PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_RANK"]
WORDS += ["SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"]


# ---------------------------------------------------------------- which launcher


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ({}, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "2"}, ("mpiexec (PMI)", 4, 2)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, ("mpiexec (PMI)", 1, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, ("Open MPI's mpiexec", 2, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, ("srun", 8, 3)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --pty bash
        ({"SLURM_NTASKS": "8"}, None),  # inside a batch script, but not under srun
        ({"PMIX_RANK": "1"}, ("a PMIx launcher", None, 1)),
    ],
)
def test_launchers_are_known_by_their_words(words, found, monkeypatch):
    for name in WORDS:
        monkeypatch.delenv(name, raising=False)
    for name, word in words.items():
        monkeypatch.setenv(name, word)
    assert launched() == found


def test_alone_imports_no_mpi():
    code = """
import sys
from nanocnn.parallel import Alone, connect
comm = connect()
assert isinstance(comm, Alone) and connect() is comm
assert "mpi4py" not in sys.modules
"""
    outcome = alone("-c", code)
    assert outcome.status == 0, outcome.output
    assert re.match(r"1 process, \d+ threads?", outcome.output)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ImportError('no mpi4py here')", "no mpi4py here"),
        ("class rc: pass", "cannot load MPI library"),
    ],
)
def test_a_launcher_without_mpi_is_one_clear_error(body, said, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text(body)
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nanocnn.parallel import connect; connect()"
    outcome = alone("-c", code, PMI_SIZE="4", PMI_RANK="1")
    assert outcome.status == 1
    assert f"started by mpiexec (PMI) as one of 4, but MPI cannot be used: {said}" in outcome.output
    assert "pip install 'nanocnn[mpi]'" in outcome.output


@pytest.mark.parametrize("word", ["OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_the_launcher_of_another_mpi_is_told_apart(word):
    outcome = alone("-c", "from nanocnn.parallel import connect; connect()", **{word: "4"})
    assert outcome.status == 1
    assert "as one of 4, but finds itself alone in MPI: the launcher belongs to another MPI" in outcome.output
    assert "mpi4py's MPICH" in outcome.output


# ---------------------------------------------------------------- alone


def test_alone_answers_as_one_rank():
    comm = Alone()
    assert (comm.rank, comm.size, comm.local_rank, comm.local_size) == (0, 1, 0, 1)
    assert len(comm.hosts) == 1
    a = np.arange(3.0)
    assert comm.all_reduce(a) is a
    assert comm.broadcast(a) is a
    np.testing.assert_array_equal(a, [0, 1, 2])
    assert comm.all_gather_object("x") == ["x"]
    assert comm.broadcast_object("x") == "x"
    assert comm.any(np.True_) is True
    comm.barrier()
    with pytest.raises(TypeError, match="cannot sum float16"):
        comm.all_reduce(np.ones(2, np.float16))  # or it would fail only once there are more ranks
    with pytest.raises(ValueError, match="no rank 1"):
        comm.broadcast(a, root=1)
    with pytest.raises(TypeError, match="NumPy arrays"):
        comm.all_reduce([1.0])


def test_alone_abort_ends_the_process():
    code = "from nanocnn.parallel import Alone; print('last words'); Alone().abort(7); print('not reached')"
    outcome = alone("-c", code)
    assert (outcome.status, outcome.output) == (7, "last words\n")


def test_alone_averaging_does_nothing_but_fill_what_is_missing():
    p, q = (Tensor(np.zeros(3, np.float32), requires_grad=True) for _ in range(2))
    buckets = make_buckets([("p", p), ("q", q)])
    averager = GradientAverager(buckets, Alone())
    broadcast_parameters(buckets, [], averager.comm)
    average_buffers([], averager.comm)
    averager.zero()
    p.backward(np.ones(3, np.float32))
    assert p.on_grad is None
    averager.finish()
    np.testing.assert_array_equal(p.grad, np.ones(3))
    np.testing.assert_array_equal(q.grad, np.zeros(3))
    assert averager.seconds == 0
    averager.close()


def test_weights_of_unequal_batches_add_up_to_the_mean():
    parts = [np.arange(5.0), np.arange(2.0) + 7, np.empty(0)]
    n = sum(map(len, parts))
    total = sum(part.mean() * GradientAverager.weight(len(part), n) for part in parts if len(part))
    assert total == pytest.approx(np.concatenate(parts).mean())
    assert GradientAverager.weight(0, n) == 0


# ---------------------------------------------------------------- under mpiexec


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_call_of_comm(n):
    outcome = ranks(n, "collectives.py", n)
    assert outcome.status == 0, outcome.output
    threads = max(1, len(os.sched_getaffinity(0)) // n)
    line = rf"{n} ranks? on 1 host \(.+\), {threads} threads? each, MPICH \d"
    assert re.search(rf"^{line}", outcome.output)
    assert re.search(rf"^all checked: {line}", outcome.output, re.M)


def test_gradients_are_the_same_on_any_number_of_ranks(tmp_path):
    results = []
    for n in (1, 2, 4):
        file = tmp_path / f"{n}.npy"
        outcome = ranks(n, "averaging.py", file)
        assert outcome.status == 0, outcome.output
        results.append(np.load(file))
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    np.testing.assert_allclose(results[2], results[0], atol=1e-5)
    assert np.abs(results[0]).max() > 0.1


def test_a_rank_that_raises_ends_the_job_with_rank_and_traceback():
    outcome = ranks(4, "failing.py", "exception", "window")
    assert outcome.status != 0
    assert "rank 3: Traceback (most recent call last)" in outcome.output
    assert "LookupError: what went wrong" in outcome.output
    assert outcome.seconds < 20


def test_a_thread_that_raises_ends_the_job_too():
    outcome = ranks(2, "failing.py", "thread", "iallreduce")
    assert outcome.status != 0
    assert "rank 1: Traceback" in outcome.output
    assert "KeyError: 'what went wrong'" in outcome.output
    assert outcome.seconds < 20


def test_a_rank_that_is_killed_ends_the_job_and_leaves_no_shared_memory():
    before = segments()
    outcome = ranks(4, "failing.py", "kill", "window")
    assert outcome.status != 0
    assert outcome.seconds < 20
    assert "connected" in outcome.output
    for _ in range(50):  # another job of this machine may just be starting
        if not segments() - before:
            return
        time.sleep(0.1)
    raise AssertionError(f"left in /dev/shm: {segments() - before}")


def segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("mpich_shm")}


def test_a_rank_that_leaves_is_found_by_those_that_wait_for_it():
    jobs = [start_ranks(2, "failing.py", "exit", "window"), start_ranks(3, "failing.py", "early", "allreduce")]
    for last, job in enumerate(jobs, 1):
        outcome = finish(job, timeout=20)
        assert outcome.status != 0
        found = rf"rank \d: rank {last} has ended .* while this rank waits for it in"
        assert re.search(found, outcome.output), outcome.output


def test_ranks_that_leave_together_or_late_are_no_failure():
    together = start_ranks(2, "failing.py", "exit on all", "window")
    late = start_ranks(2, "failing.py", "long ending", "window")
    assert finish(together)[:2] == (3, "connected\n")
    assert finish(late)[:2] == (0, "connected\n")


# ---------------------------------------------------------------- stopping


def wait_for_ready(process) -> list[int]:
    """Process numbers of the ranks, once they train."""
    line = process.stdout.readline()
    assert line.startswith("ready"), line + process.stdout.read()
    time.sleep(0.2)
    return [int(word) for word in line.split()[1:]]


@pytest.mark.parametrize(
    ("number", "target", "status"),
    [(signal.SIGINT, "mpiexec", 130), (signal.SIGTERM, "mpiexec", 143), (signal.SIGTERM, "rank 1", 143)],
)
def test_a_signal_stops_all_ranks_after_the_same_step(number, target, status):
    process = start_ranks(4, "stopping.py")
    pids = wait_for_ready(process)
    os.kill(process.pid if target == "mpiexec" else pids[1], number)
    outcome = finish(process)
    steps = re.findall(r"^stopped after step (\d+)$", outcome.output, re.M)
    assert len(steps) == 4, outcome.output
    assert len(set(steps)) == 1
    assert outcome.status == status


def test_a_second_ctrl_c_ends_at_once():
    process = start_ranks(2, "stopping.py", "deaf")
    pids = wait_for_ready(process)
    os.kill(pids[0], signal.SIGINT)
    time.sleep(0.8)
    os.kill(pids[0], signal.SIGINT)
    outcome = finish(process, timeout=20)
    assert outcome.status != 0
    assert "rank 0: interrupted" in outcome.output
    assert "Traceback" not in outcome.output


def test_alone_a_signal_stops_after_the_step():
    process = start([sys.executable, str(PROGRAMS / "stopping.py")])
    wait_for_ready(process)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.status == 143
    assert "stopping after this step" in outcome.output
    assert "stopped after step" in outcome.output


def test_stop_request_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest(announce=False) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, delivered twice
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.agreed(Alone())
        assert stop.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---------------------------------------------------------------- on devices


@NEEDS_GXX
@pytest.mark.parametrize("n", [2, 4])
def test_ranks_on_a_device_are_equal_to_one_process(n):
    outcome = ranks(n, "devices.py")
    assert outcome.status == 0, outcome.output
    assert "all checked" in outcome.output


# ---------------------------------------------------------------- recorded steps


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=NEEDS_GXX)])
def test_a_recorded_step_of_two_ranks_goes_the_same_way(device):
    """Bit by bit; with every way to sum, in fp16 with steps that are skipped, with an update that asks the host."""
    outcome = ranks(2, "recorded.py", device, timeout=120)
    assert outcome.status == 0, outcome.output
    assert "all alike" in outcome.output
