"""A broker for each queue: who has what, and what goes on while one of them is away."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks import control
from qtasks.asyncio import QueueTasks
from qtasks.compose import RoutedBroker
from qtasks_core import DONE, Ack, Delivery, Retry, Settlement, TaskMessage
from qtasks_core.errors import ConfigurationError, NotSupported
from qtasks_core.lookup import resolve_broker
from qtasks_memory import MemoryBroker
from tests.processes import PATIENCE
from tests.services import Service


def message(queue: str, attempt: int = 1) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="a", queue=queue, attempt=attempt)


async def test_each_queue_is_on_its_broker(redis_server: Service, postgres_server: Service) -> None:
    name = f"routed-{uuid4().hex[:8]}"
    redis, postgres = resolve_broker(redis_server.url), resolve_broker(postgres_server.url)
    broker = RoutedBroker(redis, {"events": postgres})
    await broker.start(name)
    sent = [message(queue) for queue in ("default", "events", "default", "events", "events")]
    assert await broker.publish(sent) == [DONE] * 5
    assert ((await redis.depth("default")).ready, (await redis.depth("events")).ready) == (2, 0)
    assert ((await postgres.depth("default")).ready, (await postgres.depth("events")).ready) == (
        0,
        3,
    )
    assert (await broker.depth("events")).ready == 3
    subscription = await broker.subscribe({"default": 10, "events": 10})
    received: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(received) < 5:
            received += await subscription.receive({"default": 10, "events": 10}, 10)
    assert Counter(delivery.queue for delivery in received) == {"default": 2, "events": 3}
    assert None not in await subscription.extend(received)
    assert await subscription.settle([Ack(delivery) for delivery in received]) == [DONE] * 5
    assert await broker.purge("events") == 0
    await broker.stop()


async def test_a_backlog_of_one_does_not_hold_up_the_other(
    redis_server: Service, postgres_server: Service
) -> None:
    broker = RoutedBroker(redis_server.url, {"slow": postgres_server.url})
    await broker.start(f"routed-{uuid4().hex[:8]}")
    await broker.publish([message(queue) for queue in ("fast", "slow") for _ in range(300)])
    subscription = await broker.subscribe({"fast": 20, "slow": 20})
    seen: Counter[str] = Counter()
    async with asyncio.timeout(PATIENCE):
        while seen.total() < 300:
            got = await subscription.receive({"fast": 20, "slow": 20}, 20)
            assert len(got) <= 20
            await subscription.settle([Ack(delivery) for delivery in got])
            seen.update(delivery.queue for delivery in got)
    assert min(seen["fast"], seen["slow"]) >= 30, seen
    await broker.stop()


async def test_while_one_is_away_the_others_go_on(redis_server: Service, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    name = f"routed-{uuid4().hex[:8]}"
    app = QueueTasks(name, RoutedBroker(url, {"mails": redis_server.url}), url)

    @app.task(name="here")
    async def here(number: int) -> int:
        return number

    @app.task(name="mail", queue="mails")
    async def mail(number: int) -> int:
        return number

    async with app, app.worker():
        assert (await mail.add_task(1, timeout=PATIENCE)).returning == 1
        await asyncio.to_thread(redis_server.kill)
        try:
            for number in range(20):
                assert (await here.add_task(number, timeout=PATIENCE)).returning == number
        finally:
            await asyncio.to_thread(redis_server.restart)
        assert (await mail.add_task(2, timeout=PATIENCE)).returning == 2


async def test_a_retry_may_move_to_another_broker_once(tmp_path: Path) -> None:
    one, other = (resolve_broker(f"sqlite:///{tmp_path}/{name}.db") for name in ("one", "other"))
    broker = RoutedBroker(one, {"second": other})
    await broker.start("routed")
    await broker.publish([message("first"), message("first")])
    subscription = await broker.subscribe({"first": 10, "second": 10})
    (held, acked) = await subscription.receive({"first": 10}, 10)
    moved: list[Settlement] = [Retry(held, message("second", 2)), Ack(acked)]
    for _ in range(3):
        assert await subscription.settle(moved) == [DONE, DONE]
    (refused,) = await subscription.settle([Ack(held)])
    assert refused.status == "refused"
    (again,) = await subscription.receive({"first": 10, "second": 10}, 10)
    assert (again.queue, (await other.depth("second")).ready) == ("second", 0)
    await subscription.settle([Ack(again)])
    assert (await one.depth("first")).in_flight == 0
    await broker.stop()


async def test_commands_go_through_the_default(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    app = QueueTasks("routed", RoutedBroker(url, {"q": f"sqlite:///{tmp_path}/q.db"}), url)
    started, ended = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    @app.task(name="long", queue="q")
    async def long() -> None:
        loop.call_soon_threadsafe(started.set)
        try:
            await asyncio.sleep(300)
        finally:
            loop.call_soon_threadsafe(ended.set)

    async with app, app.worker():
        task = await long.add_task()
        async with asyncio.timeout(PATIENCE):
            await started.wait()
            await task.cancel()
            await ended.wait()
        depths = await app.control(control.depths, ["q", "default"])
        assert set(depths) == {"q", "default"}


def test_what_it_guarantees_holds_on_all(tmp_path: Path) -> None:
    durable = resolve_broker(f"sqlite:///{tmp_path}/tasks.db?lease=20")
    told = RoutedBroker(durable, {"q": MemoryBroker(lease=7.0)}).guarantees
    assert (told.part, told.survives, told.lease) == ("RoutedBroker", "nothing", 7.0)
    assert not told.atomic_retries
    alone = RoutedBroker(durable, {"q": durable}).guarantees
    assert alone.survives == durable.guarantees.survives
    assert alone.atomic_retries


async def test_wrong_parts_are_named() -> None:
    with pytest.raises(ConfigurationError, match="nosuch"):
        RoutedBroker("memory://", {"q": "nosuch://x"})
    with pytest.raises(ConfigurationError, match="a queue"):
        RoutedBroker("memory://", {"a b": "memory://"})
    with pytest.raises(ConfigurationError, match="neither a broker nor a URL"):
        RoutedBroker("memory://", {"q": 7})  # type: ignore[dict-item]
    broker = RoutedBroker("memory://", {"q": "memory://"})
    assert broker.broker_of("q") is broker.broker_of("other"), "one URL is one broker"
    with pytest.raises(NotSupported, match="PostgresBroker"):
        await broker.publish([message("q")], transaction=object())
