"""Arrays in one block: those that live at the same time never overlap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanocnn.arena import Life, arrange

LIVES = st.lists(
    st.builds(lambda size, first, length: Life(size, first, first + length), *[st.integers(0, n) for n in (50, 20, 8)])
)


@given(LIVES, st.sampled_from([1, 8, 64]))
def test_no_two_arrays_share_memory_while_both_are_needed(lives, align):
    offsets, total = arrange(lives, align)
    assert all(o % align == 0 for o in offsets)
    assert all(o + life.size <= total for o, life in zip(offsets, lives, strict=True))
    for i, (a, x) in enumerate(zip(lives, offsets, strict=True)):
        for b, y in zip(lives[:i], offsets[:i], strict=True):
            if a.first <= b.last and b.first <= a.last:
                assert x + a.size <= y or y + b.size <= x


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_arrays_that_follow_one_another_take_the_room_of_the_largest(sizes):
    lives = [Life(size, 2 * i, 2 * i + 1) for i, size in enumerate(sizes)]
    assert arrange(lives, 1) == ([0] * len(sizes), max(sizes, default=0))


def test_a_chain_takes_the_room_of_its_largest_pair():
    """Each layer reads what the one before it wrote."""
    sizes = [5, 3, 4, 2, 6, 1]
    assert arrange([Life(size, i, i + 1) for i, size in enumerate(sizes)], 1)[1] == 8
