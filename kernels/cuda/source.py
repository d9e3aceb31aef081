"""What a .cu file says about itself: its kernels, what they take, and the budget that each must keep.

    // at most 40 registers, 2,048 bytes of shared memory
    extern "C" __global__ void tiled(const float* a, const float* b, float* c, int m, int n, int k) {

Kernels are `extern "C"`: what differs between two builds of one is a macro (-DTILE=32, -DREAL=half), not a template.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..narrow import HALVES

FOLDER = Path(__file__).resolve().parent
KERNEL = re.compile(
    r"(?://\s*at most (?P<registers>\d+) registers, (?P<shared>[\d,]+) bytes of shared memory\s*\n)?"
    r"extern \"C\" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(?P<name>\w+)\((?P<parameters>[^)]*)\)"
)
INCLUDE = re.compile(r'^#include "([\w.]+)"', re.M)
COMMENT = re.compile(r"//[^\n]*")
TEMPLATE = re.compile(r"^template\s*<[^{;]*?(\w+)\([^{;]*\{", re.M)  # of a function
TARGET = re.compile(r"^// for (sm_\w+)$", re.M)
MACRO = re.compile(r"^#define (\w+) +([\w\s()+*/-]+?)\s*(?://.*)?$", re.M)  # a number, or made of other macros

# What a pointer may point to, and which numbers may be given where C++ has a number.
ARRAYS: dict[str, Any] = {
    "float": np.float32,
    "double": np.float64,
    **{half.cuda: dtype for dtype, half in HALVES.items()},
    "__half": np.float16,
    "int": np.int32,
    "long long": np.int64,
    "unsigned": np.uint32,
    "unsigned char": np.uint8,
}
NUMBERS = {name: kind for name, kind in ARRAYS.items() if kind not in HALVES}
REAL = "real"  # the type that -DREAL names (real.cuh), float without it
NARROW = "narrow"  # the type of 16 bits that -DNARROW names (narrow.cuh), half without it
SUM = "sum"  # the type that it is summed up in: float, and double for double


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str  # "float", of which it is one, or to which it points
    pointer: bool
    constant: bool  # a pointer through which nothing is written
    many: bool = False  # `real* const* data`: pointers to several arrays, which lie in memory themselves

    @property
    def type(self) -> str:
        """As C++ has it."""
        stars = "* const*" if self.many else "*" if self.pointer else ""
        return f"{'const ' if self.constant else ''}{self.kind}{stars}"


def each_array(pairs: Iterable[tuple[Parameter, Any]]) -> Iterator[tuple[Parameter, Any]]:
    """Of parameters with their arguments, those that are arrays; of a list, each one."""
    for p, a in pairs:
        for array in a if isinstance(a, list | tuple) else [a]:
            if p.pointer and array is not None:
                yield p, array


@dataclass(frozen=True)
class Signature:
    name: str
    parameters: tuple[Parameter, ...]
    registers: int | None  # the budget
    shared: int | None  # bytes


def path_of(file: str) -> Path:
    """A file of this folder, or of anywhere, by its whole path. Raises FileNotFoundError."""
    path = FOLDER / file
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; a .cu file of your own is named by its whole path")
    return path


def target(file: str) -> str | None:
    """The one architecture that a file is for, if it says so in a line of its own: `// for sm_90a`."""
    found = TARGET.search(path_of(file).read_text())
    return found[1] if found else None


def edited(file: str) -> int:
    """When it was: what is kept of a file is kept until then, so that a notebook may write it anew."""
    return path_of(file).stat().st_mtime_ns


def signatures(file: str) -> dict[str, Signature]:
    """The kernels of a file, by name. Raises ValueError on a type that no array can have."""
    return _signatures(file, edited(file))


@cache
def _signatures(file: str, edited: int) -> dict[str, Signature]:
    return parse(path_of(file).read_text(), Path(file).name)


def parse(text: str, file: str = "the source") -> dict[str, Signature]:
    """The kernels of a source."""
    found = {}
    for match in KERNEL.finditer(text):
        parameters = tuple(_parameter(word, file) for word in match["parameters"].split(",") if word.strip())
        registers, shared = match["registers"], match["shared"]
        found[match["name"]] = Signature(
            match["name"],
            parameters,
            int(registers) if registers else None,
            int(shared.replace(",", "")) if shared else None,
        )
    return found


def _parameter(word: str, file: str) -> Parameter:
    words = COMMENT.sub("", word).replace("*", " * ").replace("__restrict__", "").split()
    *kind, name = words
    pointer, many = "*" in kind, kind.count("*") == 2
    constant = pointer and "const" in kind[: kind.index("*")]
    plain = " ".join(w for w in kind if w not in ("const", "*"))
    if plain not in (ARRAYS if pointer else NUMBERS) and not (pointer and plain in (REAL, SUM, NARROW)):
        raise ValueError(f"{file}: a kernel's parameter `{' '.join(words)}`: expected one of {', '.join(ARRAYS)}")
    return Parameter(name, plain, pointer, constant, many)


@cache
def macros(file: str, *names: str, **others: int) -> dict[str, int]:
    """The macros of a file, and of what it includes, that are numbers: all, or those named.

    Those that are made of others, such as (BLOCK_M / THREAD_M), are computed; `others` are numbers that -D puts in
    place of the source's.
    """
    text = dict(MACRO.findall(with_includes(file))) | {n: str(v) for n, v in others.items()}

    def number(words: str) -> int:
        plain = re.sub(r"[A-Za-z_]\w*", lambda name: str(number(text[name[0]])), words)
        return eval(plain.replace("/", "//"))  # digits, brackets and + - * / are left

    found = {}
    for name, words in text.items():
        with contextlib.suppress(KeyError, SyntaxError):  # no number, but a piece of code
            found[name] = number(words)
    return {name: found[name] for name in names} if names else found


def with_includes(file: str) -> str:
    """The text of a file and of all that it includes from its folder or this one: what a build depends on."""
    path = path_of(file)
    text = path.read_text()
    beside = (path.parent / name for name in INCLUDE.findall(text))
    return text + "".join(with_includes(str(p) if p.exists() else p.name) for p in beside)


def shared_in_a_template(file: str) -> str | None:
    """The name of a template of the file, or of what it includes, that has `__shared__` memory of its own."""
    text = COMMENT.sub("", with_includes(file))
    for found in TEMPLATE.finditer(text):
        end, depth = found.end(), 1
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if "__shared__" in text[found.end() : end]:
            return found[1]
    return None
