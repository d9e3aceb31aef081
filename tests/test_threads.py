"""How many threads a rank takes, and what is done about the environment."""

from __future__ import annotations

import os
import sys

import pytest
import threadpoolctl
from launch import alone

from nanocnn.kernels import threads

WORDS = (
    *threads.LOCAL_RANKS,
    "NANOCNN_THREADS",
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "NANOCNN_KEEP_ENV",
    "OPENBLAS_CORETYPE",
)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch, tmp_path):
    """A host of eight processors without a quota, and an environment that says nothing."""
    for word in WORDS:
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setattr(threads, "mask", lambda: list(range(8)))
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "OWN_CGROUP", tmp_path / "none")
    monkeypatch.setattr(threads, "PROCESSORS", tmp_path)


def test_mask_is_this_process_s_own():
    code = "from nanocnn.kernels import threads; print(threads.mask(), threads.count())"
    first = sorted(os.sched_getaffinity(0))[0]
    outcome = alone("-c", f"import os; os.sched_setaffinity(0, [{first}]); {code}")
    assert outcome.output.split("\n")[0] == f"[{first}] 1"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "50000 100000\n"}, 1),  # half a processor
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "gibberish\n"}, 8),
        ({}, 8),
    ],
)
def test_a_quota_of_the_cgroup_counts(files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cores() == cores


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        ("0::/slice/job/step\n", {"slice/job/cpu.max": "300000 100000\n", "slice/cpu.max": "800000 100000\n"}),
        ("0::/slice/job/step\n", {"cpu.max": "300000 100000\n", "slice/job/step/cpu.max": "max 100000\n"}),
        (
            "5:cpu,cpuacct:/box\n1:name=systemd:/init\n",
            {"cpu/box/cpu.cfs_quota_us": "300000", "cpu/box/cpu.cfs_period_us": "100000", "init/cpu.max": "1 1"},
        ),
    ],
)
def test_a_quota_of_a_group_around_ours_counts(lines, files, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text(lines)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota() == 3


def test_two_processors_of_one_core_count_once(tmp_path, monkeypatch):
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    assert threads.cores() == threads.share() == 4
    assert threads.share([list(range(8))] * 2) == 2
    monkeypatch.setattr(threads, "mask", lambda: [0, 1, 4])
    assert threads.cores() == 2
    assert threads.share([[0, 1, 4], [2, 3, 6]]) == 2
    assert threads.share([[0, 1, 4], [5]]) == 1  # whose core is ours too


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ({}, 1),
        ({"MPI_LOCALNRANKS": "4"}, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, 3),
        ({"MPI_LOCALNRANKS": "nonsense"}, 1),
    ],
)
def test_the_launcher_says_how_many_ranks_share_the_host(words, ranks, monkeypatch):
    for name, word in words.items():
        monkeypatch.setenv(name, word)
    assert threads.local_ranks() == ranks
    assert threads.share() == 8 // ranks


def test_more_ranks_than_cores_have_a_thread_each(monkeypatch):
    monkeypatch.setenv("MPI_LOCALNRANKS", "100")
    assert threads.share() == 1


def test_masks_that_are_bound_and_masks_that_are_shared():
    everything = list(range(8))
    assert threads.share([everything]) == 8
    assert threads.share([everything] * 4) == 2
    assert threads.share([everything] * 9) == 1
    bound_elsewhere = [[8, 9], [10, 11]]
    assert threads.share([everything, *bound_elsewhere]) == 8
    assert threads.share([everything, everything, *bound_elsewhere]) == 4


def test_a_quota_is_shared_by_all_ranks_even_if_they_are_bound(tmp_path):
    (tmp_path / "cpu.max").write_text("400000 100000")
    assert threads.share([list(range(8)), [8], [9], [10]]) == 1
    assert threads.share([list(range(8)), [8]]) == 2


def test_the_user_s_word(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert threads.share() == 3  # at most
    assert threads.share([list(range(8))] * 4) == 2
    monkeypatch.setenv("OMP_THREAD_LIMIT", "2")
    assert threads.share() == 2
    monkeypatch.setenv("NANOCNN_THREADS", "12")
    assert threads.share() == threads.share([list(range(8))] * 4) == 12  # exactly
    monkeypatch.setenv("NANOCNN_THREADS", "many")
    with pytest.raises(ValueError, match="NANOCNN_THREADS='many': expected the number of threads"):
        threads.share()


def test_configure_speaks_before_numpy_listens(monkeypatch):
    names = "OPENBLAS_THREAD_TIMEOUT OMP_WAIT_POLICY OPENBLAS_NUM_THREADS NUMBA_NUM_THREADS GOMP_SPINCOUNT"
    for name in [*names.split(), "NUMBA_THREADING_LAYER_PRIORITY"]:
        monkeypatch.setenv(name, "")  # so that what configure() sets is undone after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "notes", [])
    monkeypatch.setattr(threads, "_cpu_flags", lambda: {"avx2", "avx512f"})
    monkeypatch.setenv("MPI_LOCALNRANKS", "4")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    with monkeypatch.context() as early:
        early.delitem(sys.modules, "numpy")
        threads.configure()
    assert "OPENBLAS_CORETYPE" not in os.environ
    assert "unset OPENBLAS_CORETYPE=Haswell" in threads.notes[0]
    assert len(threads.notes) == 1
    assert os.environ["OPENBLAS_NUM_THREADS"] == "2"
    assert os.environ["NUMBA_NUM_THREADS"] == "8"  # limit() may raise it, once the masks are known
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert os.environ["NUMBA_THREADING_LAYER_PRIORITY"].startswith("omp ")

    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    threads.configure()  # too late: NumPy is there
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"
    assert "keeps BLAS off" in threads.notes[0]
    assert "import nanocnn first" in threads.notes[1]

    monkeypatch.setenv("OPENBLAS_CORETYPE", "SkylakeX")
    threads.configure()
    assert not any("CORETYPE" in note for note in threads.notes)


def test_compiled_kernels_find_a_place_where_nothing_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(threads, "notes", [])
    monkeypatch.setattr(threads.tempfile, "tempdir", str(tmp_path))
    threads.configure()
    assert "NUMBA_CACHE_DIR" not in os.environ
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(threads, "NUMBA_CACHES", [tmp_path / "file" / "below"])
    threads.configure()
    folder = tmp_path / f"nanocnn-{os.getuid()}"
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert f"compiled kernels go to {folder}" in threads.notes[-1]
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    folder.chmod(0o777)  # where anybody may write, anybody's code may lie
    threads.configure()
    assert os.environ["NUMBA_CACHE_DIR"] not in ("", str(folder))


def test_limit_reaches_blas_and_numba_both():
    before = threads.count()
    try:
        threads.limit(1)
        assert threads.count() == 1
        pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        assert [pool["num_threads"] for pool in pools] == [1] * len(pools)
    finally:
        threads.limit(before)


def test_processor_has_a_name():
    assert threads.processor()
