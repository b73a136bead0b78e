"""Waiting for what must happen, with a deadline: what the engine does, and what tests assert."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from qtasks_conformance.patience import PATIENCE, SOON, patient, timed
from qtasks_core import Delivery, Subscription
from qtasks_core.errors import Unavailable

T = TypeVar("T")

__all__ = ["PATIENCE", "SOON", "assert_silent", "collect", "keeping", "patient", "persist", "retry"]


async def persist(call: Callable[[], Awaitable[T]], within: float = PATIENCE) -> T:
    """Repeat a call while the server cannot be reached, as the engine does."""
    with timed(within, "a call that was repeated while the server was away"):
        return await retry(call, within)


async def retry(call: Callable[[], Awaitable[T]], within: float = PATIENCE) -> T:
    """Do what `persist` does within a longer wait, which is the one to be timed."""
    pause = 0.05
    deadline = asyncio.get_running_loop().time() + within
    while True:
        try:
            return await call()
        except Unavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)


async def limited(call: Awaitable[T], within: float, what: str) -> T:
    """Await a call; fails when it takes longer than so many seconds."""
    try:
        async with asyncio.timeout(within) as limit:
            return await call
    except TimeoutError:
        if not limit.expired():
            raise
        raise AssertionError(f"{what} took longer than {within:g} s") from None


async def collect(
    subscription: Subscription,
    count: int,
    within: float = PATIENCE,
    queue: str = "q",
    into: list[Delivery] | None = None,
) -> list[Delivery]:
    """Receive `count` deliveries of one queue; fails when fewer come within so many seconds.

    They are put `into` a list as they come, where another task can see them.
    """
    deliveries = [] if into is None else into
    try:
        async with patient(within, f"receiving {count} from queue {queue}"):
            while (missing := count - len(deliveries)) > 0:
                receive = partial(subscription.receive, {queue: missing}, missing)
                deliveries += await retry(receive, within)
    except TimeoutError:
        raise AssertionError(
            f"{len(deliveries)} of {count} deliveries came within {within:.1f} s"
        ) from None
    return deliveries


@asynccontextmanager
async def keeping(
    subscription: Subscription, held: list[Delivery], every: float
) -> AsyncIterator[None]:
    """Extend what is in `held`, now and later, as the engine does; fails when one is lost."""

    async def keep() -> None:
        while True:
            extended = await subscription.extend(list(held))
            assert None not in extended, "a delivery was lost although it was extended in time"
            held[: len(extended)] = [delivery for delivery in extended if delivery is not None]
            await asyncio.sleep(every)

    keeper = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.wait({keeper})
        failure = None if keeper.cancelled() else keeper.exception()
    if failure is not None:
        raise failure


async def assert_silent(subscription: Subscription, seconds: float, *queues: str) -> None:
    """Fail when anything can be received within so many seconds."""
    wanted = dict.fromkeys(queues or ("q",), 10)
    try:
        async with asyncio.timeout(seconds):
            deliveries = await subscription.receive(wanted, 10)
    except TimeoutError:
        return
    raise AssertionError(f"nothing should have been received, but there was {deliveries}")
