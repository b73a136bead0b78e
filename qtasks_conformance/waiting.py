"""Helpers that wait with a deadline: they repeat calls, receive, and extend leases."""

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

__all__ = [
    "PATIENCE", "SOON", "assert_silent", "collect", "heartbeat", "limited", "patient",
    "retry_call", "retry_call_untimed",
]  # fmt: skip


async def retry_call(call: Callable[[], Awaitable[T]], within: float = PATIENCE) -> T:
    """Repeat a call while it raises `Unavailable`, as the engine does.

    Raises that error after `within` seconds.
    """
    with timed(within, "a call that was repeated while the server was away"):
        return await retry_call_untimed(call, within)


async def retry_call_untimed(call: Callable[[], Awaitable[T]], within: float = PATIENCE) -> T:
    """Do the same as `retry_call`, inside a longer wait that is checked for a slow pass itself."""
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
    """Await a call; fail if it takes longer than `within` seconds."""
    try:
        async with asyncio.timeout(within) as limit:
            return await call
    except TimeoutError:
        if not limit.expired():
            raise
        raise AssertionError(
            f"{what} neither returned nor raised within {within:g} s; a call must not hang"
        ) from None


async def collect(
    subscription: Subscription,
    count: int,
    within: float = PATIENCE,
    queue: str = "q",
    into: list[Delivery] | None = None,
) -> list[Delivery]:
    """Receive `count` deliveries from one queue; fail if fewer come within `within` seconds.

    They are appended to `into` as they come, so that another task can see them.
    """
    deliveries = [] if into is None else into
    try:
        async with patient(within, f"receiving {count} from queue {queue}"):
            while (missing := count - len(deliveries)) > 0:
                receive = partial(subscription.receive, {queue: missing}, missing)
                deliveries += await retry_call_untimed(receive, within)
    except TimeoutError:
        raise AssertionError(
            f"only {len(deliveries)} of {count} messages in queue {queue!r} were delivered within "
            f"{within:.1f} s; the others are lost, still held, or late"
        ) from None
    return deliveries


@asynccontextmanager
async def heartbeat(
    subscription: Subscription, held: list[Delivery], every: float
) -> AsyncIterator[None]:
    """Extend all deliveries in `held` again and again, as the engine does; fail if one is lost.

    `every`: seconds between two calls. Deliveries that are added to `held` later are extended too.
    """

    async def beat() -> None:
        while True:
            extended = await subscription.extend(list(held))
            assert None not in extended, (
                "`extend` answered None (lost) for a delivery that was extended in time: "
                "a receiver keeps its lease while it extends it"
            )
            held[: len(extended)] = [delivery for delivery in extended if delivery is not None]
            await asyncio.sleep(every)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait({beating})
        failure = None if beating.cancelled() else beating.exception()
    if failure is not None:
        raise failure


async def assert_silent(subscription: Subscription, seconds: float, *queues: str) -> None:
    """Fail if anything is delivered within so many seconds."""
    wanted = dict.fromkeys(queues or ("q",), 10)
    try:
        async with asyncio.timeout(seconds):
            deliveries = await subscription.receive(wanted, 10)
    except TimeoutError:
        return
    raise AssertionError(
        f"no message should be left for this receiver, but `receive` returned {deliveries}"
    )
