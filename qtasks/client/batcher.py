"""The batcher: it flushes the items of one turn of the event loop together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from inspect import CORO_CREATED, getcoroutinestate
from itertools import accumulate
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_BYTES = 8 * 1024 * 1024
"""Most bytes of a batch of several items.

A larger batch would keep a server busy for longer than callers wait.
"""


class Batcher(Generic[T]):
    """Collects items and flushes them in batches of at most `size` items.

    At most `in_flight` batches are in flight at a time. Meanwhile further items wait for the next
    batch, so batches grow with the load. `weigh` returns the bytes of an item; a batch of several
    items has at most 8 MiB.

    `flush` gives each of its items an answer, and must not raise. It may raise if `spawn` belongs
    to a task group: then the task group fails.
    """

    def __init__(
        self,
        flush: Callable[[list[T]], Coroutine[Any, Any, None]],
        size: int,
        in_flight: int,
        weigh: Callable[[T], int],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] | None = None,
    ) -> None:
        self._flush = flush
        self._size = size
        self._most_in_flight = in_flight
        self._weigh = weigh
        self._items: list[T] = []
        self._in_flight: dict[asyncio.Task[None], tuple[Coroutine[Any, Any, None], list[T]]] = {}
        self._scheduled = False
        self._loop = asyncio.get_running_loop()
        self._spawn = spawn or self._loop.create_task

    def add(self, item: T) -> None:
        """Add an item to the batch of this turn of the loop."""
        self._items.append(item)
        self._schedule()

    def extend(self, items: list[T]) -> None:
        """Add many items to the batches of this turn of the loop."""
        self._items += items
        self._schedule()

    def _schedule(self) -> None:
        if self._items and not self._scheduled and len(self._in_flight) < self._most_in_flight:
            self._scheduled = True
            self._loop.call_soon(self._launch)

    def _launch(self) -> None:
        self._scheduled = False
        while self._items and len(self._in_flight) < self._most_in_flight:
            batch = self._take()
            call = self._flush(batch)
            task = self._spawn(call)
            self._in_flight[task] = call, batch
            task.add_done_callback(self._finished)

    def _take(self) -> list[T]:
        """Remove the items of the next batch, at least one, and return them."""
        batch = self._items[: self._size]
        if sum(map(self._weigh, batch)) > _BYTES:
            totals = accumulate(map(self._weigh, batch))
            batch = batch[: max(1, sum(1 for total in totals if total <= _BYTES))]
        self._items = self._items[len(batch) :]
        return batch

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._in_flight[task]
        self._schedule()

    async def drain(self) -> None:
        """Wait until all added items are flushed."""
        while self._items or self._in_flight:
            await (asyncio.wait(self._in_flight) if self._in_flight else asyncio.sleep(0))

    async def close(self) -> list[T]:
        """Cancel the batches in flight; return the items that were never flushed."""
        left: list[T] = []
        for task, (call, batch) in self._in_flight.items():
            if getcoroutinestate(call) == CORO_CREATED:
                left += batch  # cancelled now, it never starts
            task.cancel()
        left, self._items = left + self._items, []
        if self._in_flight:
            await asyncio.wait(self._in_flight)
        return left
