"""`python -m nanocnn`: help that teaches, the board, errors in one line, exit statuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanocnn import doctor
from nanocnn.__main__ import COMMANDS, main
from nanocnn.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent


def run(*words, **options):
    command = [sys.executable, "-m", "nanocnn", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_help_teaches_by_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"python -m nanocnn {command.__name__}" in text
        assert command.__doc__.split(",")[0] in text
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command.__name__, "--help"])
        assert ended.value.code == 0
        assert command.__doc__ in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [[], ["docter"], ["doctor", "--jsn"], ["switches", "--use"]])
def test_words_that_argparse_does_not_know(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_board_is_readable_at_100_columns(capsys):
    assert main(["switches"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("policy: fastest")
    for row in dispatch.board():
        assert row["name"] in text, f"{row['name']} is not on the board"
    assert "random_bits" in text
    assert "random.py:" in text


def test_choices_are_tried_out_and_forgotten(capsys):
    before = dispatch.choices_in_force()
    assert main(["switches", "--use", "reference", "random_bits=numba"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("policy: reference")
    assert "* numba" in text
    assert dispatch.choices_in_force() == before


def test_the_board_as_json(capsys):
    assert main(["switches", "--json", "--use", "random_bits=numba"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["policy"] == "fastest"
    rows = {row["name"]: row for row in told["board"]}
    assert rows["random_bits"]["current"] == "numba"
    assert set(rows["random_bits"]) == {"name", "kind", "choices", "current", "about", "place"}


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("im2kol=numba", "unknown primitive or switch 'im2kol'; there are: "),
        ("random_bits=slow", "random_bits has no choice 'slow'; there are: reference, numba"),
        ("fast", "unknown policy 'fast': expected one of fastest, tuned, reference"),
    ],
)
def test_an_unknown_choice_is_one_line_and_exit_status_2(word, text, capsys):
    assert main(["switches", "--use", word]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert text in told.err
    assert len(told.err.splitlines()) == 1


def test_doctor_passes_on_its_exit_status(monkeypatch):
    for status in (0, 1):
        monkeypatch.setattr(doctor, "report", lambda as_json, status=status: status)
        assert main(["doctor"]) == status


def test_as_a_process_that_is_no_terminal():
    start = time.perf_counter()
    done = run("doctor", "--json")
    seconds = time.perf_counter() - start
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["ok"] else 1), done.stderr
    assert told["facts"]["processor"]["usable"] >= 1
    assert seconds < 20  # two on a quiet machine that has compiled before
    done = run("switches", "--use", "nonsense=on")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "unknown primitive or switch 'nonsense'" in done.stderr


def test_a_pipe_that_closes_early_is_no_traceback():
    command = f"{sys.executable} -m nanocnn switches | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("policy:")
    assert "Traceback" not in done.stderr
