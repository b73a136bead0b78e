"""Splitting a batch: nothing is lost, no part is over a limit, and none is shorter than it must."""

from __future__ import annotations

from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st

from qtasks_core.batches import split


@given(st.lists(st.integers(0, 12)), st.integers(1, 5), st.integers(1, 10))
def test_split(sizes: list[int], most_items: int, most_bytes: int) -> None:
    parts = [sizes[part] for part in split(iter(sizes), most_items, most_bytes)]
    assert list(chain.from_iterable(parts)) == sizes
    for part in parts:
        assert 1 <= len(part) <= most_items
        assert sum(part) <= most_bytes or len(part) == 1
    for part, following in pairwise(parts):
        assert len(part) == most_items or sum(part) + following[0] > most_bytes
