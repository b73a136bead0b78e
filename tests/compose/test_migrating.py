"""A move to another broker while the app works, and a second broker for the time of an outage."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest

from qtasks import Task
from qtasks.asyncio import QueueTasks
from qtasks.compose import FailoverBroker, MigratingBroker
from qtasks_core import DONE, Ack, Broker, Command, Delivery, QueueDepth, TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.lookup import resolve_broker
from tests.processes import PATIENCE
from tests.services import Service


def message(queue: str = "q", delay: float = 0.0) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="a", queue=queue, delay=delay)


async def work_off(broker: Broker, count: int) -> set[str]:
    """Receive so many messages and acknowledge them; return their uuids."""
    subscription = await broker.subscribe({"q": 100})
    seen: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while len(seen) < count:
            try:
                got: list[Delivery] = await subscription.receive({"q": 100}, 100)
                await subscription.settle([Ack(delivery) for delivery in got])
            except Unavailable:
                await asyncio.sleep(0.1)
                continue
            seen |= {each.message.uuid for each in got}  # type: ignore[union-attr]
    await subscription.close()
    return seen


async def test_a_running_app_moves_to_another_broker(
    redis_server: Service, postgres_server: Service
) -> None:
    """Clients and workers of three deployments work beside each other, and nothing is lost."""
    name = f"moving-{uuid4().hex[:8]}"
    moving = MigratingBroker(redis_server.url, postgres_server.url)
    brokers: list[Broker | str] = [redis_server.url, moving, postgres_server.url]
    apps = [QueueTasks(name, broker, postgres_server.url) for broker in brokers]

    async def add(x: int, y: int) -> int:
        return x + y

    adds = [app.task(name="add")(add) for app in apps]

    async def submitted(at: int) -> list[Task[int]]:
        tasks = await adds[at].map([(number, at) for number in range(20)])
        return [*tasks, await adds[at].add_task(100, at, delay=0.5)]

    async with AsyncExitStack() as stack:
        for app in apps:
            await stack.enter_async_context(app)
        tasks = {at: await submitted(at) for at in range(3)}
        async with apps[1].worker():
            tasks[3] = await submitted(0)
            async with apps[2].worker():
                tasks[4] = await submitted(1)
                for at, some in tasks.items():
                    results = [(await task.wait_result(PATIENCE)).returning for task in some]
                    assert results == [n + (0, 1, 2, 0, 1)[at] for n in (*range(20), 100)]
    old = resolve_broker(redis_server.url)
    await old.start(name)
    assert await old.depth("default") == QueueDepth(ready=0, delayed=0, in_flight=0)
    await old.stop()


async def test_migrating_drains_the_old_broker(
    redis_server: Service, postgres_server: Service
) -> None:
    name = f"moving-{uuid4().hex[:8]}"
    old, new = resolve_broker(redis_server.url), resolve_broker(postgres_server.url)
    await old.start(name)
    sent = [message() for _ in range(20)] + [message(delay=1.0) for _ in range(5)]
    assert set(await old.publish(sent)) == {DONE}
    await old.stop()
    broker = MigratingBroker(old, new)
    await broker.start(name)
    more = [message() for _ in range(10)]
    assert set(await broker.publish(more)) == {DONE}
    assert (await new.depth("q")).ready == 10
    both = await broker.depth("q")
    assert (both.ready or 0) + (both.delayed or 0) == 35
    assert await work_off(broker, 35) == {each.uuid for each in sent + more}
    assert await old.depth("q") == QueueDepth(ready=0, delayed=0, in_flight=0)
    await broker.stop()


async def test_commands_reach_workers_of_both_deployments_once(
    redis_server: Service, postgres_server: Service
) -> None:
    name = f"moving-{uuid4().hex[:8]}"
    before = resolve_broker(redis_server.url)
    moving = [MigratingBroker(redis_server.url, postgres_server.url) for _ in range(2)]
    heard: dict[int, list[str]] = {0: [], 1: [], 2: []}
    lasts = {"last of the new", "last of the old"}

    async def listen(at: int, broker: Broker) -> None:
        async for command in broker.commands():
            heard[at].append(command.name)

    brokers: list[Broker] = [before, *moving]
    for broker in brokers:
        await broker.start(name)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        listening = [group.create_task(listen(*each)) for each in enumerate(brokers)]
        # Until all listen; from then on each command comes once.
        while not all("warm" in words for words in heard.values()):
            for broker in (before, moving[0]):
                await broker.broadcast(Command(name="warm"))
            await asyncio.sleep(0.1)
        for name in ("by the new", "last of the new"):
            await moving[0].broadcast(Command(name=name))
        for name in ("by the old", "last of the old"):
            await before.broadcast(Command(name=name))
        while not all(lasts <= set(words) for words in heard.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for task in listening:
            task.cancel()
    for words in heard.values():
        once = [word for word in words if word != "warm"]
        assert sorted(once) == ["by the new", "by the old", *sorted(lasts)]
    for broker in brokers:
        await broker.stop()


async def test_while_the_first_is_away_the_second_takes_all(
    redis_server: Service, postgres_server: Service
) -> None:
    broker = FailoverBroker(redis_server.url, postgres_server.url)
    await broker.start(f"failover-{uuid4().hex[:8]}")
    sent = [message() for _ in range(10)]
    assert set(await broker.publish(sent)) == {DONE}
    await asyncio.to_thread(redis_server.kill)
    try:
        more = [message() for _ in range(10)]
        for each in more:
            assert await broker.publish([each]) == [DONE]
        with pytest.raises(Unavailable):
            await broker.depth("q")
        assert await work_off(broker, 10) == {each.uuid for each in more}
    finally:
        await asyncio.to_thread(redis_server.restart)
    # The tests' Redis keeps what was confirmed; see its settings.
    assert await work_off(broker, 10) == {each.uuid for each in sent}
    async with asyncio.timeout(PATIENCE):
        while (await broker.depth("q")).ready != 0:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await broker.stop()


async def test_an_app_starts_while_the_first_is_away(
    redis_server: Service, postgres_server: Service
) -> None:
    name = f"failover-{uuid4().hex[:8]}"
    broker = FailoverBroker(redis_server.url, postgres_server.url)
    app = QueueTasks(name, broker, postgres_server.url)

    @app.task(name="add")
    async def add(x: int, y: int) -> int:
        return x + y

    await asyncio.to_thread(redis_server.kill)
    try:
        async with app, app.worker():
            assert (await add.add_task(1, 2, timeout=PATIENCE)).returning == 3
            await asyncio.to_thread(redis_server.restart)
            first = resolve_broker(redis_server.url)
            await first.start(name)
            # What comes to the first is worked off too, once it is there.
            assert await first.publish([message("default")]) == [DONE]
            async with asyncio.timeout(PATIENCE):
                while (await first.depth("default")).ready != 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            await first.stop()
    finally:
        await asyncio.to_thread(redis_server.restart)


async def test_both_away_is_unavailable() -> None:
    broker = FailoverBroker("redis://127.0.0.1:1", "redis://127.0.0.1:2")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:[12]"):
        await broker.start("failover")
    for kind in (FailoverBroker, MigratingBroker):
        with pytest.raises(ConfigurationError, match="are the same"):
            kind("memory://", "memory://")
