"""Splits the items of one call into statements that are neither too large nor too slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from qtasks_core.batches import split

T = TypeVar("T")

MOST_ITEMS = 2_000
MOST_BYTES = 8 * 1024 * 1024

LARGEST = 64 * 1024 * 1024
"""Bytes of the largest message or record. The server accepts 1 GB, but takes many seconds."""

TOO_LARGE = f"it is larger than the {LARGEST >> 20} MiB that are kept on Postgres"


def batches(items: Iterable[T], encode: Callable[[T], bytes]) -> Iterator[list[tuple[T, bytes]]]:
    """Yield the items with their encodings, in order, one batch per statement.

    An item is encoded when its batch is due, so a large call needs the memory of one batch.
    """
    encoded: list[tuple[T, bytes]] = []

    def sizes() -> Iterator[int]:
        for item in items:
            encoded.append((item, encode(item)))
            yield len(encoded[-1][1])

    for part in split(sizes(), MOST_ITEMS, MOST_BYTES):
        count = part.stop - part.start
        yield encoded[:count]
        del encoded[:count]


def fitting(batch: list[tuple[T, bytes]]) -> list[tuple[T, bytes]]:
    """Return the items of a batch that are not too large. A too large item has its own batch."""
    return [(item, data) for item, data in batch if len(data) <= LARGEST]


def size_of(batch: Sequence[tuple[T, bytes]]) -> int:
    """Return the size of a batch in bytes."""
    return sum(len(data) for _, data in batch)


def slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the items in order, one batch per statement."""
    for start in range(0, len(items), MOST_ITEMS):
        yield items[start : start + MOST_ITEMS]
