"""Splitting a batch into pieces that a server accepts at once, by number and by bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def split(sizes: Iterable[int], most_items: int, most_bytes: int) -> Iterator[slice]:
    """Yield slices of a batch whose items have these sizes, in order, each as long as possible.

    An item of more than `most_bytes` gets a slice for itself.
    """
    start = weight = 0
    at = -1
    for at, size in enumerate(sizes):
        if at > start and (at - start >= most_items or weight + size > most_bytes):
            yield slice(start, at)
            start, weight = at, 0
        weight += size
    if at >= start:
        yield slice(start, at + 1)
