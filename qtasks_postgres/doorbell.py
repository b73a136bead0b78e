"""Waking receivers by NOTIFY, which publishers must not wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_postgres.connection import Database

RING = "SELECT pg_notify(channel, '') FROM unnest($1::text[]) AS rung (channel)"


class Doorbell:
    """Tells sleeping receivers that there is something new, at most one NOTIFY at a time.

    A transaction that notifies holds a lock on the whole database until its commit is on disk, so
    publishers that notified in theirs would queue up for each other's disk writes. This one has
    nothing to write, and all that is published while it is under way shares the next. A publisher
    that dies before it has rung is made up for by the receivers, who look for themselves at times.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._channels: set[str] = set()
        self._ringing: asyncio.Task[None] | None = None

    def ring(self, channels: Iterable[str]) -> None:
        """Wake those who listen to `channels`, soon. No I/O of the caller's."""
        self._channels.update(channels)
        if self._channels and (self._ringing is None or self._ringing.done()):
            self._ringing = asyncio.create_task(self._ring())

    async def stop(self) -> None:
        """Wait until all is rung. Idempotent."""
        if self._ringing is not None:
            await asyncio.wait({self._ringing})
            self._ringing = None

    async def _ring(self) -> None:
        while self._channels:
            channels, self._channels = self._channels, set()
            # Whoever listens notices a lost server too, and looks for himself once it is back. What
            # is wrong for longer is told to the next who publishes.
            with suppress(Unavailable, ConfigurationError):
                await self._database.fetch(RING, list(channels))
