"""What costs one queue its channel costs no other; what fails on the way strands nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from qtasks_core import DONE, Ack, Delivery, Subscription
from qtasks_core.errors import Unavailable
from qtasks_core.wire import encode_message
from qtasks_log import Entry
from qtasks_rabbitmq import RabbitMQBroker, RabbitMQLog
from qtasks_rabbitmq.channel import Channel
from qtasks_rabbitmq.subscription import RabbitMQSubscription
from qtasks_rabbitmq.topology import Names
from tests.rabbitmq.operator import HEADERS, long_text, operator, publish_raw, table
from tests.rabbitmq.test_broker import collect, message, uuids
from tests.services import Service
from tests.services.rabbitmq import RabbitMQServer


async def test_a_deleted_queue_costs_no_other_what_it_holds(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    subscription = await broker.subscribe({"q": 5, "other": 5})
    await broker.publish([message("q"), message("other")])
    await collect(subscription, "q", 1)
    held = await collect(subscription, "other", 1)
    receiving = asyncio.create_task(collect(subscription, "other", 1))
    async with operator(rabbitmq_server.url) as channel:
        await channel.queue_delete(Names(namespace).queue("q"))
    await broker.publish([message("other")])
    (another,) = await receiving
    assert another.count == 1
    assert await subscription.extend(held) == held
    await broker.publish([message("q")])
    assert len(await collect(subscription, "q", 1)) == 1


@pytest.fixture
def short_timeout(rabbitmq_server: RabbitMQServer) -> Iterator[None]:
    """A server whose new channels wait two seconds for an acknowledgement."""
    rabbitmq_server.control(
        "eval",
        "application:set_env(rabbit, consumer_timeout, 2000), "
        "application:set_env(rabbit, channel_tick_interval, 500).",
    )
    yield
    rabbitmq_server.control(
        "eval",
        "application:set_env(rabbit, consumer_timeout, 1800000), "
        "application:set_env(rabbit, channel_tick_interval, 60000).",
    )


async def test_a_task_beyond_the_servers_timeout_costs_no_other_queue(
    broker: RabbitMQBroker, short_timeout: None
) -> None:
    subscription = await broker.subscribe({"q": 5, "other": 5})
    await broker.publish([message("q")])
    slow = await collect(subscription, "q", 1)
    async with asyncio.timeout(60):
        # Until the server has taken it back, or it was handed over in time: an earlier test of this
        # process may have learned the timeout.
        while (left := await subscription.extend(slow)) == slow:
            await broker.publish([message("other")])
            held = await collect(subscription, "other", 1)
            assert held[0].count == 1
            (kept,) = await subscription.extend(held)
            assert kept is not None
            await subscription.settle([Ack(kept)])
    if left == [None]:
        assert await collect(subscription, "q", 1)


class Failing:
    """Makes the write of that number fail, of all that any channel writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.failed = False
        write = Channel._write

        async def failing(channel: Channel, payload: bytes) -> None:
            if self.left == 0:
                self.failed = True
                self.left = -1
                raise Unavailable("injected")
            self.left -= 1
            await write(channel, payload)

        monkeypatch.setattr(Channel, "_write", failing)


async def patient(call: Callable[..., Awaitable[Any]], *arguments: object) -> Any:
    """Call until it succeeds, as the engine does."""
    while True:
        try:
            return await call(*arguments)
        except Unavailable:
            await asyncio.sleep(0)


async def put(broker: RabbitMQBroker, url: str, namespace: str) -> set[str]:
    """Fill a queue with what is handed over, and what is sent on first."""
    plain = [message("q") for _ in range(3)]
    await broker.publish(plain)
    early = message("q")
    async with operator(url) as channel:
        await publish_raw(
            channel,
            Names(namespace).queue("q").encode(),
            encode_message(early),
            HEADERS,
            table(b"qtasks-rest", long_text(b"1")),
        )
    return {m.uuid for m in [*plain, early]}


async def drain(subscription: Subscription, expected: set[str]) -> None:
    """Receive and settle until every uuid has come. Raises `TimeoutError`."""
    seen: set[str] = set()
    async with asyncio.timeout(120):
        while not expected <= seen:
            deliveries: list[Delivery] = await patient(subscription.receive, {"q": 3}, 3)
            seen |= uuids(deliveries)
            await patient(subscription.settle, [Ack(each) for each in deliveries])


async def test_an_error_at_any_write_strands_nothing(
    broker: RabbitMQBroker,
    rabbitmq_server: Service,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All comes, by the consumers that receive opens or by those it opens when called again."""
    failing = Failing(monkeypatch)
    await broker.publish([message("q", delay=0.01)])
    subscription = await broker.subscribe({"q": 3})
    (first,) = await collect(subscription, "q", 1)
    await subscription.settle([Ack(first)])
    await subscription.close()
    for number in range(200):
        subscription = await broker.subscribe({"q": 3})
        assert isinstance(subscription, RabbitMQSubscription)
        expected = await put(broker, rabbitmq_server.url, namespace)
        failing.failed, failing.left = False, number
        await drain(subscription, expected)
        failed, failing.left = failing.failed, -1
        # What came twice may wait to be received; nothing is held that nobody knows of.
        lane = subscription._by_source[Names(namespace).queue("q")]
        waiting = {delivery.fence[1] for delivery, _ in lane.ready}
        assert set(lane.held) <= waiting | set(lane._early)
        await subscription.close()
        if not failed:
            break
    assert number > 5


async def test_an_error_at_any_write_of_a_declaration_is_an_outage(
    broker: RabbitMQBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a queue that is not there yet: the channels on which it is declared cannot be opened."""
    failing = Failing(monkeypatch)
    for number in range(200):
        queue = f"q{number}"
        failing.failed, failing.left = False, number
        try:
            await broker.publish([message(queue)])
        except Unavailable:
            assert failing.failed
        failed, failing.left = failing.failed, -1
        assert await patient(broker.publish, [message(queue)]) == [DONE]
        if not failed:
            break
    assert number > 2


async def test_a_cancelled_receive_strands_nothing(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    """Cancelled at each of its suspensions, one after the other."""
    subscription = await broker.subscribe({"q": 3})
    await broker.publish([message("q", delay=0.01)])
    (first,) = await collect(subscription, "q", 1)
    await subscription.settle([Ack(first)])
    for steps in range(12):
        expected = await put(broker, rabbitmq_server.url, namespace)
        receiving = asyncio.create_task(subscription.receive({"q": 3}, 3))
        for _ in range(steps):
            await asyncio.sleep(0)
        receiving.cancel()
        await asyncio.wait({receiving})
        if not receiving.cancelled():
            deliveries = receiving.result()
            expected -= uuids(deliveries)
            await subscription.settle([Ack(each) for each in deliveries])
        await drain(subscription, expected)


@pytest.mark.parametrize("how", ["error", "cancellation"])
async def test_the_log_reader_skips_nothing(
    rabbitmq_server: Service, namespace: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    writer, reader = RabbitMQLog(rabbitmq_server.url), RabbitMQLog(rabbitmq_server.url)
    await writer.start(namespace)
    await reader.start(namespace)
    failing = Failing(monkeypatch)
    seen: list[str] = []
    written: list[str] = []
    try:
        for number in range(15):
            keys = [f"{number}.{at}" for at in range(20)]
            await writer.append([Entry("p", key, b"") for key in keys])
            written += keys
            if how == "error":
                failing.left = number
            async with asyncio.timeout(120):
                while len(seen) < len(written):
                    reading = asyncio.create_task(reader.read())
                    if how == "cancellation" and number:
                        for _ in range(number):
                            await asyncio.sleep(0)
                        reading.cancel()
                        number = 0
                    await asyncio.wait({reading})
                    if not reading.cancelled() and reading.exception() is None:
                        seen += [entry.key for entry in reading.result()]
            failing.left = -1
        assert seen == written
    finally:
        await writer.stop()
        await reader.stop()
