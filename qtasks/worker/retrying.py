"""A worker's calls to its servers, which are retried while a server is out of reach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qtasks.client.backoff import Backoff
from qtasks.client.cancelling import only_from_outside
from qtasks.client.outage import Outage
from qtasks_core.errors import Unavailable

T = TypeVar("T")

_FRESH = 10.0
"""Seconds for which a failure counts. A `receive` that waits says nothing, but if it had lost its
server it would have failed again by then."""


class Retrying:
    """Retries calls with backoff, and knows whether the servers answered lately."""

    def __init__(self) -> None:
        self._failed_at: float | None = None
        self._outage = Outage("worker")

    @property
    def fine(self) -> bool:
        """Whether the last calls were answered."""
        return self._failed_at is None or time.monotonic() - self._failed_at > _FRESH

    async def call(
        self, call: Callable[[], Awaitable[T]], until: asyncio.Event | None = None
    ) -> T | None:
        """Retry `call` while the server is out of reach; None once `until` is set meanwhile."""
        backoff = Backoff()
        failed = False
        while True:
            try:
                with only_from_outside():
                    answer = await call()
            except Unavailable as error:
                self._failed_at = time.monotonic()
                failed = True
                self._outage.failed(error)
            else:
                self._failed_at = None
                if failed:  # otherwise it may be another server that is out of reach
                    self._outage.over()
                return answer
            pause = backoff.next()
            if until is None:
                await asyncio.sleep(pause)
                continue
            try:
                async with asyncio.timeout(pause):
                    await until.wait()
                    return None
            except TimeoutError:
                continue
