"""A wait that takes more than a third of its patience is told; it fails only who asks for that."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest

from qtasks_conformance import SlowPass
from qtasks_conformance.patience import (
    Patience,
    forget_slow_waits,
    server_away,
    tell_slow_waits,
    timed,
)
from tests.kit.outside import run

TESTS = """
import asyncio
import pytest
from qtasks_conformance import BrokerContract, Part, Subject
from qtasks_memory import MemoryBroker
from qtasks_memory.subscription import MemorySubscription

class SlowSubscription(MemorySubscription):
    async def receive(self, wanted, limit):
        await asyncio.sleep(4.0)
        return await super().receive(wanted, limit)

class Slow(MemoryBroker):
    async def subscribe(self, queues):
        return SlowSubscription(self._started(), self._lease)

def subject_of(broker):
    return Subject(
        broker=Part(broker, {"lease": 1.0}),
        storage=Part("qtasks_memory:MemoryStorage"),
        lease=1.0,
        ends_with_process=True,
    )

class TestSlow(BrokerContract):
    @pytest.fixture
    def subject(self):
        return subject_of("test_mine:Slow")

class TestQuick(BrokerContract):
    @pytest.fixture
    def subject(self):
        return subject_of("qtasks_memory:MemoryBroker")
"""
SLOW = "test_mine.py::TestSlow::test_a_message_comes_as_it_went"
QUICK = "test_mine.py::TestQuick::test_a_message_comes_as_it_went"
TOLD = f"SlowPass: {SLOW}: receiving 1 from queue q took 4."


@pytest.mark.parametrize(
    ("options", "summary"),
    [
        ((), "2 passed, 1 warning"),
        (("-W", "error::qtasks_conformance.SlowPass"), "2 passed, 1 error"),
    ],
)
def test_a_slow_pass_is_told(tmp_path: Path, options: tuple[str, ...], summary: str) -> None:
    told = run(tmp_path, TESTS, *options, SLOW, QUICK, QTASKS_CONFORMANCE_PATIENCE="10")
    assert summary in told, told
    assert TOLD in told, told
    assert "of 10 s" in told, told


@pytest.mark.parametrize(
    ("within", "away", "slow"),
    [(2 * Patience(0.1), False, True), (2 * Patience(0.1), True, False), (0.2, False, False)],
)
def test_what_is_counted(within: float, away: bool, slow: bool) -> None:
    """Not what has a time of its own, nor while the test itself keeps the server away."""
    forget_slow_waits()
    with timed(within, "a wait"), server_away() if away else nullcontext():
        time.sleep(0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tell_slow_waits("a test")
    assert [warning.category for warning in told] == [SlowPass] * slow
