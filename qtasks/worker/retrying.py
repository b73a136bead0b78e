"""A worker's calls to its servers, which are retried while a server is out of reach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qtasks.client.retrying import Outage, retry

T = TypeVar("T")

_FRESH = 10.0
"""Seconds for which a failure counts. A `receive` that waits says nothing, but if it had lost its
server it would have failed again by then."""


class Retrying:
    """Retries calls with backoff, and knows whether the servers answered lately."""

    def __init__(self) -> None:
        self._outage = Outage("worker")

    @property
    def fine(self) -> bool:
        """Whether the last calls were answered."""
        failed_at = self._outage.failed_at
        return failed_at is None or time.monotonic() - failed_at > _FRESH

    async def call(
        self, call: Callable[[], Awaitable[T]], until: asyncio.Event | None = None
    ) -> T | None:
        """Retry `call` while the server is out of reach; None once `until` is set meanwhile."""
        return await retry(call, until=until, outage=self._outage)
