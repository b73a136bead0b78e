"""What a peer has to be able to do, to be measured beside the others."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

CONCURRENCY = 100
"""Tasks at once in the worker, and concurrent callers of an asynchronous client."""

_began = False


def begun() -> None:
    """Note when the first task began; every peer's no-op task calls this and nothing else."""
    global _began
    if not _began:
        _began = True
        try:
            with open(os.environ["PEERS_BEGAN"], "x") as file:
                file.write(repr(time.time()))
        except FileExistsError:
            return  # another process of the same worker was first


class Peer(ABC):
    """One task queue with one no-op task, at a server of its own."""

    package: str
    """What is measured, by its name in the package index."""
    notes = ""
    """What is not as with the others."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    async def enqueue(self, count: int) -> None:
        """Enqueue so many tasks; return when all are."""

    @abstractmethod
    async def last(self) -> None:
        """Wait until the task that was enqueued last has ended, and its result is there."""

    @abstractmethod
    def work(self) -> None:
        """Be the worker, for ever."""

    async def start(self) -> None:  # noqa: B027  # some connect at first use
        """Connect, and create what the server must have."""

    async def stop(self) -> None:  # noqa: B027
        """Disconnect."""


async def by_callers(add: Callable[[], Awaitable[object]], count: int) -> None:
    """Have 100 callers enqueue `count` tasks, each one after the other."""

    async def caller(times: int) -> None:
        for _ in range(times):
            await add()

    share, more = divmod(count, CONCURRENCY)
    await asyncio.gather(*(caller(share + (at < more)) for at in range(CONCURRENCY)))
