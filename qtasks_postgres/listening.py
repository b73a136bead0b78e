"""Following what others do: commands, and changes of shared values."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qtasks_core.errors import Closed, Unavailable
from qtasks_postgres.connection import Listener

HEARTBEAT = 3.0
"""Seconds of silence after which an iterator checks that the server still answers."""


class Ear:
    """The notifications of one channel, in order, for one iterator."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._heard: asyncio.Queue[str | None] = asyncio.Queue()
        self._closed = False

    def hear(self, payload: str | None) -> None:
        """Take a notification. None: some may have been missed."""
        self._heard.put_nowait(payload)

    def close(self) -> None:
        """Make the waiting step raise `Closed`."""
        self._closed = True
        self._heard.put_nowait(None)

    async def next(self) -> str:
        """Wait for the next notification.

        Raises `Unavailable` if the server is away or a notification was missed, `Closed` after
        `close`. Returns `""` after a while without any.
        """
        if self._heard.empty():
            try:
                async with asyncio.timeout(HEARTBEAT):
                    payload = await self._heard.get()
            except TimeoutError:
                await self._listener.ping()
                return ""
        else:
            payload = self._heard.get_nowait()
        if self._closed:
            raise Closed("the broker or storage that was listened to is stopped")
        if payload is None:
            raise Unavailable("the connection that listens was lost")
        return payload

    def clear(self) -> None:
        """Forget what was heard so far, apart from an end or a loss."""
        while not self._heard.empty():
            payload = self._heard.get_nowait()
            if payload is None:
                self._heard.put_nowait(None)
                return


class Listeners:
    """The ears of the iterators of a broker or storage, so that `stop` finishes them all."""

    def __init__(self) -> None:
        self._ears: set[Ear] = set()

    @asynccontextmanager
    async def listening(self, listener: Listener, channel: str) -> AsyncIterator[Ear]:
        """Listen to a channel. Raises `Unavailable`."""
        ear = Ear(listener)
        self._ears.add(ear)
        try:
            await listener.listen([channel], ear.hear)
            try:
                yield ear
            finally:
                await listener.forget([channel], ear.hear)
        finally:
            self._ears.discard(ear)

    def stop(self) -> None:
        """Finish all iterators."""
        for ear in list(self._ears):
            ear.close()
