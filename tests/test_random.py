"""Philox against its published answers; the seed and the keys of dropout."""

from __future__ import annotations

import numpy as np
import pytest

from nanocnn import random
from nanocnn.kernels.dispatch import using
from nanocnn.kernels.random import random_bits, uniform

VARIANTS = tuple(random_bits.rungs("cpu"))


@pytest.fixture(autouse=True)
def _restore():
    yield
    random.manual_seed(0)


def _philox(counter, key):
    """Philox4x32-10 in plain integers, by the paper's definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


ONES = 0xFFFFFFFF
KNOWN = [  # kat_vectors of Random123: counter, key, answer
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_of_the_definition(counter, key, answer):
    assert tuple(_philox(counter, key)) == answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_known_answer_of_each_variant(variant):
    with using(random_bits=variant):
        assert tuple(random_bits(np.array([0]), 4, 0)[0]) == KNOWN[0][2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_equals_the_definition(variant):
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 2**32, 3)
    seed, epoch, stream = (int(v) for v in rng.integers(2**62, 2**63, 3))
    seed += 2**63  # all 64 bits of the key
    with using(random_bits=variant):
        bits = random_bits(samples, 10, seed, epoch, stream)
    assert bits.dtype == np.uint32
    for row, sample in zip(bits, samples, strict=True):
        key = seed & ONES, seed >> 32
        blocks = [_philox((b, stream & ONES, int(sample), epoch & ONES), key) for b in range(3)]
        assert row.tolist() == [word for block in blocks for word in block][:10]


def test_uniform_is_below_one_and_even():
    u = uniform(np.array([0, 2**32 - 1, 2**31], np.uint32))
    np.testing.assert_array_equal(u, np.array([0, 1 - 2.0**-24, 0.5], np.float32))
    u = uniform(random_bits(np.arange(100), 1000, 5))
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.002


def test_the_seed_makes_weights_and_masks_again():
    def draws():
        random.manual_seed(3)
        return random.generator().standard_normal(5), random.next_key(4)

    (weights, key), (again, key_again) = draws(), draws()
    np.testing.assert_array_equal(weights, again)
    np.testing.assert_array_equal(key.samples, key_again.samples)
    np.testing.assert_array_equal(key.place, key_again.place)
    assert random.next_key(4).place.tolist() != key.place.tolist()


def test_keyed_numbers_the_calls_and_gives_back_what_was_before():
    with random.keyed(2, [5, 6]):
        a, b = random.next_key(2), random.next_key(2)
        with random.keyed(3, [9]):
            inner = random.next_key(1)
        c = random.next_key(2)
    assert (a.place[1], inner.place[1]) == (2, 3)
    assert inner.samples.tolist() == [9]
    assert [k.place[2] - a.place[2] for k in (a, b, c, inner)] == [0, 1, 2, 0]
    assert random.next_key(3).samples.tolist() == [0, 1, 2]


def test_repeated_masks_are_drawn_again():
    with random.repeated():
        a = [random.next_key(1).place.tolist() for _ in range(2)]
    assert [random.next_key(1).place.tolist() for _ in range(2)] == a


def test_keyed_ends_with_an_exception():
    with pytest.raises(KeyError), random.keyed(1, [1]):
        raise KeyError
    assert random.next_key(1).place[2] == random.COUNTED_STREAMS


@pytest.mark.parametrize("samples", [[1.5, 2.0], [[1, 2]], 3])
def test_samples_that_are_no_numbers_of_samples(samples):
    with pytest.raises(ValueError, match=r"keyed\(\) takes sample numbers"), random.keyed(0, samples):
        pass


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "7"])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="expected an integer from 0"):
        random.manual_seed(seed)
