"""Tasks that run longer than the server's consumer timeout: they are handed over, unnoticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from qtasks.asyncio import QueueTasks
from qtasks_core import Ack, Delivery, Release, Retry, Settlement, Subscription, TaskMessage
from qtasks_memory import MemoryStorage
from qtasks_rabbitmq import RabbitMQBroker, connection
from qtasks_rabbitmq.connection import Connection
from qtasks_rabbitmq.lane import Lane
from qtasks_rabbitmq.topology import Names
from tests.rabbitmq.test_broker import collect, message
from tests.rabbitmq.test_channels import patient
from tests.rabbitmq.test_topology import user
from tests.services.rabbitmq import RabbitMQServer

__all__ = ["user"]  # a fixture
TIMEOUT = 12.0
LEASE = 9.0
MOST_SECONDS = 120


@pytest.fixture
async def broker(rabbitmq_server: RabbitMQServer, namespace: str) -> AsyncIterator[RabbitMQBroker]:
    broker = RabbitMQBroker(rabbitmq_server.url, lease=LEASE)
    await broker.start(namespace)
    yield broker
    await broker.stop()


@pytest.fixture
def consumer_timeout(rabbitmq_server: RabbitMQServer) -> Iterator[float]:
    """A server that takes back what its new channels hold for longer than this."""
    rabbitmq_server.control(
        "eval",
        f"application:set_env(rabbit, consumer_timeout, {TIMEOUT * 1000:.0f}), "
        "application:set_env(rabbit, channel_tick_interval, 500).",
    )
    yield TIMEOUT
    rabbitmq_server.control(
        "eval",
        "application:set_env(rabbit, consumer_timeout, 1800000), "
        "application:set_env(rabbit, channel_tick_interval, 60000).",
    )


@pytest.fixture
def known(consumer_timeout: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """The same, and it is the timeout that connections expect."""
    monkeypatch.setattr(connection, "CONSUMER_TIMEOUT", consumer_timeout)
    return consumer_timeout


async def extend_until(
    subscription: Subscription, held: list[Delivery], enough: Callable[[list[Delivery]], bool]
) -> list[Delivery]:
    """Extend as a worker does. None of the leases may be lost."""
    async with asyncio.timeout(MOST_SECONDS):
        while not enough(held):
            await asyncio.sleep(0.5)
            answers = await patient(subscription.extend, held)
            held = [answer for answer in answers if answer is not None]
            assert len(held) == len(answers)
    return held


async def hold(subscription: Subscription, broker: RabbitMQBroker, count: int) -> list[Delivery]:
    """Receive messages, and hold them until all were handed over."""
    await broker.publish([message(priority=8 + at % 2) for at in range(count)])
    held = await collect(subscription, "q", count)
    handed = await extend_until(
        subscription,
        held,
        lambda now: all(new is not old for new, old in zip(now, held, strict=True)),
    )
    assert [each.message for each in handed] == [each.message for each in held]
    return held


async def test_a_delivery_is_held_beyond_the_timeout_and_settled_by_either_fence(
    broker: RabbitMQBroker, known: float
) -> None:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    subscription = await broker.subscribe({"q": 4})
    original = await hold(subscription, broker, 4)
    newest = await extend_until(subscription, original, lambda _: loop.time() - begin > 2.5 * known)
    other = await broker.subscribe({"q": 4})
    released, retried = newest[2].message, message(attempt=2)
    settlements: list[Settlement] = [
        Ack(original[0]), Ack(newest[1]), Release(original[2]), Retry(newest[3], retried),
    ]  # fmt: skip
    outcomes = await subscription.settle(settlements)
    assert {outcome.status for outcome in outcomes} == {"unknown"}
    back = await collect(other, "q", 2)
    assert {each.count: each.message for each in back} == {2: released, 1: retried}
    await other.settle([Ack(each) for each in back])
    (repeated,) = await subscription.settle([Ack(original[0])])
    assert repeated.status == "unknown"
    (differing,) = await subscription.settle([Release(original[0])])
    assert differing.status == "refused"
    assert (await broker.depth("q")).ready == 0


async def test_what_a_dead_holder_held_is_delivered_again(
    broker: RabbitMQBroker, known: float
) -> None:
    subscription = await broker.subscribe({"q": 1})
    (held,) = await hold(subscription, broker, 1)
    assert isinstance(held.message, TaskMessage)
    other = await broker.subscribe({"q": 1})
    subscription._connection.discard("as if the process had died")  # type: ignore[attr-defined]
    (again,) = await collect(other, "q", 1)
    assert again.message == held.message
    # From 4.0 on, the server's own count survives the way back, and is added.
    assert again.count in (2, 3)
    assert await subscription.extend([held]) == [None]


async def test_an_unknown_timeout_is_learned_when_it_first_strikes(
    broker: RabbitMQBroker, consumer_timeout: float
) -> None:
    subscription = await broker.subscribe({"q": 1})
    await broker.publish([message(priority=8)])
    (lost,) = await collect(subscription, "q", 1)
    async with asyncio.timeout(MOST_SECONDS):
        while await subscription.extend([lost]) == [lost]:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
    (again,) = await collect(subscription, "q", 1)
    await subscription.settle([Ack(again)])
    await hold(subscription, broker, 1)


async def test_without_the_right_to_hand_over_nothing_else_is_lost(
    broker: RabbitMQBroker,
    known: float,
    rabbitmq_server: RabbitMQServer,
    namespace: str,
    user: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The user may not create queues. It is said once, and the lease holds as long as it can."""
    # To add a user takes so long that the broker's connection may be lost.
    await patient(broker.publish, [message()])
    limited = RabbitMQBroker(user, lease=LEASE)
    await limited.start(namespace)
    try:
        subscription = await limited.subscribe({"q": 1})
        held = await collect(subscription, "q", 1)
        with caplog.at_level(logging.WARNING, "qtasks.rabbitmq"):
            said = "takes back tasks beyond its consumer_timeout"
            await extend_until(subscription, held, lambda _: said in caplog.text)
            for _ in range(3):
                assert await subscription.extend(held) == held
        assert caplog.text.count(said) == 1
    finally:
        await limited.stop()


async def test_a_task_that_runs_longer_than_the_timeout_runs_once(
    rabbitmq_server: RabbitMQServer, namespace: str, known: float
) -> None:
    runs: list[str] = []
    broker = RabbitMQBroker(rabbitmq_server.url, lease=LEASE)
    app = QueueTasks(namespace, broker=broker, storage=MemoryStorage())

    @app.task()
    async def long() -> str:
        runs.append("run")
        await asyncio.sleep(2 * known)
        return "done"

    async with app, app.worker():
        done = await long.add_task(timeout=MOST_SECONDS)
        assert done.returning == "done"
    assert runs == ["run"]


@pytest.mark.parametrize(("version", "expected"), [((4, 2), {}), ((4, 3), 30 * 86_400_000)])
def test_a_consumer_has_its_own_timeout_where_the_server_has_them(
    version: tuple[int, ...], expected: int | dict[str, int]
) -> None:
    async def nothing(*_: object) -> None: ...

    link = Connection("amqp://localhost", "test", 1, nothing)
    link.version = version
    names = Names("app")
    lane = Lane("q", names, names.queue("q"), 1, link, RabbitMQBroker(), lambda: None)
    arguments = lane._consume_method("1").arguments  # type: ignore[attr-defined]
    assert arguments == ({"x-consumer-timeout": expected} if expected else {})
