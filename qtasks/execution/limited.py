"""A time limit around runs, for executors whose runs can be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def limited(run: Callable[P, Awaitable[R]], max_time: float | None) -> Callable[P, Awaitable[R]]:
    """Return a function that does the same, and raises `TimeoutError` after `max_time` seconds."""
    if max_time is None:
        return run

    async def run_in_time(*args: P.args, **kwargs: P.kwargs) -> R:
        limit = asyncio.timeout(max_time)
        try:
            async with limit:
                return await run(*args, **kwargs)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"the run took longer than max_time={max_time} s") from error

    return run_in_time
