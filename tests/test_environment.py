"""What is wrong in an environment is mended in time, named in any case, and kept where the user says so."""

from __future__ import annotations

import os

import pytest
from launch import alone

from nanocnn.kernels import environment


@pytest.fixture(autouse=True)
def in_time(monkeypatch):
    """Nothing is loaded yet, and the environment says nothing."""
    monkeypatch.setattr(environment, "_is_loaded", lambda reader: False)
    for name in list(os.environ):
        if name.startswith(("OMP_", "GOMP_", "KMP_", "NUMBA_", "OPENBLAS_", "NANOCNN_", "MKL_")):
            monkeypatch.delenv(name)


TRAPS = [
    ("OPENBLAS_CORETYPE", "Haswell", None),
    ("OPENBLAS_THREAD_TIMEOUT", "26", "4"),
    ("OPENBLAS_NUM_THREADS", "64", "4"),
    ("MKL_NUM_THREADS", "1", "4"),
    ("OMP_WAIT_POLICY", "ACTIVE", "passive"),
    ("OMP_PROC_BIND", "close", None),
    ("OMP_PLACES", "cores", None),
    ("GOMP_CPU_AFFINITY", "0-7", None),
    ("OMP_DYNAMIC", "true", None),
    ("NUMBA_NUM_THREADS", "64", "8"),
    ("NUMBA_NUM_THREADS", "1", "8"),
    ("NUMBA_NUM_THREADS", "all", "8"),
    ("NUMBA_THREADING_LAYER", "workqueue", None),
]


@pytest.mark.parametrize(("name", "value", "instead"), TRAPS)
def test_what_is_wrong_is_mended_and_named_in_one_line(name, value, instead, monkeypatch):
    monkeypatch.setenv(name, value)
    (note,) = environment.mend(4, 8, {"avx512f"})
    assert os.environ.get(name) == instead
    assert name in note
    assert value.lower() in note.lower()
    assert "\n" not in note


@pytest.mark.parametrize(("name", "value", "instead"), TRAPS)
def test_the_user_may_keep_it(name, value, instead, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("NANOCNN_KEEP_ENV", "1")
    notes = environment.mend(4, 8, {"avx512f"})
    assert os.environ[name] == value
    assert len(notes) <= 1


@pytest.mark.parametrize("name", ["OPENBLAS_CORETYPE", "OMP_PROC_BIND", "NUMBA_THREADING_LAYER"])
def test_what_was_read_already_is_named(name, monkeypatch):
    value = next(value for trap, value, _ in TRAPS if trap == name)
    monkeypatch.setattr(environment, "_is_loaded", lambda reader: True)
    monkeypatch.setenv(name, value)
    (note,) = environment.mend(4, 8, {"avx512f"})
    assert os.environ[name] == value
    assert "import nanocnn first" in note


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENBLAS_CORETYPE", "SkylakeX"),
        ("OPENBLAS_THREAD_TIMEOUT", "4"),
        ("OPENBLAS_NUM_THREADS", "4"),
        ("OMP_WAIT_POLICY", "passive"),
        ("OMP_PROC_BIND", "false"),
        ("KMP_AFFINITY", "disabled"),
        ("OMP_DYNAMIC", "false"),
        ("OMP_NUM_THREADS", "4,2"),
        ("NUMBA_NUM_THREADS", "8"),
        ("NUMBA_THREADING_LAYER", "omp"),
    ],
)
def test_what_does_no_harm_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert environment.mend(4, 8, {"avx512f"}) == []
    assert os.environ[name] == value


def test_the_rest(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert environment.mend(4, 8, {"avx2"}) == []  # where there is no AVX-512, Haswell is right
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    (note,) = environment.mend(4, 8, {"avx2"})
    assert "OMP_NUM_THREADS=64 is more than the cores that we may use: 8" in note


def test_a_process_in_a_bad_environment_runs_as_in_a_good_one():
    """Where OpenMP would bind the main thread, and with it the mask that is counted; and which layer runs."""
    code = (
        "import nanocnn, os, numba, threadpoolctl; from nanocnn.kernels import threads\n"
        "blas = [p['num_threads'] for p in threadpoolctl.threadpool_info() if p['user_api'] == 'blas']\n"
        "print(len(os.sched_getaffinity(0)), threads.cores(), threads.count(), blas, numba.threading_layer())"
    )
    good = alone("-c", code)
    bad = alone(
        *("-c", code),
        OMP_PROC_BIND="true",
        OMP_PLACES="cores",
        NUMBA_NUM_THREADS="1",
        NUMBA_THREADING_LAYER="workqueue",
        OPENBLAS_NUM_THREADS="1",
        OPENBLAS_THREAD_TIMEOUT="26",
        OMP_WAIT_POLICY="active",
    )
    assert good.status == bad.status == 0, bad.output
    assert bad.output == good.output
    assert good.output.split()[-1] in ("omp", "tbb")
