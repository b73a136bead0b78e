"""Who waits is woken by what it waits for, and by hardly anything else."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Coroutine
from typing import Any

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_core import Broker, Storage

IDLE = 2.0
"""Seconds for which nothing happens."""
TURNS = 25
"""How often this process may wake up in a second of that: heartbeats, and looks at what is due."""


class BrokerIdleContract(Contract):
    """Waiting for messages and commands without polling for them."""

    async def test_waiting_costs_nothing(self, rig: Rig) -> None:
        """A receiver and a listener that hear nothing sleep, in all threads of the process."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await broker.subscribe({"q": 10})
        waiting: list[Coroutine[Any, Any, object]] = [subscription.receive({"q": 10}, 10)]
        if "commands" not in broker.guarantees.unsupported:
            waiting.append(listen(broker))
        await assert_idle(rig, waiting)


class StorageIdleContract(Contract):
    """Waiting for final records and for changes of values without polling for them."""

    async def test_waiting_costs_nothing(self, rig: Rig) -> None:
        """An inbox and a watcher that hear nothing sleep, in all threads of the process."""
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
        raise AssertionError(f"nobody has sent {command}")


async def watch(storage: Storage) -> None:
    """Wait for changes of a value."""
    async for value in storage.watch_value("key"):
        assert value is None, "nobody has set it"


async def assert_idle(rig: Rig, waiting: list[Coroutine[Any, Any, object]]) -> None:
    """Fail when this process does much while these wait for nothing."""
    tasks = [rig.background(call) for call in waiting]
    await asyncio.sleep(0.5)
    before = switches()
    await asyncio.sleep(IDLE)
    turns = (switches() - before) / IDLE
    assert not [task for task in tasks if task.done()], "one that should wait has ended"
    assert turns <= TURNS, f"the process woke up {turns:.0f} times a second with nothing to do"


def switches() -> int:
    """Return how often a thread of this process has gone to sleep of its own accord."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
