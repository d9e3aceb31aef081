import contextlib
import errno
import hashlib
import io
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanocnn import checkpoint, state_tree
from nanocnn.checkpoint import CheckpointError, check_same, latest, load, save, sweep

ROOT = Path(__file__).resolve().parents[1]


def state(who="a", n=1000):
    return {"who": who, "model": {"features.0.weight": np.arange(n, dtype=np.float32)}, "step": 3}


def same(a, b):
    """Equal in type, dtype, shape, order of keys, and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def pair(*names):
    return sorted([*names, *(f"{name}.sha256" for name in names)])


def sign(path):
    """Give a file the sidecar that makes it look undamaged, as sha256sum would write it."""
    path.with_name(f"{path.name}.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


def run_writer(*args):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "checkpoint_writer.py"), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------ round trip


def test_round_trip_of_everything(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16", ">f4", ">i8"]
    original = {
        "z before a": {d: (rng.standard_normal((3, 5)) * 9).astype(d) for d in dtypes},
        "shapes": [np.zeros(s, np.float32) for s in [(), (0,), (1,), (3, 0, 2), (2, 3, 4, 5)]],
        "special floats": np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324]),
        "views": (np.arange(24.0).reshape(4, 6)[::2, ::-3], np.asfortranarray(np.eye(3, 4))),
        "scalars": [np.float32(0.1), np.int64(-5), np.bool_(True), np.float16(2), np.float64(np.nan)],
        "longdouble": np.longdouble(1) / 3,
        "floats": [0.1, 1e-310, -0.0, math.inf, -math.inf, math.nan, -math.nan],
        "nan with a payload": struct.unpack(">d", bytes.fromhex("7ff8000000abcdef"))[0],
        "ints": [0, -1, 2**63, 2**200, True, False],
        "strings": ["", "é\n\0", "\ud800", "null"],
        "nothing": None,
        "containers": [[], (), {}, [[]], ((),), {"tuple": [1], "array": ("x", ())}],
        "bit generator": rng.bit_generator.state,
        "twister": np.random.MT19937(5).state,
        "": {
            "": np.ones(1),
            ".": np.ones(2),
            "..": np.ones(3),
            "a/b": np.ones(4),
            "a": {"b": np.ones(5)},
            "%": np.ones(6),
        },
        "awkward\0 ключ \ud800/": np.ones(7),
    }
    restored = load(save(tmp_path, 1, original))
    assert list(restored) == list(original)
    for key in original:
        if key != "longdouble":  # its padding bytes mean nothing
            assert same(restored[key], original[key]), key
    assert restored["longdouble"] == original["longdouble"]
    assert type(restored["longdouble"]) is np.longdouble


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    hnp.arrays(
        st.sampled_from([np.bool_, np.uint8, np.int64, np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=4), trees, max_size=4))
def test_round_trip_of_random_states(tmp_path, original):
    assert same(load(save(tmp_path, 0, original, keep=1)), original)


@pytest.mark.parametrize("shape", [(5, 700_000), (3, 2, 1_500_000), (9_000_001,), (1, 1, 3)])
def test_chunks_are_small_cover_the_array_and_waste_little(shape, monkeypatch):
    monkeypatch.setattr(state_tree, "CHUNK_BYTES", 4 << 20)
    chunk = state_tree._chunks(shape, 4)
    assert math.prod(chunk) * 4 <= 4 << 20
    stored = math.prod(math.ceil(n / c) * c for n, c in zip(shape, chunk, strict=True))
    assert stored <= 1.3 * math.prod(shape)


def test_arrays_of_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(state_tree, "CHUNK_BYTES", 100)
    original = {"a": np.arange(1001.0), "b": np.arange(7 * 11 * 13, dtype=np.int16).reshape(7, 11, 13)}
    assert same(load(save(tmp_path, 0, original)), original)


def test_cupy_arrays_are_brought_to_the_cpu(tmp_path, monkeypatch):
    cupy = types.ModuleType("cupy")
    array = type("ndarray", (), {"__module__": "cupy", "get": lambda self: np.arange(3.0)})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert same(load(save(tmp_path, 0, {"w": array()})), {"w": np.arange(3.0)})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": [1, {2}]}, "state/a/1: a set"),
        ({"a": {1: 2}}, "state/a: keys must be strings, got 1"),
        ({"a": np.array(["x"])}, "state/a: an array of dtype <U1"),
        ({"a": np.array([None])}, "state/a: an array of dtype object"),
        ({"a": np.datetime64("2020-01-01")}, "state/a: an array of dtype datetime64"),
        ([1], "got list"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, value, named):
    with pytest.raises(TypeError, match=named.replace("[", r"\[")):
        save(tmp_path / "run", 0, value)
    assert not (tmp_path / "run").exists()


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save(tmp_path, 0, {}, keep=0)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        save(tmp_path, -1, {})


# ------------------------------------------------------------------ the file


def test_the_same_state_gives_the_same_bytes(tmp_path):
    assert save(tmp_path / "a", 1, state()).read_bytes() == save(tmp_path / "b", 2, state()).read_bytes()


def test_any_hdf5_tool_finds_the_arrays_by_name_with_a_checksum(tmp_path):
    path = save(tmp_path, 1, {**state(), "lr": np.array(0.5)})
    with h5py.File(path) as file:
        weight = file["state/model/features.0.weight"]
        assert weight.shape == (1000,)
        assert weight.fletcher32
        assert file["state/lr"].fletcher32
        assert file["tree"].fletcher32


def test_sha256sum_reads_the_sidecar(tmp_path):
    path = save(tmp_path, 1, state())
    digest, name = path.with_name(f"{path.name}.sha256").read_text().splitlines()[0].split("  ")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert name == path.name
    if tool := shutil.which("sha256sum"):
        done = subprocess.run([tool, "--strict", "-c", f"{name}.sha256"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ generations


def test_the_newest_generations_stay_and_the_newest_is_by_time_not_by_step(tmp_path):
    assert latest(tmp_path / "none") is None
    assert latest(tmp_path) is None
    for step in (100, 200, 300, 50, 60):  # a run that went back to an older step
        path = save(tmp_path, step, state(f"at {step}"), keep=3)
        assert latest(tmp_path) == path
        assert load(path)["who"] == f"at {step}"
    assert files(tmp_path) == pair("000003-step-300.h5", "000004-step-50.h5", "000005-step-60.h5")
    save(tmp_path, 70, state(), keep=1)
    assert files(tmp_path) == pair("000006-step-70.h5")


def test_numbers_may_outgrow_their_zeros(tmp_path):
    path = save(tmp_path, 1, state())
    for suffix in ("", ".sha256"):
        os.rename(f"{path}{suffix}", f"{tmp_path / '999999-step-1.h5'}{suffix}")
    assert save(tmp_path, 2, state()).name == "1000000-step-2.h5"
    assert latest(tmp_path).name == "1000000-step-2.h5"


def test_the_same_step_twice(tmp_path):
    first, second = save(tmp_path, 7, state("first")), save(tmp_path, 7, state("second"))
    assert first != second
    assert load(first)["who"] == "first"
    assert load(latest(tmp_path))["who"] == "second"


def test_the_best_lives_in_a_folder_of_its_own(tmp_path):
    save(tmp_path / "best", 1, state("best"), keep=1)
    for step in range(5):
        save(tmp_path, step, state())
    assert load(latest(tmp_path / "best"))["who"] == "best"
    assert len(files(tmp_path)) == 2 * 3 + 1


def test_an_old_generation_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    old = save(tmp_path, 1, state())

    def unlink(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.warns(RuntimeWarning, match="cannot delete this old checkpoint"):
        new = save(tmp_path, 2, state("new"), keep=1)
    assert load(new)["who"] == "new"
    assert old.exists()


def test_readers_beside_a_writer_always_find_a_good_one(tmp_path):
    save(tmp_path, 0, state("0"))
    done, seen, wrong = threading.Event(), [], []

    def read():
        while not done.is_set():
            try:
                path = latest(tmp_path)
                seen.append(int(load(path)["who"]))
            except CheckpointError as error:  # only because it was rotated away between the two calls
                if path is None or path.exists():
                    wrong.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for step in range(1, 60):
            save(tmp_path, step, state(str(step)), keep=1 + step % 2)
        done.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert seen
    assert max(seen) > 0


# ------------------------------------------------------------------ killed writers


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    run_writer("kill", root)
    return root


@pytest.mark.parametrize("scenario", ["empty", "older", "same_step", "several", "leftovers"])
def test_kill_9_at_each_step(killed, scenario):
    folders = sorted((killed / scenario).iterdir())
    assert len(folders) > 15
    found = []
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing to fall back from: no .h5 is ever bad
            newest = latest(folder)
            found.append(load(newest)["who"] if newest else "nothing")
        for path in folder.glob("*.h5"):
            load(path)
        save(folder, 3, state("after"), keep=2)
        assert load(latest(folder))["who"] == "after"
        assert not [name for name in files(folder) if name.endswith(".tmp")]
        assert files(folder) == pair(*(p.name for p in folder.glob("*.h5")))
        assert len(files(folder)) == 2 * (1 if found[-1] == "nothing" else 2)
    before = "nothing" if scenario == "empty" else "old"
    commit = found.index("new")
    assert commit > 8  # many steps come before the one that counts
    assert found == [before] * commit + ["new"] * (len(found) - commit)


def test_everything_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """A power cut loses what was not synchronised; so: sync, name, sync the folder, and only then delete."""
    save(tmp_path, 1, state())
    names, log = {}, []
    calls = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink")}

    def opened(path, *args):
        fd = calls["open"](path, *args)
        names[fd] = Path(path).name
        return fd

    def logged(name):
        def call(target, *args):
            log.append(f"{name} {names[target] if isinstance(target, int) else Path(target).name}")
            return calls[name](target, *args)

        return call

    monkeypatch.setattr(os, "open", opened)
    for name in ("write", "fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, logged(name))
    save(tmp_path, 2, state(), keep=1)
    assert log == [
        "write 000002-step-2.h5.tmp",
        "fsync 000002-step-2.h5.tmp",
        "write 000002-step-2.h5.sha256.tmp",
        "fsync 000002-step-2.h5.sha256.tmp",
        "replace 000002-step-2.h5.sha256.tmp",
        "replace 000002-step-2.h5.tmp",
        f"fsync {tmp_path.name}",
        "unlink 000001-step-1.h5",
        "unlink 000001-step-1.h5.sha256",
    ]


def test_sweep_takes_only_what_is_ours_and_dead(tmp_path):
    folder = tmp_path / "new" / "run"
    assert sweep(folder) == []
    assert folder.is_dir()
    path = save(folder, 1, state())
    mine = ["000002-step-2.h5.sha256", "000002-step-2.h5.sha256.tmp", "000002-step-2.h5.tmp"]
    others = ["notes.tmp", "notes.sha256", "result.json", "1-step-2.h5.tmp"]
    for name in mine + others:
        (folder / name).write_text("x")
    with checkpoint._sole_writer(folder, 0) as alone:  # a writer that lives
        assert alone
        assert sweep(folder) == []
    assert sweep(folder) == mine
    assert files(folder) == sorted(pair(path.name) + others)


def test_two_writers_in_one_folder(tmp_path, monkeypatch):
    old = save(tmp_path, 1, state())
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.1)
    with (
        checkpoint._sole_writer(tmp_path, 0),
        pytest.raises(CheckpointError, match="another process has been writing checkpoints here"),
    ):
        save(tmp_path, 2, state())
    assert files(tmp_path) == pair(old.name)
    save(tmp_path, 2, state())


def test_a_file_system_without_locks_or_folder_sync_still_saves(tmp_path, monkeypatch):
    fsync = os.fsync

    def flock(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    def no_folders(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    monkeypatch.setattr(os, "fsync", no_folders)
    assert load(save(tmp_path, 1, state("x")))["who"] == "x"


# ------------------------------------------------------------------ disks that are full, folders that are closed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_disk_that_fails_costs_nothing_that_was_saved(tmp_path, monkeypatch, code, call, nth):
    old = save(tmp_path, 1, state("old"))
    real, count = getattr(os, call), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count < nth:
            return real(*args)
        if call == "write" and count == nth:
            return real(args[0], args[1][:10])  # a disk fills up in the middle: a short write, then the error
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2, state("new"), keep=1)
    message = str(caught.value)
    for words in (str(tmp_path), os.strerror(code), "it needs", "bytes are free", "no earlier checkpoint was touched"):
        assert words in message
    assert ("Make room" in message) == (code != errno.EIO)
    assert files(tmp_path) == pair(old.name)
    assert latest(tmp_path) == old
    assert load(save(tmp_path, 2, state("again"), keep=1))["who"] == "again"


def test_a_folder_that_cannot_be_synchronised_keeps_the_older_generation(tmp_path, monkeypatch):
    old = save(tmp_path, 1, state("old"))

    def fails(folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_sync_folder", fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 2, state("new"), keep=1)
    assert load(old)["who"] == "old"


def test_a_file_that_the_system_refuses(tmp_path):
    old = save(tmp_path, 1, state("old"))
    message = run_writer("full", tmp_path)
    assert "File too large; it needs 1,0" in message
    assert "Make room" in message
    assert files(tmp_path) == pair(old.name)
    assert load(latest(tmp_path))["who"] == "old"


def test_ctrl_c_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    old = save(tmp_path, 1, state("old"))

    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, state())
    assert files(tmp_path) == pair(old.name)


@pytest.mark.parametrize("action", [lambda folder: save(folder, 1, state()), sweep])
@pytest.mark.parametrize("below", ["", "sub/folder"])
def test_an_unwritable_folder_is_an_error_at_the_start(tmp_path, action, below):
    (tmp_path / "file").write_text("a regular file, below which not even root can make a folder")
    with pytest.raises(
        CheckpointError, match=r"file.*cannot write a checkpoint: .*Expected a folder that this user may write"
    ):
        action(tmp_path / "file" / below)


# ------------------------------------------------------------------ damaged files


@pytest.fixture
def no_hdf5(monkeypatch):
    """libhdf5 must not see a byte that has not been verified."""

    def opened(*args, **kwargs):
        raise AssertionError("libhdf5 was given unverified bytes")

    return lambda: monkeypatch.setattr(h5py, "File", opened)


def test_each_bit_flip_is_found_before_libhdf5(tmp_path, no_hdf5):
    path = save(tmp_path, 1, state())
    good = path.read_bytes()
    no_hdf5()
    for at in range(0, len(good), 13):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(
            CheckpointError, match=r"its bytes have changed: found SHA-256 \w{16}\.\.\., expected \w{16}"
        ):
            load(path)


def test_each_truncation_is_found_before_libhdf5(tmp_path, no_hdf5):
    path = save(tmp_path, 1, state())
    good = path.read_bytes()
    no_hdf5()
    for size in (0, 1, 8, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(
            CheckpointError, match=f"truncated or overwritten: found {size:,} bytes, expected {len(good):,}"
        ):
            load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError, match="overwritten"):
        load(path)
    sign(path)  # a sidecar made by sha256sum knows no size
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="its bytes have changed"):
        load(path)


@pytest.mark.parametrize("note", [None, "", "garbage", "0" * 63 + "  x\n", "z" * 64 + "  x\n"])
def test_without_a_checksum_nothing_is_opened(tmp_path, note, no_hdf5):
    path = save(tmp_path, 1, state())
    sidecar = path.with_name(f"{path.name}.sha256")
    sidecar.unlink()
    if note is not None:
        sidecar.write_text(note)
    no_hdf5()
    with pytest.raises(
        CheckpointError, match=r"cannot be trusted: .*\.sha256 (does not exist|is not a checksum); expected"
    ):
        load(path)


def test_each_flip_in_the_sidecar_is_found_or_harmless(tmp_path):
    path = save(tmp_path, 1, state())
    sidecar = path.with_name(f"{path.name}.sha256")
    good = sidecar.read_bytes()
    for at in range(len(good)):
        sidecar.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        if at < 64:
            with pytest.raises(CheckpointError):
                load(path)
        else:  # separator, name and size: an error, or the digest has proved the bytes anyway
            with contextlib.suppress(CheckpointError):
                assert same(load(path), state())


def test_missing_files_and_folders(tmp_path):
    save(tmp_path, 1, state())
    with pytest.raises(CheckpointError, match=r"none\.h5: no such file; found there: 000001-step-1\.h5\. Expected"):
        load(tmp_path / "none.h5")
    with pytest.raises(CheckpointError, match="found there: no checkpoint"):
        load(tmp_path / "nowhere" / "none.h5")
    with pytest.raises(CheckpointError, match=r"\.lock/x\.h5: cannot be read: Not a directory"):
        load(tmp_path / ".lock" / "x.h5")
    with pytest.raises(CheckpointError, match="cannot look for checkpoints: Not a directory; expected a folder"):
        latest(tmp_path / ".lock")
    (tmp_path / "folder.h5.sha256").write_text("0" * 64 + "  folder.h5\n")
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load(tmp_path / "folder.h5")


def hdf5(**attributes):
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.attrs.update(attributes)
    return memory.getvalue()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not a checkpoint of nanocnn: OSError"),
        (b"PK\x03\x04 a zip file, say", "not a checkpoint of nanocnn: OSError.*Expected a file that save"),
        (hdf5(), "not a checkpoint of nanocnn: an HDF5 file of another kind"),
        (hdf5(format="nanocnn checkpoint", schema=1), "not a checkpoint of nanocnn: KeyError"),
        (
            hdf5(format="nanocnn checkpoint", schema=2, nanocnn="9.0"),
            "found schema 2, written by nanocnn 9.0; expected at most 1. Upgrade nanocnn",
        ),
    ],
)
def test_foreign_files_with_a_valid_checksum(tmp_path, contents, message):
    path = tmp_path / "foreign.h5"
    path.write_bytes(contents)
    sign(path)
    with pytest.raises(CheckpointError, match=f"foreign.h5: {message}"):
        load(path)


def test_a_bad_newest_one_falls_back_and_says_so(tmp_path):
    paths = [save(tmp_path, step, state(f"at {step}")) for step in (1, 2, 3)]
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    paths[1].with_name(f"{paths[1].name}.sha256").unlink()
    with pytest.warns(RuntimeWarning) as caught:
        assert latest(tmp_path) == paths[0]
    assert [str(w.message).count("\n") for w in caught] == [0, 0]
    assert f"falling back to {paths[0].name}: {paths[2]}: truncated or overwritten" in str(caught[0].message)
    assert f"{paths[1]}: cannot be trusted" in str(caught[1].message)
    new = save(tmp_path, 2, state("again"))  # the run goes on: what it saves now is the newest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest(tmp_path) == new


def test_all_bad_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, state()).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found 2 checkpoints and none is good; the newest: .*000002-step-2"):
        latest(tmp_path)


# ------------------------------------------------------------------ another model


def test_a_checkpoint_of_another_model(tmp_path):
    current = {"a.weight": np.zeros((3, 10), np.float32), "a.bias": np.zeros(10, np.float32), "n": 1}
    path = save(tmp_path, 1, {"model": current, "optimizer": {"step": 5}})
    assert same(load(path, expect={"model": current})["model"], current)
    other = {"a.weight": np.zeros((3, 100), np.float32), "b.bias": np.zeros(10, np.float64), "n": 2}
    with pytest.raises(CheckpointError) as caught:
        load(path, expect={"model": other})
    assert str(caught.value) == (
        f"{path}: model does not fit this model: missing b.bias (float64[10]); unexpected a.bias (float32[10]); "
        "a.weight is float32[3, 10], expected float32[3, 100]. "
        "Build the model with the options that it was trained with, or choose another checkpoint"
    )
    with pytest.raises(CheckpointError, match=r"missing w \(float64\[\]\)"):
        load(path, expect={"ema": {"w": np.zeros(())}})


def test_many_differences_are_counted_not_listed():
    with pytest.raises(CheckpointError, match=r"^net\.h5 does not .*missing l/4 \(a Python value\); and 3 more\."):
        check_same({}, {"l": list(range(8))}, "net.h5")
    with pytest.raises(CheckpointError, match=r"w is float32\[2\], expected float64\[2\]"):
        check_same({"w": np.zeros(2, np.float32)}, {"w": np.zeros(2)})
    check_same({"a": (1, None), "b": {}}, {"a": [2, "x"]})
