"""The cache sizes of the host, as Linux describes them and where it does not."""

from __future__ import annotations

from nanocnn.kernels import caches


def describe(root, *entries):
    for k, (level, kind, size) in enumerate(entries):
        folder = root / f"index{k}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            if text is not None:
                (folder / name).write_text(f"{text}\n")


def test_sizes_are_read(tmp_path):
    describe(tmp_path, (1, "Instruction", "64K"), (1, "Data", "48K"), (2, "Unified", "1024K"), (3, "Unified", "1G"))
    assert [caches._size(level, tmp_path) for level in (1, 2, 3)] == [48 << 10, 1 << 20, 1 << 30]


def test_what_is_missing_or_odd_is_guessed(tmp_path):
    assert caches._size(2, tmp_path / "nothing") == caches.USUAL[2]
    describe(tmp_path, (1, "Data", "many"), (2, "Unified", None), (3, "Unified", ""), ("x", "Unified", "1M"))
    assert [caches._size(level, tmp_path) for level in (1, 2, 3)] == [caches.USUAL[level] for level in (1, 2, 3)]


def test_this_machine():
    assert 8 << 10 <= caches.L1 <= caches.L2
    assert caches.L1 < caches.L3
