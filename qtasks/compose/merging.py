"""What comes from several sources at once, one of which may be away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from typing import Generic, TypeVar

from qtasks.client.retrying import Backoff, Outage
from qtasks.compose.members import SAME_OUTAGE
from qtasks_core.errors import QTasksError, Unavailable

T = TypeVar("T")

_MOST = 100
"""What waits for `next`. More waits at its source."""


class Merging(Generic[T]):
    """Listens to sources from the first `next` until `close`. Each is a call that iterates.

    A source that is away holds up nobody: it is asked again after a pause.
    """

    def __init__(self, sources: Sequence[Callable[[], AsyncIterator[T]]], what: str) -> None:
        """`what` is said in the log while a source is away."""
        self._sources = sources
        self._what = what
        self._came: asyncio.Queue[T | QTasksError] = asyncio.Queue(_MOST)
        self._listeners: list[asyncio.Task[None]] = []
        self._failed_at: dict[int, float] = {}

    async def next(self) -> T:
        """Wait for the next item. Cancelling loses none.

        Raises `Unavailable` if all sources are away, and other errors of a source.
        """
        if not self._listeners:
            self._listeners = [
                asyncio.create_task(self._listen(at)) for at in range(len(self._sources))
            ]
        came = await self._came.get()
        if isinstance(came, QTasksError):
            raise came
        return came

    async def _listen(self, at: int) -> None:
        """Pass on the items of one source, until it raises what asking again cannot mend."""
        backoff, outage = Backoff(), Outage(self._what)
        while True:
            try:
                async for item in self._sources[at]():
                    backoff.reset()
                    outage.over()
                    await self._came.put(item)
            except Unavailable as error:
                outage.failed(error)
                self._failed_at[at] = now = monotonic()
                recent = [each for each in self._failed_at.values() if now - each < SAME_OUTAGE]
                if len(recent) == len(self._sources):
                    await self._came.put(error)
            except QTasksError as error:
                await self._came.put(error)
                return
            await asyncio.sleep(backoff.next())

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        for listener in self._listeners:
            listener.cancel()
        if self._listeners:
            await asyncio.wait(self._listeners)
