"""What only RabbitMQ can get wrong: the ladder, prefetch, deleted queues, bulk acknowledgement."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterable

import pytest
from uuid_utils import uuid7

from qtasks_core import Ack, Delivery, Release, Subscription, TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_rabbitmq import RabbitMQBackend, RabbitMQBroker, delays
from tests.services import Service


def message(queue: str = "q", **fields: object) -> TaskMessage:
    return TaskMessage(**{"uuid": str(uuid7()), "task_name": "t", "queue": queue, **fields})  # type: ignore[arg-type]


async def collect(subscription: Subscription, queue: str, count: int) -> list[Delivery]:
    deliveries: list[Delivery] = []
    async with asyncio.timeout(60):
        while len(deliveries) < count:
            missing = count - len(deliveries)
            deliveries += await subscription.receive({queue: missing}, missing)
    return deliveries


def uuids(deliveries: Iterable[Delivery]) -> set[str]:
    return {d.message.uuid for d in deliveries if isinstance(d.message, TaskMessage)}


@pytest.fixture
async def broker(rabbitmq_server: Service) -> AsyncIterator[RabbitMQBroker]:
    broker = RabbitMQBroker(rabbitmq_server.url)
    await broker.start(f"test{uuid7().hex}")
    yield broker
    await broker.stop()


@pytest.mark.parametrize("delay", [0.001, 0.1, 1.0, 3.7, 86_400.0, 30 * 86_400.0])
def test_a_route_waits_at_least_the_delay_and_little_more(delay: float) -> None:
    top, headers = delays.route(delay)
    levels = [top] + [k for k in range(top) if headers[f"qtasks-{k}"]]
    waits = sum(2**level * delays.UNIT for level in levels)
    assert delay < waits < delay + 0.2
    assert not delays.rest_of(headers)


def test_a_delay_beyond_the_ladder_carries_its_rest() -> None:
    delay = 400 * 86_400.0
    top, headers = delays.route(delay)
    ladder = (2**delays.LEVELS - 1) * delays.UNIT
    assert top == delays.LEVELS - 1
    assert delay < ladder + delays.rest_of(headers) < delay + 0.2


async def test_a_delay_beyond_the_ladder_is_honoured(
    broker: RabbitMQBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of a ladder of 0.7 s a message enters again until its 2.5 s have passed."""
    monkeypatch.setattr(delays, "LEVELS", 3)
    monkeypatch.setattr(delays, "FIRST_LEVELS", 3)
    subscription = await broker.subscribe({"q": 5})
    await broker.publish([message(delay=0.01)])
    await collect(subscription, "q", 1)
    loop = asyncio.get_running_loop()
    before = loop.time()
    await broker.publish([message(delay=2.5)])
    (delivery,) = await collect(subscription, "q", 1)
    assert 2.5 <= loop.time() - before <= 4.5
    assert delivery.count == 1


async def test_what_nobody_takes_goes_to_others_uncounted(broker: RabbitMQBroker) -> None:
    """A receiver that asked for three and took one does not keep the others from the rest."""
    holder, other = [await broker.subscribe({"q": 5}) for _ in range(2)]
    await broker.publish([message() for _ in range(3)])
    held = await holder.receive({"q": 3}, 1)
    taken = await collect(other, "q", 2)
    assert [delivery.count for delivery in taken] == [1, 1]
    assert await holder.extend(held) == held


async def test_a_deleted_queue_is_made_again(
    broker: RabbitMQBroker, rabbitmq_server: Service
) -> None:
    import aiormq

    subscription = await broker.subscribe({"q": 5})
    await broker.publish([message()])
    connection = await aiormq.connect(rabbitmq_server.url)
    assert broker._names is not None
    await (await connection.channel()).queue_delete(broker._names.queue("q"))
    await connection.close()
    (outcome,) = await broker.publish([message()])
    assert outcome.status == "done"
    async with asyncio.timeout(60):
        while True:
            try:
                deliveries = await subscription.receive({"q": 5}, 5)
            except Unavailable:
                continue
            break
    assert len(deliveries) == 1


async def test_acknowledging_in_bulk_covers_nothing_unfinished(broker: RabbitMQBroker) -> None:
    """All but every seventh of 100 are acknowledged; exactly the others come back."""
    subscription = await broker.subscribe({"q": 100})
    await broker.publish([message() for _ in range(100)])
    deliveries = await collect(subscription, "q", 100)
    kept = {id(delivery): delivery for delivery in deliveries[3::7]}
    done = [delivery for delivery in deliveries if id(delivery) not in kept]
    await subscription.settle([Ack(delivery) for delivery in done[40:]])
    await subscription.settle([Ack(delivery) for delivery in done[:40]])
    await subscription.settle([Release(delivery) for delivery in kept.values()])
    again = await collect(subscription, "q", len(kept))
    assert uuids(again) == uuids(kept.values())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await subscription.receive({"q": 1}, 1)


SETTLE_AND_DIE = """
import asyncio, os, signal, sys
from qtasks_core import Ack
from qtasks_rabbitmq import RabbitMQBroker

async def main():
    broker = RabbitMQBroker(sys.argv[1])
    await broker.start(sys.argv[2])
    subscription = await broker.subscribe({"q": 20})
    held = []
    while len(held) < 5:
        held += await subscription.receive({"q": 5 - len(held)}, 5)
    await subscription.settle([Ack(delivery) for delivery in held])
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_what_was_settled_stays_settled_when_its_process_is_killed(
    broker: RabbitMQBroker, rabbitmq_server: Service
) -> None:
    """When `settle` has returned, the acknowledgements are no longer in the dying process."""
    assert broker._names is not None
    namespace = broker._names.due.split(":")[1]
    await broker.publish([message() for _ in range(5)])
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SETTLE_AND_DIE, rabbitmq_server.url, namespace
    )
    async with asyncio.timeout(120):
        assert await child.wait() == -signal.SIGKILL
    subscription = await broker.subscribe({"q": 5})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await subscription.receive({"q": 5}, 5)


async def test_a_frozen_server_is_unreachable_and_takes_nothing(
    broker: RabbitMQBroker, rabbitmq_server: Service
) -> None:
    """Calls give up within seconds; what was held is still held when it goes on."""
    subscription = await broker.subscribe({"q": 5})
    await broker.publish([message()])
    held = await collect(subscription, "q", 1)
    rabbitmq_server.freeze()
    try:
        for call in (broker.publish([message()]), subscription.extend(held)):
            with pytest.raises(Unavailable):
                async with asyncio.timeout(8):
                    await call
    finally:
        rabbitmq_server.thaw()
    assert await subscription.extend(held) == held
    (outcome,) = await broker.publish([message()])
    assert outcome.status == "done"


def test_the_lease_comes_from_the_url() -> None:
    backend = RabbitMQBackend()
    assert backend.broker("amqp://localhost/?lease=12.5").guarantees.lease == 12.5
    backend.storage("amqp://localhost/?lease=12.5")
    with pytest.raises(ConfigurationError, match="from 3 to"):
        backend.broker("amqp://localhost/?lease=2")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("guest:guest@", "guest:wrong-secret@", "user or password"),
        ("/", "/nowhere", "virtual host"),
    ],
)
async def test_what_is_set_up_wrongly_is_said(
    rabbitmq_server: Service, old: str, new: str, what: str
) -> None:
    head, _, tail = rabbitmq_server.url.rpartition(old)
    broker = RabbitMQBroker(head + new + tail)
    with pytest.raises(ConfigurationError, match=what) as caught:
        await broker.start("test")
    assert "secret" not in str(caught.value)
    await broker.stop()
