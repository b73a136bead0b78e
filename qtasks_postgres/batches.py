"""Cutting what one call brings into statements that are neither too long nor too slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from qtasks_core.batches import split

T = TypeVar("T")

MOST_ITEMS = 2_000
MOST_BYTES = 8 * 1024 * 1024

LARGEST = 64 * 1024 * 1024
"""Bytes of one encoded message or record. The server would take 1 GB, in many seconds."""

TOO_LARGE = f"it is larger than the {LARGEST >> 20} MiB that are kept on Postgres"


def batches(items: Iterable[T], encode: Callable[[T], bytes]) -> Iterator[list[tuple[T, bytes]]]:
    """Yield the items with their encodings, in order, a statement's worth at a time."""
    encoded = [(item, encode(item)) for item in items]
    for part in split([len(data) for _, data in encoded], MOST_ITEMS, MOST_BYTES):
        yield encoded[part]


def fitting(batch: list[tuple[T, bytes]]) -> list[tuple[T, bytes]]:
    """Return the items of a batch without one that is too large, which is alone in its batch."""
    return [(item, data) for item, data in batch if len(data) <= LARGEST]


def size_of(batch: Sequence[tuple[T, bytes]]) -> int:
    """Return the bytes of a batch."""
    return sum(len(data) for _, data in batch)


def slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the items in order, a statement's worth at a time."""
    for start in range(0, len(items), MOST_ITEMS):
        yield items[start : start + MOST_ITEMS]
