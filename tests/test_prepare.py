"""data/prepare.py against a server on this machine: resumed, refused, cut off, and never half done."""

import hashlib
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cases_data import BATCH, cifar_arrays, tar_of, write_cifar_binary, write_cifar_python, write_mnist

from nanocnn.data import DataError, cifar10, hdf5, load

ROOT = Path(__file__).parents[1]
NAME = "cifar-10-python.tar.gz"


@pytest.fixture
def prepare(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prepare", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TIMEOUT", 5)
    monkeypatch.setenv("no_proxy", "*")
    return module


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` at /<mirror>/<name> for each mirror, badly where `faults` says so; `log`: what was asked for."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = files, {}, []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def contents(self):
        return self.files[NAME]

    def remotes(self, prepare):
        mirrors = self.url("a"), self.url("b")
        return tuple(
            prepare.Remote(name, len(contents), hashlib.sha256(contents).hexdigest(), mirrors)
            for name, contents in self.files.items()
        )

    def url(self, mirror):
        return f"http://127.0.0.1:{self.server_port}/{mirror}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        _, mirror, name = self.path.split("/")
        fault = self.server.faults.get(mirror, "")
        asked = self.headers.get("Range")
        self.server.log.append((mirror, asked))
        contents = self.server.files[name]
        if fault == "missing":
            self.send_error(404)
            return
        if fault == "other":
            contents = bytes(len(contents))
        start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and fault != "no resume" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(contents) - start))
        self.end_headers()
        stop = len(contents)
        if fault.startswith("cut "):  # after so many bytes, each time
            stop = min(stop, start + int(fault[4:]))
        self.wfile.write(contents[start:stop])


@pytest.fixture
def server(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar10, "BATCH", BATCH)
    contents = tar_of(
        write_cifar_python(tmp_path / "made" / "cifar-10-batches-py"), tmp_path / "made" / NAME
    ).read_bytes()
    server = Server({NAME: contents})
    monkeypatch.setitem(prepare.REMOTES, "cifar10", server.remotes(prepare))
    yield server
    server.shutdown()
    server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_is_there(folder):
    data = load("cifar10", folder / "cifar10.h5", val=0)
    np.testing.assert_array_equal(data.test.labels, cifar_arrays()[1][5])


def test_download_and_convert(prepare, server, tmp_path, capsys):
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "new" / "data")]) == 0
    assert names(tmp_path / "new" / "data") == ["cifar10.h5"]
    assert_is_there(tmp_path / "new" / "data")
    assert "100 training and 20 test images" in capsys.readouterr().out
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "new" / "data")]) == 0
    assert "is there and intact; nothing to do" in capsys.readouterr().out
    assert server.log == [("a", None)]


def test_a_damaged_result_is_made_again_and_the_download_may_stay(prepare, server, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "cifar10.h5").write_bytes(b"half of it")
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "d"), "--keep"]) == 0
    assert "making it again" in capsys.readouterr().out
    assert names(tmp_path / "d") == [NAME, "cifar10.h5"]
    (tmp_path / "d" / "cifar10.h5").unlink()
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "d"), "--keep"]) == 0
    assert len(server.log) == 1  # what was kept was used


def test_a_set_of_several_files(prepare, tmp_path, monkeypatch, capsys):
    made = write_mnist(tmp_path / "made")
    server = Server({path.name: path.read_bytes() for path in made.iterdir()})
    monkeypatch.setitem(prepare.REMOTES, "mnist", server.remotes(prepare))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mnist.h5").write_bytes(b"damaged")
    assert prepare.main(["mnist", "--data-dir", str(tmp_path / "d")]) == 0
    server.shutdown()
    server.server_close()
    assert len(server.log) == 4
    assert names(tmp_path / "d") == ["mnist.h5"]
    assert len(load("mnist", tmp_path / "d", val=0).train) == 30
    assert prepare.main(["mnist", "--from", str(made), "--data-dir", str(tmp_path / "e")]) == 0
    assert "checksum says nothing" not in capsys.readouterr().out


def test_a_connection_that_breaks_goes_on_where_it_stopped(prepare, server, tmp_path):
    third = len(server.contents) // 3
    server.faults["a"] = f"cut {third + 1}"
    prepare.prepare("cifar10", tmp_path / "d", None, [])
    assert server.log == [("a", None), ("a", f"bytes={third + 1}-"), ("a", f"bytes={2 * third + 2}-")]
    assert_is_there(tmp_path / "d")


def test_a_second_command_goes_on_where_the_first_stopped(prepare, server, tmp_path):
    server.faults = {"a": "cut 1000", "b": "missing"}
    with pytest.raises(
        DataError, match=r"could not be downloaded:(.|\n)*the connection ended after 1,000 of(.|\n)*HTTP 404"
    ):
        prepare.prepare("cifar10", tmp_path / "d", None, [])
    assert names(tmp_path / "d") == [f"{NAME}.part"]
    held = (tmp_path / "d" / f"{NAME}.part").stat().st_size
    assert held == 1000 * prepare.TRIES
    server.faults, server.log = {}, []
    prepare.prepare("cifar10", tmp_path / "d", None, [])
    assert server.log == [("a", f"bytes={held}-")]
    assert names(tmp_path / "d") == ["cifar10.h5"]


def test_a_server_that_cannot_resume_sends_all_again(prepare, server, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"{NAME}.part").write_bytes(server.contents[:5000])
    server.faults["a"] = "no resume"
    prepare.prepare("cifar10", tmp_path / "d", None, [])
    assert server.log == [("a", "bytes=5000-")]
    assert_is_there(tmp_path / "d")


@pytest.mark.parametrize("size", [100, None, 10**6])
def test_a_piece_of_something_else(prepare, server, tmp_path, size):
    """Shorter than the file, as long, or longer: found by the checksum, thrown away, fetched from the same mirror."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"{NAME}.part").write_bytes(bytes(size or len(server.contents)))
    prepare.prepare("cifar10", tmp_path / "d", None, [])
    assert {mirror for mirror, _ in server.log} == {"a"}
    assert_is_there(tmp_path / "d")


@pytest.mark.parametrize("fault", ["other", "missing", "cut 0"])
def test_the_next_mirror_is_tried(prepare, server, tmp_path, fault, capsys):
    server.faults["a"] = fault
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "d")]) == 0
    assert server.log[-1] == ("b", None)
    out = capsys.readouterr().out
    assert (f"SHA-256 {hashlib.sha256(bytes(len(server.contents))).hexdigest()}, expected" in out) == (fault == "other")
    assert_is_there(tmp_path / "d")


def test_a_mirror_of_ones_own_comes_first_but_is_not_believed(prepare, server, tmp_path):
    server.faults["mine"] = "other"
    prepare.prepare("cifar10", tmp_path / "d", None, [server.url("mine") + "/"])
    assert server.log == [("mine", None), ("a", None)]


def test_no_network(prepare, server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "other").write_text("kept")
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "d"), "--mirror", "no url"]) == 1
    error = capsys.readouterr().err
    assert "/a/cifar-10-python.tar.gz: [Errno" in error
    assert "/b/cifar-10-python.tar.gz: [Errno" in error
    assert "convert it with --from FILE" in error
    assert names(tmp_path / "d") == ["other"]


def test_a_full_disk_while_downloading(prepare, server, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"{NAME}.part").symlink_to("/dev/full")
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "d")]) == 1
    assert "No space left on device; make room, or name another place with --data-dir" in capsys.readouterr().err


def test_too_little_room_is_seen_before(prepare, server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"too little room for [0-9,]+ bytes of cifar-10-python.tar.gz"):
        prepare.prepare("cifar10", tmp_path / "d", None, [])
    assert server.log == []


def test_an_unwritable_folder(prepare, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert prepare.main(["mnist", "--data-dir", str(tmp_path / "file" / "data")]) == 1
    assert "file/data: [Errno 20] Not a directory" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(prepare, server, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "fetch", interrupted)
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path / "d")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("write", [write_cifar_python, write_cifar_binary])
@pytest.mark.parametrize("packed", [True, False])
def test_converting_what_one_has(prepare, server, tmp_path, write, packed, capsys):
    source = write(tmp_path / "mine")
    if packed:
        source = tar_of(source, tmp_path / "mine.tar.gz")
    assert prepare.main(["cifar10", "--from", str(source), "--data-dir", str(tmp_path / "d")]) == 0
    assert "its checksum says nothing; reading it all the same" in capsys.readouterr().out
    assert_is_there(tmp_path / "d")
    assert source.exists()
    assert server.log == []


def test_it_is_kept_where_training_looks(prepare, server, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCNN_DATA", str(tmp_path / "d"))
    assert prepare.main(["cifar10"]) == 0
    assert load().name == "cifar10"


def test_converting_the_published_archive(prepare, server, tmp_path, capsys):
    assert prepare.main(["cifar10", "--from", str(tmp_path / "made" / NAME), "--data-dir", str(tmp_path / "d")]) == 0
    assert "checksum says nothing" not in capsys.readouterr().out


def test_a_bad_source_leaves_what_was_there(prepare, server, tmp_path, capsys):
    prepare.prepare("cifar10", tmp_path / "d", tmp_path / "made", [])
    before = (tmp_path / "d" / "cifar10.h5").read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar.gz").write_bytes(server.contents[:-100])
    for source, message in (
        ("none", "no such file or folder"),
        ("empty", "holds no form of cifar10"),
        ("bad.tar.gz", "a damaged or truncated archive"),
    ):
        assert prepare.main(["cifar10", "--from", str(tmp_path / source), "--data-dir", str(tmp_path / "d")]) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "d" / "cifar10.h5").read_bytes() == before
    assert names(tmp_path / "d") == ["cifar10.h5"]


def test_the_script_runs_from_the_source_tree(tmp_path):
    """Nothing installed: the folder of the script is all that Python knows."""
    source = write_mnist(tmp_path / "idx")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "data/prepare.py", "mnist", "--from", str(source), "--data-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(hdf5.read(tmp_path / "mnist.h5", tuple("0123456789")).train.labels) == 30


def test_what_is_downloaded_is_pinned(prepare):
    for remotes in prepare.REMOTES.values():
        for remote in remotes:
            assert re.fullmatch("[0-9a-f]{64}", remote.sha256)
            assert len(remote.folders) >= 2
            assert all(url.startswith("https://") for url in remote.folders)
