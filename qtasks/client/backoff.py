"""Waiting between attempts to reach a server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qtasks_core.errors import Unavailable

T = TypeVar("T")


class Backoff:
    """Doubles from `first` to `most` seconds, with full jitter above a tenth.

    See "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, first: float = 0.05, most: float = 2.0) -> None:
        self._first = first
        self._most = most
        self._ceiling = first

    def next(self) -> float:
        """Return how many seconds to wait now."""
        ceiling, self._ceiling = self._ceiling, min(self._ceiling * 2, self._most)
        return ceiling * random.uniform(0.1, 1.0)

    def reset(self) -> None:
        """Begin anew: the server answered."""
        self._ceiling = self._first


async def repeat(call: Callable[[], Awaitable[T]], deadline: float) -> T:
    """Call until the server is in reach. Raises `Unavailable` past the deadline (loop time)."""
    backoff = Backoff()
    while True:
        try:
            return await call()
        except Unavailable:
            pause = backoff.next()
            if asyncio.get_running_loop().time() + pause > deadline:
                raise
            await asyncio.sleep(pause)
