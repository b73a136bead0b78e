"""The log of an outage: one line at its begin and one at its end, not one an attempt."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import pytest

from qtasks.client.retrying import Outage, Retrying
from qtasks_core.errors import Unavailable


def failing(times: int) -> Callable[[], Awaitable[str]]:
    left = [Unavailable("redis://here: refused")] * times

    async def call() -> str:
        if left:
            raise left.pop()
        return "answer"

    return call


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
    retrying._outage.failed(Unavailable("postgresql://there: refused"))
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
    assert caplog.messages == [
        "Kafka at kafka://here:1 cannot be reached; trying again",
        "redis://there:2/0: cannot be reached; trying again",
    ]
