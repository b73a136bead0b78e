"""Wakes receivers with NOTIFY, without making publishers wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_postgres.connection import Database

RING = "SELECT pg_notify(channel, '') FROM unnest($1::text[]) AS rung (channel)"


class Doorbell:
    """Tells sleeping receivers that a message is new. It sends at most one NOTIFY at a time.

    A transaction with NOTIFY locks the whole database until its commit is on disk. If publishers
    notified in their own transactions, they would wait for each other's disk writes. The doorbell's
    transaction writes nothing to disk. All messages published while it runs share the next NOTIFY.
    If a publisher dies before it has rung, receivers still find the message, because they look
    regularly.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._channels: set[str] = set()
        self._ringing: asyncio.Task[None] | None = None

    def ring(self, channels: Iterable[str]) -> None:
        """Wake the listeners of `channels` soon. This call does no I/O."""
        self._channels.update(channels)
        if self._channels and (self._ringing is None or self._ringing.done()):
            self._ringing = asyncio.create_task(self._ring())

    async def stop(self) -> None:
        """Wait until all bells have been rung. Idempotent."""
        if self._ringing is not None:
            await asyncio.wait({self._ringing})
            self._ringing = None

    async def _ring(self) -> None:
        while self._channels:
            channels, self._channels = self._channels, set()
            # Listeners notice a lost server too, and look for messages once it is back. A lasting
            # error is raised to the next publisher.
            with suppress(Unavailable, ConfigurationError):
                await self._database.fetch(RING, list(channels))
