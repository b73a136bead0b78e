"""Who repeats a call to a server that is out of reach: one function, for clients and workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import pytest

from qtasks.client.retrying import Outage, Retrying, retry
from qtasks_core.errors import Unavailable


def failing(times: int, server: str = "redis://here") -> Callable[[], Awaitable[str]]:
    left = [Unavailable(f"{server}: refused")] * times

    async def call() -> str:
        if left:
            raise left.pop()
        return "answer"

    return call


async def test_it_repeats_until_the_server_answers() -> None:
    assert await retry(failing(3)) == "answer"


async def test_past_the_deadline_the_last_error_is_raised() -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="refused"):
        await retry(failing(1000), deadline=began + 0.3)
    assert time.monotonic() - began < 60
    with pytest.raises(Unavailable, match="refused"):
        await retry(failing(1), deadline=0.0)
    assert await retry(failing(0), deadline=0.0) == "answer"


async def test_it_gives_up_when_it_is_told_to_stop() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, stopping.set)
    assert await retry(failing(1000), until=stopping) is None
    assert await retry(failing(0), until=stopping) == "answer"


async def test_an_outage_is_logged_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("me")
    await retry(failing(3), outage=outage)
    assert outage.failed_at is None
    assert caplog.messages == [
        "me: redis://here: refused; trying again",
        "me: the server answers again",
    ]


async def test_a_drivers_stray_cancellation_is_an_error_and_a_real_one_is_not() -> None:
    async def stray() -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="although this call was not cancelled"):
        await retry(stray)
    waiting = asyncio.create_task(retry(asyncio.Event().wait))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()


async def test_a_worker_says_once_that_a_server_is_gone_and_once_that_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    retrying = Retrying()
    assert await retrying.call(failing(3)) == "answer"
    assert await retrying.call(failing(0)) == "answer"
    assert caplog.messages == [
        "worker: redis://here: refused; trying again",
        "worker: the server answers again",
    ]


async def test_another_server_that_answers_does_not_end_the_outage(
    caplog: pytest.LogCaptureFixture,
) -> None:
    retrying = Retrying()
    stopping = asyncio.Event()
    stopping.set()
    assert await retrying.call(failing(1, "postgresql://there"), stopping) is None
    await retrying.call(failing(0))
    assert caplog.messages == ["worker: postgresql://there: refused; trying again"]


def test_each_trouble_is_told_and_told_again_while_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    clock = 1000.0
    monkeypatch.setattr("qtasks.client.retrying.time.monotonic", lambda: clock)
    trouble = Outage()
    for _ in range(130):  # once a second
        trouble.failed(Unavailable("refused"))
        trouble.failed(Unavailable("reset"))
        clock += 1
    assert caplog.messages == ["refused; trying again", "reset; trying again"] * 3
    trouble.over()
    trouble.over()
    trouble.failed(Unavailable("refused"))
    assert caplog.messages[6:] == ["the server answers again", "refused; trying again"]


def test_an_outage_of_one_server_is_one_however_it_shows(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trouble = Outage()
    for text in ("cannot be reached", "does not answer", "was closed"):
        trouble.failed(Unavailable(f"Kafka at kafka://here:1 {text}"))
        trouble.failed(Unavailable(f"redis://there:2/0: {text}"))
        trouble.failed(Unavailable(f"amqp://far:3/ {text}"))
        trouble.failed(Unavailable(f"commands cannot be heard: amqp://far:3/: {text}"))
    assert caplog.messages == [
        "Kafka at kafka://here:1 cannot be reached; trying again",
        "redis://there:2/0: cannot be reached; trying again",
        "amqp://far:3/ cannot be reached; trying again",
    ]
