"""Crossing from any thread into one event loop, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class EntryQueue(Generic[T]):
    """A list under a lock and one wake-up of the loop for all that gathered meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[T]], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._lock = Lock()
        self._items: list[T] = []

    def post(self, item: T) -> None:
        """Add an item, from any thread. Raises `RuntimeError` when the loop is closed."""
        with self._lock:
            self._items.append(item)
            wake = len(self._items) == 1
        if wake:
            self._wake()

    def post_all(self, items: list[T]) -> None:
        """Add many items, from any thread."""
        if not items:
            return
        with self._lock:
            wake = not self._items
            self._items += items
        if wake:
            self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            with self._lock:
                self._items.clear()
            raise

    def _drain(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        self._deliver(items)
