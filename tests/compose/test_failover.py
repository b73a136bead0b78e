"""A second broker for the outages of the first one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.compose import FailoverBroker
from qtasks_core import Broker, Outcome, QueueDepth, TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_memory import MemoryBroker
from tests.processes import PATIENCE
from tests.services import Service

LEASE = 4.0
SOME = 30


class Fallible(MemoryBroker):
    """A broker that can be away. A call may have had its effect, and lose its answer."""

    away = False
    loses_answers = False

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if not self.away:
            outcomes = await super().publish(messages, transaction)
        if self.away or self.loses_answers:
            raise Unavailable("the first broker does not answer")
        return outcomes

    async def depth(self, queue: str) -> QueueDepth:
        if self.away:
            raise Unavailable("the first broker does not answer")
        return await super().depth(queue)


def message() -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="t", queue="q")


async def ready(*brokers: Broker) -> list[int | None]:
    return [(await broker.depth("q")).ready for broker in brokers]


async def test_the_second_gets_what_comes_while_the_first_is_away() -> None:
    first, second = Fallible(uuid4().hex), MemoryBroker(uuid4().hex)
    broker = FailoverBroker(first, second)
    await broker.start("failover")
    await broker.publish([message()])
    first.away = True
    await broker.publish([message(), message()])
    await broker.publish([message()])
    first.away = False
    assert await ready(first, second) == [1, 3]
    async with asyncio.timeout(PATIENCE):
        while (await ready(first))[0] == 1:
            await broker.publish([message()])
            await asyncio.sleep(0.02)
    assert (await broker.depth("q")).ready == sum(n or 0 for n in await ready(first, second))
    await broker.stop()


async def test_a_lost_answer_loses_no_message() -> None:
    """The message is on both: the engine runs it at least once, and records one result."""
    first, second = Fallible(uuid4().hex), MemoryBroker(uuid4().hex)
    app = QueueTasks(f"failover-{uuid4().hex[:8]}", FailoverBroker(first, second), "memory://")

    @app.task(name="add")
    async def add(x: int) -> int:
        return x + 1

    async with app:
        first.loses_answers = True
        task = await add.add_task(1)
        first.loses_answers = False
        async with app.worker():
            assert (await task.wait_result(PATIENCE)).returning == 2


async def test_both_away_is_an_outage() -> None:
    first, second = Fallible(uuid4().hex), Fallible(uuid4().hex)
    broker = FailoverBroker(first, second)
    await broker.start("failover")
    first.away = second.away = True
    with pytest.raises(Unavailable):
        await broker.publish([message()])
    second.away = False
    await broker.publish([message()])
    assert await ready(second) == [1]
    await broker.stop()


async def test_an_app_works_on_while_the_first_server_is_down(
    redis_server: Service, tmp_path: Path
) -> None:
    """Tasks go on, and those that the first server had kept come when it is back."""
    second, records = (f"sqlite:///{tmp_path}/{name}.db" for name in ("second", "records"))
    broker = FailoverBroker(f"{redis_server.url}?lease={LEASE}", f"{second}?lease={LEASE}")
    app = QueueTasks(f"failover-{uuid4().hex[:8]}", broker, records)

    @app.task(name="add")
    async def add(x: int) -> int:
        return x + 1

    async with app:
        kept = await add.map([(n,) for n in range(SOME)])
        redis_server.kill()
        try:
            async with app.worker():
                during = [await add.add_task(n) for n in range(SOME)]
                results = [(await task.wait_result(PATIENCE)).returning for task in during]
        finally:
            redis_server.restart()
        async with app.worker():
            results += [(await task.wait_result(PATIENCE)).returning for task in kept]
    assert results == [*range(1, SOME + 1)] * 2


def test_the_same_broker_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="first and second are the same broker"):
        FailoverBroker("memory://a", "memory://a")
