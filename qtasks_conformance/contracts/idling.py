"""Waiting costs almost no CPU: a waiting call is woken by its event, not by a timer."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Coroutine
from typing import Any

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_core import Broker, Storage

IDLE = 2.0
"""Seconds to measure while nothing happens."""
TURNS = 25
"""How often this process may wake up in a second: for heartbeats and for delayed messages."""


class BrokerIdleContract(Contract):
    """A broker does not poll for messages and commands."""

    async def test_waiting_costs_nothing(self, rig: Rig) -> None:
        """While `receive` and `commands` wait for nothing, all threads of the process sleep."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await broker.subscribe({"q": 10})
        waiting: list[Coroutine[Any, Any, object]] = [subscription.receive({"q": 10}, 10)]
        if "commands" not in broker.guarantees.unsupported:
            waiting.append(listen(broker))
        await assert_idle(rig, waiting)


class StorageIdleContract(Contract):
    """A storage does not poll for final records and for changes of values."""

    async def test_waiting_costs_nothing(self, rig: Rig) -> None:
        """While an inbox and `watch_value` wait for nothing, all threads of the process sleep."""
        storage = await rig.storage()
        inbox = await rig.inbox(storage)
        record = rig.record("success")
        inbox.expect([record.uuid])
        waiting: list[Coroutine[Any, Any, object]] = [inbox.receive()]
        if "watch_value" not in storage.guarantees.unsupported:
            waiting.append(watch(storage))
        await assert_idle(rig, waiting)


async def listen(broker: Broker) -> None:
    """Wait for commands."""
    async for command in broker.commands():
        raise AssertionError(f"`commands` yielded {command}, which nobody has sent")


async def watch(storage: Storage) -> None:
    """Wait for changes of a value."""
    async for value in storage.watch_value("key"):
        assert value is None, "`watch_value` yielded a value that nobody has set"


async def assert_idle(rig: Rig, waiting: list[Coroutine[Any, Any, object]]) -> None:
    """Fail if this process wakes up often while these calls wait for nothing."""
    tasks = [rig.background(call) for call in waiting]
    await asyncio.sleep(0.5)
    before = switches()
    await asyncio.sleep(IDLE)
    turns = (switches() - before) / IDLE
    assert not [task for task in tasks if task.done()], "a call returned though nothing had come"
    assert turns <= TURNS, (
        f"the process woke up {turns:.0f} times a second while it waited; {TURNS} are allowed: "
        "let the server notify instead of polling"
    )


def switches() -> int:
    """Return how often threads of this process have gone to sleep (voluntary switches)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
