"""The leftovers of a cancelled call: a round trip under way, and deliveries that it fetched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from math import inf
from typing import Any, Generic, TypeVar

from qtasks_core.schemas import Delivery

T = TypeVar("T")


class Leftovers:
    """Deliveries that the server handed over and that no call of `receive` has returned yet.

    A call adds the deliveries that it fetched, and takes those that it may return. If it is
    cancelled in between, the next call finds the deliveries here. `close` takes all of them, to
    release them.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[float, Delivery]] = []

    def add(self, deliveries: Iterable[Delivery], until: float = inf) -> None:
        """Keep deliveries whose lease holds until this time, by any clock of the caller."""
        self._kept += [(until, delivery) for delivery in deliveries]

    def take(self, wanted: Mapping[str, int], limit: int, now: float = 0.0) -> list[Delivery]:
        """Return the deliveries that a call of `receive` may have. The rest stays.

        Another receiver may have an expired delivery, so expired ones are dropped.
        """
        kept, self._kept = self._kept, []
        quota = dict(wanted)  # deliveries of each queue that this call may still take
        taken: list[Delivery] = []
        for until, delivery in kept:
            if until <= now:
                continue
            if len(taken) < limit and quota.get(delivery.queue, 0) > 0:
                quota[delivery.queue] -= 1
                taken.append(delivery)
            else:
                self._kept.append((until, delivery))
        return taken

    def take_all(self) -> list[Delivery]:
        """Return all deliveries, to be released."""
        kept, self._kept = self._kept, []
        return [delivery for _, delivery in kept]

    def __bool__(self) -> bool:
        return bool(self._kept)


class Shielded(Generic[T]):
    """Runs one call at a time. A cancelled waiter leaves it running for the next one to collect.

    Use it only for calls that finish by themselves, such as a round trip. A call that waits for a
    message would keep waiting for its cancelled caller. It would take the message, and hold up the
    next caller. The owner finally calls `finish` or `abandon`, so that no call outlives it.
    """

    def __init__(self) -> None:
        self._call: asyncio.Task[T] | None = None

    async def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the call that a cancelled waiter left, or else start `call`."""
        if self._call is None:
            self._call = asyncio.create_task(call())
        running = self._call
        await asyncio.wait({running})
        # After `abandon`, another call may be under way.
        if self._call is running:
            self._call = None
        return running.result()

    @property
    def pending(self) -> asyncio.Task[T] | None:
        """The call whose result nobody has collected yet, if any."""
        return self._call

    async def finish(self) -> None:
        """Wait for the uncollected call, if any, and ignore its result and its error.

        Use it if the call itself keeps what it fetched, for example in `Leftovers`.
        """
        call = self._call
        if call is None:
            return
        await asyncio.wait({call})
        if self._call is call:
            self._call = None
        if not call.cancelled():
            call.exception()  # otherwise asyncio logs that nobody retrieved it

    async def abandon(self) -> T | None:
        """Cancel the uncollected call and wait for it. Return its result if it had one."""
        call, self._call = self._call, None
        if call is None:
            return None
        call.cancel()
        await asyncio.wait({call})
        if call.cancelled() or call.exception() is not None:
            return None
        return call.result()
