"""nanocnn/data/pickles.py: nothing is run, whatever the pickle says."""

import os
import pickle
import pickletools
import struct

import numpy as np
import pytest

from nanocnn.data import DataError
from nanocnn.data import pickles as module
from nanocnn.data.pickles import as_array, read_pickle


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_plain_values_of_every_protocol(protocol):
    value = {"a": [1, 200, 70000, -5, 1 << 40], "b": ("x", "é", ()), "c": {"d": None, "e": True, "f": False}, "g": [[]]}
    if protocol == 1:  # whole numbers beyond 32 bits and booleans are text there, as nothing of CIFAR-10 is
        value = {"a": [1, 200, 70000, -5], "b": ("x", ()), "c": {"d": None}}
    assert read_pickle(pickle.dumps(value, protocol), "here") == value


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(protocol, order):
    array = np.asarray(np.arange(24, dtype=np.uint8).reshape(4, 6), order=order)
    np.testing.assert_array_equal(as_array(read_pickle(pickle.dumps(array, protocol), "here"), "here"), array)


def test_shared_objects_stay_shared():
    inner = [1]
    a, b = read_pickle(pickle.dumps([inner, inner], 4), "here")
    assert a is b


@pytest.mark.parametrize(
    "function", [os.system, eval, np.load, pickle.loads, np.dtype("u1").newbyteorder, dict.fromkeys]
)
def test_imports_are_refused_by_name(function):
    class Evil:
        def __reduce__(self):
            return function, ("exit 1",)

    for protocol in (2, 3, 4, 5):
        with pytest.raises(DataError, match=r"^here: the pickle (imports|uses)"):
            read_pickle(pickle.dumps(Evil(), protocol), "here")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02cos\nsystem\nU\x04truetR.", "imports os.system"),
        (b"\x80\x02(U\x04trueios\nsystem\n.", "uses INST"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "uses NEWOBJ"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02U\x01xQ.", "uses BINPERSID"),
        (b"\x80\x02)U\x01xR.", "calls what it did not import"),
        (b"\x80\x02}U\x01xb.", "damaged"),
        (b"\x80\x04]]\x93.", "a name that is no string"),
        (b"\x80\x02})U\x01xs.", "a dictionary key is a tuple"),
        (b"\x80\x02e.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "damaged or truncated"),
        (b"\x80\x02B\xff\xff\xff\xffabc.", "damaged or truncated"),
        (b"\x80\x02", "damaged or truncated"),
        (b"", "damaged or truncated"),
        (b"S'text'\n.", "uses STRING"),
    ],
)
def test_hostile_programs(program, message):
    with pytest.raises(DataError, match=message):
        read_pickle(program, "here")


def test_no_memory_for_a_place_far_away():
    """`pickle.load` makes room for two billion places to keep a single value."""
    assert read_pickle(b"\x80\x02K\x01r" + struct.pack("<I", 0x7FFFFFFF) + b".", "here") == 1


def test_a_key_that_takes_for_ever_to_hash():
    doubled = b"\x80\x02)" + b"q\x01h\x01\x86" * 100  # a tuple of two of a tuple of two of ...
    with pytest.raises(DataError, match="a dictionary key is a tuple"):
        read_pickle(doubled[:2] + b"}" + doubled[2:] + b"K\x01s.", "here")
    with pytest.raises(DataError, match="calls what it did not import"):
        read_pickle(doubled + b")R.", "here")
    with pytest.raises(DataError, match="no string"):
        read_pickle(doubled + b"U\x01x\x93.", "here")


def test_too_many_instructions(monkeypatch):
    monkeypatch.setattr(module, "MOST_INSTRUCTIONS", 100)
    with pytest.raises(DataError, match="more than 100 instructions"):
        read_pickle(pickle.dumps(list(range(200)), 4), "here")


@pytest.mark.parametrize(
    "value", [1, "x", None, [], np.zeros(3), np.zeros(3, object), np.zeros(3, "u2"), np.zeros(3, "S1")], ids=repr
)
def test_what_is_no_array_of_bytes(value):
    with pytest.raises(DataError, match="expected an array of bytes"):
        as_array(
            read_pickle(pickle.dumps(value, 5), "here") if not isinstance(value, np.ndarray) else _array(value), "here"
        )


def _array(value):
    try:
        return read_pickle(pickle.dumps(value, 2 if value.dtype == object else 5), "here")
    except DataError:
        return None  # refused even earlier


def test_an_array_that_lies_about_its_shape():
    raw = pickle.dumps(np.zeros((2, 7), np.uint8), 4)
    at = raw.index(b"K\x02K\x07\x86")  # its shape, (2, 7)
    lying = raw[: at + 1] + b"\x09" + raw[at + 2 :]
    assert any(op.name == "TUPLE2" for op, _, _ in pickletools.genops(lying))
    with pytest.raises(DataError, match="expected an array of bytes"):
        as_array(read_pickle(lying, "here"), "here")
