"""The interface of a task queue that is measured."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

CONCURRENCY = 100
"""How many tasks the worker runs at once, and how many callers an asynchronous client has."""

RESULTS = "PEERS_RESULTS"
"""The environment variable with the URL of the server that keeps the results, if it is another."""

_began = False


def begun() -> None:
    """Note when the first task started. The no-op task of every peer only calls this."""
    global _began
    if not _began:
        _began = True
        try:
            with open(os.environ["PEERS_BEGAN"], "x") as file:
                file.write(repr(time.time()))
        except FileExistsError:
            return  # another process of this worker was first


class Peer(ABC):
    """One task queue with one no-op task, on a new server."""

    package: str
    """The name of its distribution on PyPI."""
    notes = ""
    """How it differs from the others."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.results = os.environ.get(RESULTS, url)

    @abstractmethod
    async def enqueue(self, count: int) -> None:
        """Enqueue `count` tasks; return when all are enqueued."""

    async def bulk(self, count: int) -> None:
        """Enqueue `count` tasks in the peer's documented way for many; by default as `enqueue`."""
        await self.enqueue(count)

    @abstractmethod
    async def last(self) -> None:
        """Wait until the task that was enqueued last has finished and its result is stored."""

    @abstractmethod
    def work(self) -> None:
        """Run the worker forever."""

    async def start(self) -> None:  # noqa: B027  # some connect at first use
        """Connect, and create tables and the like."""

    async def stop(self) -> None:  # noqa: B027
        """Disconnect."""


async def by_callers(add: Callable[[], Awaitable[object]], count: int) -> None:
    """Enqueue `count` tasks by 100 concurrent callers."""

    async def caller(times: int) -> None:
        for _ in range(times):
            await add()

    share, more = divmod(count, CONCURRENCY)
    await asyncio.gather(*(caller(share + (at < more)) for at in range(CONCURRENCY)))
