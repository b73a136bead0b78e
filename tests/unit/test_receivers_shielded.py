"""A cancelled waiter strands nothing: the next one collects what it asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from qtasks_core.receivers import Shielded


class Source:
    """Gives 1, 2, 3 …, each when it is let go; notes how many calls run at once."""

    def __init__(self) -> None:
        self.given = 0
        self.running = 0
        self.go = asyncio.Event()

    async def fetch(self) -> int:
        self.running += 1
        assert self.running == 1
        try:
            await self.go.wait()
            self.given += 1
            return self.given
        finally:
            self.running -= 1


async def cancelled(task: asyncio.Task[int], turns: int = 1) -> bool:
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    return task.cancelled()


async def test_returns_what_the_call_returns() -> None:
    shielded, source = Shielded[int](), Source()
    source.go.set()
    assert await shielded.run(source.fetch) == 1
    assert await shielded.run(source.fetch) == 2
    assert shielded.pending is None


async def test_cancelled_waiter_leaves_the_call_to_the_next() -> None:
    shielded, source = Shielded[int](), Source()
    for _ in range(3):
        assert await cancelled(asyncio.create_task(shielded.run(source.fetch)))
    assert shielded.pending is not None
    source.go.set()
    assert await shielded.run(source.fetch) == 1
    assert source.given == 1


@pytest.mark.parametrize("turns", range(8))
async def test_cancelled_at_any_turn_nothing_is_lost(turns: int) -> None:
    shielded, source = Shielded[int](), Source()
    source.go.set()
    waiter = asyncio.create_task(shielded.run(source.fetch))
    if await cancelled(waiter, turns):
        assert await shielded.run(source.fetch) == 1
    else:
        assert waiter.result() == 1
    assert await shielded.run(source.fetch) == 2


async def test_result_that_came_meanwhile_is_kept() -> None:
    shielded, source = Shielded[int](), Source()
    assert await cancelled(asyncio.create_task(shielded.run(source.fetch)))
    source.go.set()
    await asyncio.sleep(0.01)
    assert source.given == 1
    source.go.clear()
    assert await shielded.run(source.fetch) == 1


async def test_error_is_told_once_and_the_next_call_is_a_new_one() -> None:
    shielded, source = Shielded[int](), Source()

    async def fails() -> int:
        await asyncio.sleep(0)
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await shielded.run(fails)
    assert await cancelled(asyncio.create_task(shielded.run(fails)))
    with pytest.raises(ConnectionError):
        await shielded.run(source.fetch)
    source.go.set()
    assert await shielded.run(source.fetch) == 1


async def test_abandon_gives_the_uncollected_result() -> None:
    shielded, source = Shielded[int](), Source()
    assert await shielded.abandon() is None
    assert await cancelled(asyncio.create_task(shielded.run(source.fetch)))
    source.go.set()
    await asyncio.sleep(0.01)
    assert await shielded.abandon() == 1
    assert shielded.pending is None
    assert await shielded.abandon() is None


async def test_abandon_ends_the_call() -> None:
    shielded, source = Shielded[int](), Source()
    assert await cancelled(asyncio.create_task(shielded.run(source.fetch)))
    assert source.running == 1
    assert await shielded.abandon() is None
    assert source.running == 0


async def test_abandon_while_somebody_waits() -> None:
    """The waiter is told by a cancellation, as its call was."""
    shielded, source = Shielded[int](), Source()
    waiter = asyncio.create_task(shielded.run(source.fetch))
    await asyncio.sleep(0)
    assert await shielded.abandon() is None
    with pytest.raises(asyncio.CancelledError):
        await waiter
    source.go.set()
    assert await shielded.run(source.fetch) == 1


async def test_abandoned_call_does_not_disown_the_next() -> None:
    shielded, source = Shielded[int](), Source()
    first = asyncio.create_task(shielded.run(source.fetch))
    await asyncio.sleep(0)
    abandoning = asyncio.create_task(shielded.abandon())
    await asyncio.sleep(0)
    second = asyncio.create_task(shielded.run(source.fetch))
    await asyncio.wait({first, abandoning})
    assert await cancelled(second)
    source.go.set()
    await asyncio.sleep(0.01)
    assert await shielded.run(source.fetch) == 1


@pytest.mark.parametrize("end", ["returns", "raises"])
async def test_abandoned_call_that_resists_cancellation(end: str) -> None:
    """A driver may end a call in its own way: what it fetched is handed over, its error is not."""
    shielded = Shielded[str]()

    async def resists() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if end == "raises":
                raise ConnectionError from None
            return "fetched"
        raise AssertionError

    run: Callable[[], Coroutine[None, None, str]] = resists
    waiter = asyncio.create_task(shielded.run(run))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait({waiter})
    assert await shielded.abandon() == ("fetched" if end == "returns" else None)


async def test_finish_waits_for_the_uncollected_call() -> None:
    shielded, source = Shielded[int](), Source()
    await shielded.finish()
    assert await cancelled(asyncio.create_task(shielded.run(source.fetch)))
    finishing = asyncio.create_task(shielded.finish())
    await asyncio.sleep(0)
    assert not finishing.done()
    source.go.set()
    await finishing
    assert shielded.pending is None
    assert source.running == 0


async def test_finish_ignores_an_error_and_leaves_it_to_who_waits() -> None:
    shielded = Shielded[int]()

    async def fails() -> int:
        await asyncio.sleep(0)
        raise ConnectionError

    waiter = asyncio.create_task(shielded.run(fails))
    await asyncio.sleep(0)
    await shielded.finish()
    with pytest.raises(ConnectionError):
        await waiter
