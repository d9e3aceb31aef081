"""A nested state of arrays, numbers and strings as the bytes of an HDF5 file, and back; no pickle.

Arrays are data sets at their own names, /state/model/features.0.weight, which any HDF5 tool shows. The rest, with the
order of the keys and the place of each array, is one JSON text at /tree, in which everything that JSON lacks is an
object of one key, the tag: {"tuple": [...]}. A dict is tagged too, so that its keys are free.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import struct
from typing import Any
from urllib.parse import quote

import h5py
import numpy as np

from .kernels.dispatch import to_device

FORMAT = "nanocnn checkpoint"
SCHEMA = 1  # raise it when an older nanocnn could no longer read what this one writes
CHUNK_BYTES = 4 << 20  # 280 MB: 0.2 s to encode with chunks of 1 to 4 MB, 0.3 s with whole arrays as chunks
FOREIGN, EXPECTED = "not a checkpoint of nanocnn", "Expected a file that save() wrote"


class TreeError(Exception):
    """These bytes are no state, or one of a newer schema; the message says what was found and expected."""


def encode(state: dict[str, Any]) -> memoryview:
    """The bytes of an HDF5 file, a Fletcher-32 checksum on each chunk."""
    if not isinstance(state, dict):
        raise TypeError(f"a state is a dict of arrays, numbers, strings and containers, got {type(state).__name__}")
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.attrs["format"], file.attrs["schema"], file.attrs["nanocnn"] = FORMAT, SCHEMA, _version()
        tree = json.dumps(_pack(state, "state", file), allow_nan=False)  # ASCII
        _put(file, "tree", np.frombuffer(tree.encode(), np.uint8))
    return memory.getbuffer()


def decode(data: bytes) -> dict[str, Any]:
    """The state that `encode()` made these bytes of. Raises TreeError for bytes of another kind."""
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise TreeError(f"{FOREIGN}: an HDF5 file of another kind. {EXPECTED}")
            if file.attrs["schema"] > SCHEMA:
                raise TreeError(
                    f"found schema {file.attrs['schema']}, written by nanocnn {file.attrs['nanocnn']}; expected at "
                    f"most {SCHEMA}. Upgrade nanocnn to that version, or use an older checkpoint"
                )
            return _unpack(json.loads(file["tree"][()].tobytes()), file)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise TreeError(f"{FOREIGN}: {type(error).__name__}: {error}. {EXPECTED}") from error


def _pack(value: Any, place: str, file: h5py.File) -> Any:
    """`value` as JSON; its arrays go to the file."""
    if isinstance(value, np.generic):
        return {"scalar": _put(file, place, np.asarray(value))}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place}: keys must be strings, got {key!r}")
        return {"dict": {key: _pack(item, f"{place}/{_escape(key)}", file) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{place}/{i}", file) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    try:
        array = to_device(value, "cpu")
    except TypeError:
        raise TypeError(
            f"{place}: a {type(value).__name__} cannot be saved; expected an array, a number, a string, a bool, None, "
            "or a dict, list or tuple of those"
        ) from None
    return {"array": [_put(file, place, array), array.shape]}


def _unpack(node: Any, file: h5py.File) -> Any:
    if isinstance(node, list):
        return [_unpack(item, file) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, value),) = node.items()
    if tag == "dict":
        return {key: _unpack(item, file) for key, item in value.items()}
    if tag == "tuple":
        return tuple(_unpack(item, file) for item in value)
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(value))[0]
    if tag == "scalar":
        return file[value][0]
    if tag == "array":
        return file[value[0]][()].reshape(value[1])
    raise ValueError(f"unknown tag {tag!r}")


def _put(file: h5py.File, place: str, array: np.ndarray) -> str:
    """Store an array at `place`, which is returned. HDF5 checks chunked data only, so 0-d becomes shape (1,) there."""
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"{place}: an array of dtype {array.dtype} cannot be saved; expected bool, int, float or complex"
        )
    array = np.atleast_1d(array)
    checks = {"chunks": _chunks(array.shape, array.itemsize), "fletcher32": True} if array.size else {}
    file.create_dataset(place, data=array, **checks)
    return place


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """About CHUNK_BYTES of whole rows, cut evenly along the first axes: a half-empty chunk takes its full space."""
    chunk = list(shape)
    for axis, n in enumerate(shape):
        row = math.prod(shape[axis + 1 :]) * itemsize
        pieces = math.ceil(n / max(1, CHUNK_BYTES // row))
        chunk[axis] = math.ceil(n / pieces)
        if row <= CHUNK_BYTES:
            break
    return tuple(chunk)


def _escape(key: str) -> str:
    """A key as one component of an HDF5 path, no two alike: "/" is %2F, and what HDF5 cannot name is escaped too."""
    return {"": "%", ".": "%2E"}.get(key) or quote(key, safe="", errors="surrogatepass")


def _version() -> str:
    try:
        return importlib.metadata.version("nanocnn")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
