"""How many messages wait in queues: a route policy may look at it for each call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from math import inf

from qtasks.bridge.crossing import IOThread
from qtasks.client.retrying import Outage
from qtasks_core import Broker
from qtasks_core.errors import NotSupported, Unavailable

FRESH = 1.0
"""Seconds for which the numbers of a queue count. Only a question after that reads them again."""


class Depths:
    """The numbers of the queues that were asked for. Without questions it costs nothing.

    A question takes the numbers that are there. It does not wait for the server.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: dict[str, int] = {}
        self._asked_at = -inf
        self._reading: asyncio.Task[None] | None = None
        self._outage = Outage("counting the messages of queues")

    def of(self, queues: Sequence[str], thread: IOThread) -> dict[str, int]:
        """Return the messages that may run, for each queue. From any thread."""
        now = time.monotonic()
        if now - self._asked_at > FRESH or not self._waiting.keys() >= set(queues):
            self._asked_at = now
            for queue in queues:
                self._waiting.setdefault(queue, 0)
            thread.post(self._start)
        return {queue: self._waiting[queue] for queue in queues}

    def add(self, queue: str) -> None:
        """Count a message that is enqueued now. From any thread."""
        self._waiting[queue] += 1

    def _start(self) -> None:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        for queue in list(self._waiting):
            try:
                depth = await self._broker.depth(queue)
            except Unavailable as error:
                self._outage.failed(error)
                return
            except NotSupported:
                return  # what this process has enqueued is all that is known
            if depth.ready is not None:
                self._waiting[queue] = depth.ready
        self._outage.over()

    async def stop(self) -> None:
        """Stop reading."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
