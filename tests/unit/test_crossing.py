"""One reply for both faces: it can be awaited and blocked on, and a wait can be taken back."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from qtasks.bridge.crossing import Reply, block_on, io_thread


class Left(Reply[int]):
    """Notes that nobody waits any more."""

    times = 0

    def leave(self) -> None:
        self.times += 1


def later(reply: Reply[int], value: int) -> threading.Timer:
    timer = threading.Timer(0.05, reply.set, (value,))
    timer.start()
    return timer


async def test_it_is_awaited_before_and_after_the_answer() -> None:
    reply: Reply[int] = Reply()
    later(reply, 3)
    assert await reply == 3
    assert await reply == 3
    assert await asyncio.wait_for(asyncio.shield(reply), 1) == 3


def test_it_is_blocked_on_before_and_after_the_answer() -> None:
    reply: Reply[int] = Reply()
    later(reply, 3)
    assert reply.result() == 3
    assert reply.result(0.0) == 3


async def test_a_loop_and_a_thread_may_wait_for_the_same_one() -> None:
    reply: Reply[int] = Reply()
    blocked = asyncio.create_task(asyncio.to_thread(reply.result, 5))
    awaited = [asyncio.ensure_future(reply) for _ in range(3)]
    await asyncio.sleep(0.05)
    io_thread().post(reply.set, 4)
    assert await asyncio.gather(blocked, *awaited) == [4, 4, 4, 4]


async def test_the_first_answer_counts() -> None:
    reply: Reply[int] = Reply()
    reply.fail(ValueError("first"))
    reply.set(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            await reply
    with pytest.raises(ValueError, match="first"):
        reply.result()


async def test_a_cancelled_await_is_taken_back() -> None:
    reply = Left()
    waiting = asyncio.ensure_future(reply)
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert reply.times == 1
    reply.set(5)
    assert await reply == 5


def test_a_wait_that_is_too_long_or_interrupted_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reply = Left()
    with pytest.raises(TimeoutError):
        reply.result(0.01)
    assert reply.times == 1

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qtasks.bridge.crossing.Event.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reply.result()
    assert reply.times == 2


async def test_nothing_is_asked_inside_a_running_loop() -> None:
    asked: list[int] = []

    def ask() -> Reply[int]:
        asked.append(1)
        return Reply()

    with pytest.raises(RuntimeError, match=r"use AsyncRouter and qtasks\.asyncio\.QueueTasks"):
        block_on(ask)
    assert asked == []


async def test_an_answer_to_a_loop_that_was_closed_is_dropped() -> None:
    reply: Reply[int] = Reply()

    waiting = reply.__await__()

    async def wait() -> None:
        next(waiting)

    await asyncio.to_thread(asyncio.run, wait())
    reply.set(1)
    assert reply.result() == 1


async def test_what_is_answered_is_not_kept_by_an_error() -> None:
    """Without the collector of cycles: a caller may make many that fail."""
    reply: Reply[int] = Reply()
    reply.fail(ValueError("no"))
    gone = weakref.ref(reply)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            await reply
        del reply
        assert gone() is None
    finally:
        gc.enable()


async def test_many_answers_wake_a_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    wakes = 0
    original = loop.call_soon_threadsafe

    def counted(*args: object) -> object:
        nonlocal wakes
        wakes += 1
        return original(*args)  # type: ignore[arg-type]

    replies: list[Reply[int]] = [Reply() for _ in range(100)]
    waiting = asyncio.gather(*replies)
    await asyncio.sleep(0)
    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    for number, reply in enumerate(replies):
        reply.set(number)
    monkeypatch.undo()
    assert await waiting == list(range(100))
    assert wakes == 1
