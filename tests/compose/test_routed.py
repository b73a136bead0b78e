"""A broker for each queue: who has what, no more than the limit, and one that is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks import control
from qtasks.asyncio import QueueTasks
from qtasks.compose import RoutedBroker, members, merged
from qtasks_core import (
    DONE,
    Ack,
    Broker,
    Delivery,
    Outcome,
    QueueDepth,
    Release,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed, ConfigurationError, NotSupported, Unavailable
from qtasks_core.lookup import resolve_broker
from qtasks_memory import MemoryBroker
from qtasks_memory.subscription import MemorySubscription
from tests.processes import PATIENCE
from tests.services import Service

BOTH = {"a": 10, "b": 10}
EACH_ONE = {"a": 1, "b": 1}


def message(queue: str, attempt: int = 1) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="t", queue=queue, attempt=attempt)


async def routed(one: Broker, other: Broker) -> RoutedBroker:
    """Return a started broker whose queue `b` is on the other one."""
    broker = RoutedBroker(one, {"b": other})
    await broker.start(f"routed-{uuid4().hex[:8]}")
    return broker


def in_memory() -> MemoryBroker:
    return MemoryBroker(uuid4().hex)


async def test_each_queue_is_on_its_broker() -> None:
    one, other = in_memory(), in_memory()
    broker = await routed(one, other)
    assert await broker.publish([message(queue) for queue in "abbab"]) == [DONE] * 5
    assert ((await one.depth("a")).ready, (await one.depth("b")).ready) == (2, 0)
    assert ((await other.depth("a")).ready, (await other.depth("b")).ready) == (0, 3)
    assert (await broker.depth("b")).ready == 3
    assert await broker.purge("b") == 3
    await broker.stop()


async def test_a_backlog_fills_all_slots_while_the_other_queue_is_empty() -> None:
    names = [f"memory://{uuid4().hex}" for _ in range(2)]
    app = QueueTasks("routed", RoutedBroker(names[0], {"empty": names[1]}), "memory://")
    started, full, done = 0, asyncio.Event(), asyncio.Event()

    @app.task(name="hold")
    async def hold() -> None:
        nonlocal started
        started += 1
        if started == 10:
            full.set()
        await done.wait()

    async with app:
        tasks = await hold.map([()] * 30)
        async with app.worker(queues=["default", "empty"], concurrency=10):
            async with asyncio.timeout(PATIENCE):
                await full.wait()
            assert (await app.broker.depth("default")).in_flight == 10
            done.set()
            for task in tasks:
                await task.wait_result(PATIENCE)


@pytest.mark.parametrize("where", ["memory", "sqlite"])
async def test_no_more_is_held_than_there_are_slots(where: str, tmp_path: Path) -> None:
    """Both queues have a backlog, and one slot becomes free at a time, as in a busy worker."""
    urls = [f"sqlite:///{tmp_path}/{n}.db" if where == "sqlite" else f"memory://{uuid4().hex}"
            for n in range(2)]  # fmt: skip
    broker = await routed(resolve_broker(urls[0]), resolve_broker(urls[1]))
    await broker.publish([message(queue) for queue in "ab" for _ in range(30)])
    subscription = await broker.subscribe(BOTH)
    held: list[Delivery] = []
    over: list[int] = []
    for turn in range(30):
        wanted = ["a", "b"] if turn % 2 else ["b", "a"]
        got = await subscription.receive(dict.fromkeys(wanted, 1), 1)
        assert len(got) == 1
        held += got
        depths = [await broker.depth(queue) for queue in "ab"]
        over.append(sum(depth.in_flight or 0 for depth in depths) - len(held))
    assert max(over) <= 1, over
    assert over[-10:] == [0] * 10, "what was left over once was never handed out"
    assert {delivery.queue for delivery in held[-4:]} == {"a", "b"}
    assert await subscription.settle([Ack(delivery) for delivery in held]) == [DONE] * 30
    await broker.stop()


async def test_a_cancelled_call_makes_no_second_delivery(
    redis_server: Service, postgres_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL releases what a cancelled call has fetched, if the next one asks for less.

    A message that is delivered often without a crash must not look like poison.
    """
    monkeypatch.setattr(merged, "IDLE_AFTER", 30.0)  # on a slow machine too, none looks idle
    broker = await routed(resolve_broker(redis_server.url), resolve_broker(postgres_server.url))
    await broker.publish([message("b") for _ in range(250)])
    subscription = await broker.subscribe(BOTH)
    counts: list[int | None] = []
    for _ in range(20):
        await broker.publish([message("a") for _ in range(3)])
        held: list[Delivery] = []
        for _ in range(2):
            if free := 10 - len(held):
                async with asyncio.timeout(PATIENCE):
                    held += await subscription.receive(dict.fromkeys("ab", free), free)
        counts += [delivery.count for delivery in held]
        assert await subscription.settle([Ack(each) for each in held]) == [DONE] * len(held)
    assert set(counts) == {1}
    await broker.stop()


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_leftover_is_handed_out_if_its_lease_holds(is_lost: bool) -> None:
    one, other = in_memory(), in_memory()
    broker = await routed(one, other)
    sent = [message("a"), message("b")]
    await broker.publish(sent)
    subscription = await broker.subscribe(BOTH)
    (first,) = await subscription.receive(EACH_ONE, 1)
    assert first.queue == "a"
    assert (await other.depth("b")).in_flight == 1, "both have answered in one moment"
    if is_lost:
        other.travel(31.0)
    (second,) = await subscription.receive(EACH_ONE, 1)
    assert (second.message, second.count) == (sent[1], 2 if is_lost else 1)
    assert await subscription.settle([Ack(first), Ack(second)]) == [DONE, DONE]
    await broker.stop()


async def test_a_leftover_is_released_by_close() -> None:
    broker = await routed(in_memory(), in_memory())
    await broker.publish([message("a"), message("b")])
    subscription = await broker.subscribe(BOTH)
    await subscription.receive(EACH_ONE, 1)
    await subscription.close()
    assert await broker.depth("b") == QueueDepth(ready=1, delayed=0, in_flight=0)
    await broker.stop()


class Replacing(MemoryBroker):
    """Each extension replaces the delivery, as on RabbitMQ or Kafka."""

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return ReplacingSubscription(self._started(), self._lease)


class ReplacingSubscription(MemorySubscription):
    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        extended = await super().extend(deliveries)
        return [each and self._replaced(each) for each in extended]

    def _replaced(self, delivery: Delivery) -> Delivery:
        in_flight = self._memory.queues[delivery.queue].in_flight
        entry = in_flight.pop(delivery.fence)
        entry.holder = next(self._memory.deliveries)
        in_flight[entry.holder] = entry
        return Delivery(delivery.message, delivery.queue, entry.holder, delivery.count)


async def test_a_replacement_is_handed_out_in_place_of_a_delivery() -> None:
    broker = await routed(in_memory(), Replacing(uuid4().hex))
    await broker.publish([message("a"), message("b")])
    subscription = await broker.subscribe(BOTH)
    (first,) = await subscription.receive(EACH_ONE, 1)
    (second,) = await subscription.receive(EACH_ONE, 1)
    extended = await subscription.extend([second, first])
    assert extended[1] is first
    assert extended[0] not in (None, second)
    held = [delivery for delivery in extended if delivery is not None]
    assert await subscription.settle([Ack(delivery) for delivery in held]) == [DONE, DONE]
    await broker.stop()


class Failing(MemoryBroker):
    """Its server is away for messages while `is_away`."""

    asked = 0
    is_away = True

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        self.check()
        return await super().publish(messages, transaction)

    def check(self) -> None:
        if self.is_away:
            raise Unavailable("failing://server does not answer")

    often: asyncio.Event

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        self.often = asyncio.Event()
        return FailingSubscription(self)


class FailingSubscription(MemorySubscription):
    def __init__(self, broker: Failing) -> None:
        super().__init__(broker._started(), 30.0)
        self._broker = broker

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        self._broker.asked += 1
        if self._broker.asked == 6:
            self._broker.often.set()
        self._broker.check()
        return await super().receive(wanted, limit)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        self._broker.check()
        return await super().settle(settlements)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        self._broker.check()
        return await super().extend(deliveries)


async def test_one_that_fails_is_asked_again_after_pauses(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing(uuid4().hex)
    broker = await routed(in_memory(), failing)
    subscription = await broker.subscribe(BOTH)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with caplog.at_level(logging.WARNING):
        receiving = asyncio.create_task(subscription.receive(BOTH, 10))
        async with asyncio.timeout(PATIENCE):
            await failing.often.wait()
        # The shortest pauses are 5, 10, 20, 40 and 80 ms.
        assert loop.time() - begun > 0.15
        sent = message("a")
        await broker.publish([sent])
        (delivery,) = await receiving
    assert delivery.message == sent
    assert [r.message for r in caplog.records] == [
        "a composed broker: failing://server does not answer; trying again"
    ]
    with pytest.raises(Unavailable):
        await subscription.receive({"b": 1}, 1)
    await broker.stop()


async def test_after_a_while_one_that_is_away_holds_up_no_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = Failing(uuid4().hex)
    failing.is_away = False
    broker = await routed(in_memory(), failing)
    await broker.publish([message("a"), *(message("b") for _ in range(3))])
    subscription = await broker.subscribe(BOTH)
    (here,) = await subscription.receive({"a": 1}, 1)
    acked, retried, released = theirs = await subscription.receive({"b": 3}, 3)
    failing.is_away = True
    settlements: list[Settlement] = [Ack(here), Ack(acked)]
    settlements += [Retry(retried, message("b", 2)), Release(released)]
    with pytest.raises(Unavailable):
        await subscription.extend([here, *theirs])
    with pytest.raises(Unavailable):
        await subscription.settle(settlements)
    batch = [message("a"), message("b")]
    with pytest.raises(Unavailable):
        await broker.publish(batch)
    monkeypatch.setattr(members, "OUT_AFTER", 0.0)
    outcomes = [outcome.status for outcome in await broker.publish(batch)]
    assert outcomes == ["done", "unknown"]
    assert (await broker.depth("a")).ready == 1
    assert await subscription.extend([acked, retried]) == [acked, retried]
    outcomes = [outcome.status for outcome in await subscription.settle(settlements)]
    assert outcomes == ["done", "unknown", "refused", "unknown"]
    assert (await broker.depth("b")).in_flight == 3
    failing.is_away = False
    back = await subscription.receive({"b": 10}, 10)
    assert [each.message for each in back] == [retried.message, released.message]
    assert (await broker.depth("b")).in_flight == 2
    await broker.stop()


async def test_while_one_is_away_the_others_go_on(redis_server: Service, tmp_path: Path) -> None:
    """Also if the worker has tasks of the one that is away: their settlements hold up nothing."""
    url = f"sqlite:///{tmp_path}/tasks.db"
    name = f"routed-{uuid4().hex[:8]}"
    broker = RoutedBroker(f"{url}?lease=300", {"mails": f"{redis_server.url}?lease=300"})
    app = QueueTasks(name, broker, url)
    started = 0
    all_started = asyncio.Event()
    may_end = [asyncio.Event() for _ in range(5)]

    @app.task(name="here")
    async def here(number: int) -> int:
        return number

    @app.task(name="mail", queue="mails")
    async def mail(number: int) -> int:
        nonlocal started
        started += 1
        if started == len(may_end):
            all_started.set()
        await may_end[number].wait()
        return number

    async with app, app.worker():
        mails = await mail.map([(number,) for number in range(5)])
        async with asyncio.timeout(PATIENCE):
            await all_started.wait()
        await asyncio.to_thread(redis_server.kill)
        try:
            for number in range(5):
                may_end[number].set()
                assert (await here.add_task(number, timeout=PATIENCE)).returning == number
            for number in range(5):
                assert (await mails[number].wait_result(PATIENCE)).returning == number
        finally:
            await asyncio.to_thread(redis_server.restart)
        assert (await mail.add_task(0, timeout=PATIENCE)).returning == 0
        async with asyncio.timeout(PATIENCE):
            while await app.control(control.depths, ["mails"]) != {  # noqa: ASYNC110
                "mails": QueueDepth(ready=0, delayed=0, in_flight=0)
            }:
                await asyncio.sleep(0.05)
    assert started == 6, "the deliveries were acknowledged when their server was back"


async def test_a_batch_that_half_failed_is_not_published_twice(
    redis_server: Service, tmp_path: Path
) -> None:
    here = resolve_broker(f"sqlite:///{tmp_path}/tasks.db")
    broker = await routed(here, resolve_broker(redis_server.url))
    batch = [message("a"), message("b")]
    await asyncio.to_thread(redis_server.kill)
    try:
        for _ in range(2):
            with pytest.raises(Unavailable):
                await broker.publish(batch)
    finally:
        await asyncio.to_thread(redis_server.restart)
    assert await broker.publish(batch) == [DONE, DONE]
    assert [(await broker.depth(queue)).ready for queue in "ab"] == [1, 1]
    assert await broker.publish(batch[:1]) == [DONE]
    assert (await broker.depth("a")).ready == 2, "only the repeated call was taken for one"
    await broker.stop()


async def test_a_retry_may_move_to_another_broker_once(tmp_path: Path) -> None:
    one, other = (resolve_broker(f"sqlite:///{tmp_path}/{name}.db") for name in "xy")
    broker = await routed(one, other)
    await broker.publish([message("a"), message("a")])
    subscription = await broker.subscribe(BOTH)
    held, acked = await subscription.receive({"a": 10}, 10)
    moved: list[Settlement] = [Retry(held, message("b", 2)), Ack(acked)]
    for _ in range(3):
        assert await subscription.settle(moved) == [DONE, DONE]
    for differs in (Ack(held), Retry(held, message("b", 3)), Retry(held, message("a", 2))):
        assert (await subscription.settle([differs]))[0].status == "refused"
    assert (await broker.depth("b")).ready == 1
    assert await broker.depth("a") == QueueDepth(ready=0, delayed=0, in_flight=0)
    await broker.stop()


async def test_a_retry_does_not_move_without_the_lease() -> None:
    one, other = in_memory(), in_memory()
    broker = await routed(one, other)
    await broker.publish([message("a")])
    subscription = await broker.subscribe(BOTH)
    (held,) = await subscription.receive({"a": 1}, 1)
    one.travel(31.0)
    assert (await subscription.settle([Retry(held, message("b", 2))]))[0].status == "refused"
    assert (await other.depth("b")).ready == 0
    await broker.stop()


async def test_commands_go_through_the_default(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    app = QueueTasks("routed", RoutedBroker(url, {"q": f"sqlite:///{tmp_path}/q.db"}), url)
    started, ended = asyncio.Event(), asyncio.Event()

    @app.task(name="long", queue="q")
    async def long() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with app, app.worker(), asyncio.timeout(PATIENCE):
        task = await long.add_task()
        await started.wait()
        await task.cancel()
        await ended.wait()


async def test_a_start_without_one_of_them_stops_the_others(tmp_path: Path) -> None:
    here = resolve_broker(f"sqlite:///{tmp_path}/tasks.db")
    broker = RoutedBroker(here, {"b": "redis://localhost:1"})
    with pytest.raises(Unavailable):
        await broker.start("routed")
    with pytest.raises(Closed):
        await here.depth("a")
    await broker.stop()


def test_it_guarantees_what_all_of_them_do(tmp_path: Path) -> None:
    durable = resolve_broker(f"sqlite:///{tmp_path}/tasks.db")
    told = RoutedBroker(durable, {"q": MemoryBroker()}).guarantees
    assert (told.part, told.survives, told.lease) == ("RoutedBroker", "nothing", 30.0)
    assert (told.order, told.priorities, told.leases_survive) == ("queue", True, False)
    assert not told.atomic_retries, "a retry may move"
    alone = RoutedBroker(durable, {"q": durable}).guarantees
    assert alone.survives == durable.guarantees.survives
    assert alone.atomic_retries


async def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigurationError, match="nosuch"):
        RoutedBroker("memory://", {"q": "nosuch://x"})
    with pytest.raises(ConfigurationError, match="a queue"):
        RoutedBroker("memory://", {"a b": "memory://"})
    with pytest.raises(ConfigurationError, match="neither a broker nor a URL"):
        RoutedBroker("memory://", {"q": 7})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match=r"MemoryBroker: 30.0 s, MemoryBroker: 7.0 s"):
        RoutedBroker("memory://", {"q": "memory://?lease=7"})
    with pytest.raises(NotSupported, match="PostgresBroker"):
        await RoutedBroker("memory://", {}).publish([message("q")], transaction=object())


def test_an_old_failure_does_not_count_as_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(members, "monotonic", lambda: now)
    member = members.Member(MemoryBroker())

    def fail() -> None:
        with pytest.raises(Unavailable), member.watched():
            raise Unavailable("away")

    fail()
    assert not member.is_out
    now += 4.0 * members.OUT_AFTER + 1.0
    fail()
    assert not member.is_out, "the next failure, after a long time, begins another outage"
    now += members.OUT_AFTER + 1.0
    assert member.is_out
    with member.watched():
        now += 1.0
    assert not member.is_out
    fail()
    assert not member.is_out
