"""Cutting what one call brings into statements that are neither too long nor too slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

MOST_ITEMS = 2_000
MOST_BYTES = 8 * 1024 * 1024


def batches(items: Iterable[T], encode: Callable[[T], bytes]) -> Iterator[list[tuple[T, bytes]]]:
    """Yield the items with their encodings, in order, a statement's worth at a time."""
    batch: list[tuple[T, bytes]] = []
    size = 0
    for item in items:
        data = encode(item)
        if batch and (len(batch) == MOST_ITEMS or size + len(data) > MOST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((item, data))
        size += len(data)
    if batch:
        yield batch


def slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the items in order, a statement's worth at a time."""
    for start in range(0, len(items), MOST_ITEMS):
        yield items[start : start + MOST_ITEMS]
