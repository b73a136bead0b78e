"""Wakes receivers and inboxes with NOTIFY, without making others wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_postgres.connection import Database

RING = """
    SELECT pg_notify(channel, payload)
    FROM unnest($1::text[], $2::text[]) AS rung (channel, payload)
"""

AT_ONCE = 500
"""Notifications of one statement. Each has up to 8000 bytes."""


class Doorbell:
    """Tells sleeping receivers that something is new. It runs one statement at a time.

    A transaction with NOTIFY locks the whole database until its commit is on disk. If those who
    publish and save notified in their own transactions, they would wait for each other's disk
    writes. The doorbell's transaction writes nothing to disk. All notifications that are asked for
    while it runs share the next one. If a process dies before it has rung, receivers still find
    what is new, because they look regularly.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[tuple[str, str], None] = {}
        self._ringing: asyncio.Task[None] | None = None

    def ring(self, channels: Iterable[str]) -> None:
        """Wake the listeners of `channels` soon. This call does no I/O."""
        self.send((channel, "") for channel in channels)

    def send(self, notifications: Iterable[tuple[str, str]]) -> None:
        """Send each channel its payload soon. This call does no I/O."""
        self._waiting.update(dict.fromkeys(notifications))
        if self._waiting and (self._ringing is None or self._ringing.done()):
            self._ringing = asyncio.create_task(self._ring())

    async def stop(self) -> None:
        """Wait until all bells have been rung. Idempotent."""
        if self._ringing is not None:
            await asyncio.wait({self._ringing})
            self._ringing = None

    async def _ring(self) -> None:
        while self._waiting:
            waiting, self._waiting = list(self._waiting), {}
            for at in range(0, len(waiting), AT_ONCE):
                # Listeners notice a lost server too, and look once it is back. A lasting error is
                # raised to the next caller who publishes or saves.
                with suppress(Unavailable, ConfigurationError):
                    await self._database.fetch(RING, *columns_of(waiting[at : at + AT_ONCE]))


def columns_of(notifications: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Return channels and payloads, column by column."""
    notifications = list(notifications)
    return [channel for channel, _ in notifications], [payload for _, payload in notifications]
