"""Sizes of this machine's caches in bytes: block sizes and rules of the kernels come from them."""

from __future__ import annotations

from pathlib import Path

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
USUAL = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}  # where the machine does not say


def _size(level: int, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    for index in sorted(root.glob("index*")):
        try:
            if int((index / "level").read_text()) == level and (index / "type").read_text().strip() != "Instruction":
                text = (index / "size").read_text().strip()
                return int(text[:-1]) * UNITS[text[-1]]
        except (OSError, ValueError, LookupError):
            continue  # a container may hide some of it
    return USUAL[level]


L1, L2, L3 = (_size(level) for level in (1, 2, 3))  # of one core, of one core, of the cores that share it
