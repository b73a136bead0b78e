"""Partitions move to another worker while tasks run in them: none waits, none runs twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from qtasks_core import DONE, Ack, Delivery, Release, Retry, Subscription, TaskMessage
from qtasks_core.errors import Unavailable
from qtasks_kafka import KafkaBroker
from qtasks_kafka.writer import Record, Written
from tests.processes import Process
from tests.services import Service

LEASE = 6.0
QUEUE = {"q": 1000}


@asynccontextmanager
async def started(url: str, namespace: str, lease: float = LEASE) -> AsyncIterator[KafkaBroker]:
    broker = KafkaBroker(url, partitions=4, lease=lease)
    await broker.start(namespace)
    try:
        yield broker
    finally:
        await broker.stop()


class Receiver:
    """Receives all the time, and extends what it holds, as a worker does."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.held: dict[str, Delivery] = {}
        self.counts: dict[str, int | None] = {}
        self.seen: Counter[str] = Counter()
        self.lost: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Receiver]:
        tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._extend())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.result()

    async def _receive(self) -> None:
        while True:
            try:
                deliveries = await self.subscription.receive(QUEUE, 1000)
            except Unavailable:
                await asyncio.sleep(0.1)
                continue
            for delivery in deliveries:
                assert isinstance(delivery.message, TaskMessage)
                uuid = delivery.message.uuid
                self.held[uuid] = delivery
                self.counts[uuid] = delivery.count
                self.seen[uuid] += 1

    async def _extend(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            asked = dict(self.held)
            try:
                answers = await self.subscription.extend(list(asked.values()))
            except Unavailable:
                continue
            for uuid, answer in zip(asked, answers, strict=True):
                if answer is None and self.held.pop(uuid, None) is not None:
                    self.lost.add(uuid)

    async def ack(self, uuids: set[str]) -> None:
        settled = {uuid: self.held.pop(uuid) for uuid in uuids & self.held.keys()}
        while True:
            try:
                outcomes = await self.subscription.settle([Ack(d) for d in settled.values()])
            except Unavailable:
                await asyncio.sleep(0.1)
                continue
            assert set(outcomes) <= {DONE}
            return


async def publish(broker: KafkaBroker, uuids: set[str]) -> None:
    messages = [TaskMessage(uuid=uuid, task_name="n", queue="q") for uuid in sorted(uuids)]
    assert set(await broker.publish(messages)) == {DONE}


async def reaches(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("end", ["ack", "retry", "release"])
async def test_a_new_worker_gets_partitions_in_which_tasks_run(
    kafka_server: Service, namespace: str, end: str
) -> None:
    """The tasks stay with their worker: they are neither lost there nor delivered to the other."""
    url = kafka_server.url
    long = {f"long{n}" for n in range(12)}
    async with started(url, namespace) as one, started(url, namespace) as two:
        old, new = Receiver(await one.subscribe(QUEUE)), Receiver(await two.subscribe(QUEUE))
        async with old.running():
            await publish(one, long)
            await reaches(lambda: old.held.keys() >= long)
            async with new.running():
                number = 0
                while not new.seen:  # it gets partitions, and what comes from now on
                    await publish(one, {f"short{number}-{n}" for n in range(4)})
                    number += 1
                    for each in (old, new):
                        await each.ack({u for u in each.held if u.startswith("short")})
                    await asyncio.sleep(0.1)
                await reaches(lambda: sum((old.seen + new.seen).values()) >= 12 + 4 * number)
                for each in (old, new):
                    await each.ack({u for u in each.held if u.startswith("short")})
                assert not old.lost
                assert not new.seen.keys() & long
                held = [old.held.pop(uuid) for uuid in sorted(long)]
                if end == "ack":
                    assert set(await old.subscription.settle([Ack(d) for d in held])) == {DONE}
                elif end == "retry":
                    again = [
                        Retry(d, TaskMessage(uuid=f"again{n}", task_name="n", queue="q"))
                        for n, d in enumerate(held)
                    ]
                    assert set(await old.subscription.settle(again)) == {DONE}
                    await reaches(
                        lambda: {f"again{n}" for n in range(12)} <= (old.seen + new.seen).keys()
                    )
                else:
                    assert set(await old.subscription.settle([Release(d) for d in held])) == {DONE}
                    await reaches(lambda: sum((old.seen + new.seen)[u] for u in long) == 24)
                for each in (old, new):
                    await each.ack(set(each.held))
                assert max((old.seen + new.seen).values()) == (2 if end == "release" else 1)
    # Nobody finds anything left: whoever takes over sees what is done.
    async with started(url, namespace) as three:
        last = Receiver(await three.subscribe(QUEUE))
        async with last.running():
            await publish(three, {"last1", "last2", "last3", "last4"})
            await reaches(lambda: len(last.seen) >= 4)
            assert all(uuid.startswith("last") for uuid in last.seen)


class SlowCopies(KafkaBroker):
    """Its copies are in the log at once, and it hears of that when `heard` is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.copied, self.heard = asyncio.Event(), asyncio.Event()

    async def copy(self, records: Sequence[Record]) -> list[Written]:
        written = await super().copy(records)
        if records:
            self.copied.set()
            await self.heard.wait()
        return written


async def test_a_task_that_ends_while_its_message_is_moved_does_not_run_again(
    kafka_server: Service, namespace: str
) -> None:
    """Its copy is in the log already. Nobody needs it."""
    url = kafka_server.url
    long = {f"long{n}" for n in range(12)}
    slow = SlowCopies(url, partitions=4, lease=LEASE)
    await slow.start(namespace)
    try:
        async with started(url, namespace) as two:
            old, new = Receiver(await slow.subscribe(QUEUE)), Receiver(await two.subscribe(QUEUE))
            async with old.running():
                await publish(slow, long)
                await reaches(lambda: old.held.keys() >= long)
                async with new.running():
                    await reaches(slow.copied.is_set)
                    await old.ack(long)
                    slow.heard.set()
                    sent: set[str] = set()
                    while not new.seen:
                        await publish(two, more := {f"short{len(sent) + n}" for n in range(4)})
                        sent |= more
                        await asyncio.sleep(0.1)
                    await reaches(lambda: (old.seen + new.seen).keys() >= sent)
                    for each in (old, new):
                        await each.ack(set(each.held))
                    assert set((old.seen + new.seen).values()) == {1}
    finally:
        await slow.stop()
    async with started(url, namespace) as three:
        last = Receiver(await three.subscribe(QUEUE))
        async with last.running():
            await publish(three, {"last1", "last2", "last3", "last4"})
            await reaches(lambda: len(last.seen) >= 4)
            assert all(uuid.startswith("last") for uuid in last.seen)


CHILD = """
import asyncio, sys
from qtasks_kafka import KafkaBroker
from qtasks_kafka.writer import Record, Written

async def main():
    broker = KafkaBroker(sys.argv[1], partitions=4, lease=float(sys.argv[3]))
    await broker.start(sys.argv[2])
    subscription = await broker.subscribe({"q": 1000})
    while True:
        for delivery in await subscription.receive({"q": 1000}, 1000):
            print("got", delivery.message.uuid, flush=True)

asyncio.run(main())
"""


async def test_messages_of_a_killed_worker_do_not_wait_for_tasks_of_others(
    kafka_server: Service, namespace: str
) -> None:
    url = kafka_server.url
    async with started(url, namespace) as broker:
        survivor = Receiver(await broker.subscribe(QUEUE))
        arguments = ["-c", CHILD, url, namespace, str(LEASE)]
        async with survivor.running():
            with Process(*arguments, environment={}) as child:
                sent: set[str] = set()
                while "got" not in child.output() or not survivor.seen:
                    await publish(broker, more := {f"{len(sent) + n}" for n in range(4)})
                    sent |= more
                    await asyncio.sleep(0.2)
                child.kill()
                got = {line.split()[1] for line in child.output().splitlines() if "got" in line}
            kept = set(survivor.held) - got
            # The survivor finishes nothing, and all arrives.
            await reaches(lambda: survivor.held.keys() >= sent)
            assert not survivor.lost
            assert {survivor.seen[uuid] for uuid in kept} <= {1}
            # What the killed worker had is counted. A commit may not have counted the newest.
            assert {2} <= {survivor.counts[uuid] for uuid in got} <= {None, 2}
            await survivor.ack(sent)
