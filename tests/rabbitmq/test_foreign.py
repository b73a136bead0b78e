"""What others put into the queues and the stream: each is one dead letter and stops nobody."""

from __future__ import annotations

import asyncio
import struct

from qtasks_core import Ack, Raw, Task
from qtasks_rabbitmq import RabbitMQBroker, RabbitMQStorage
from qtasks_rabbitmq.topology import Names
from tests.rabbitmq.operator import (
    APP_ID,
    HEADERS,
    TIMESTAMP,
    long_text,
    operator,
    publish_raw,
    table,
    text,
)
from tests.rabbitmq.test_broker import collect, message
from tests.services import Service

NESTED = b"A" + struct.pack(">I", 0)
for _ in range(3000):
    NESTED = b"A" + struct.pack(">I", len(NESTED)) + NESTED

ODD = {
    "a text in Latin-1": (APP_ID, text(b"caf\xe9")),
    "microseconds": (TIMESTAMP, struct.pack(">q", 1_700_000_000_000_000)),
    "before 1970": (TIMESTAMP, struct.pack(">q", -86_400)),
    "a header's name in Latin-1": (HEADERS, table(b"caf\xe9", b"t\1")),
    "a time as header": (HEADERS, table(b"at", b"T" + struct.pack(">q", -1))),
    "deep nesting": (HEADERS, table(b"deep", NESTED)),
    "a rest that is no number": (HEADERS, table(b"qtasks-rest", long_text("²".encode()))),
    "a rest of centuries": (HEADERS, table(b"qtasks-rest", long_text(b"9" * 19))),
    "a rest of 5,000 digits": (HEADERS, table(b"qtasks-rest", long_text(b"9" * 5000))),
    "a count that is no number": (HEADERS, table(b"qtasks-count", long_text("²".encode()))),
}


async def test_odd_properties_are_one_dead_letter(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    """Each comes once, raw; what another queue holds stays held, and work goes on."""
    subscription = await broker.subscribe({"q": 50, "other": 5})
    await broker.publish([message("other")])
    held = await collect(subscription, "other", 1)
    queue = Names(namespace).queue("q").encode()
    async with operator(rabbitmq_server.url) as channel:
        for odd, (flags, properties) in ODD.items():
            await publish_raw(channel, queue, odd.encode(), flags, properties)
    await broker.publish([message("q")])
    deliveries = await collect(subscription, "q", len(ODD) + 1)
    raw = [d.message for d in deliveries if isinstance(d.message, Raw)]
    assert [message.data.decode() for message in raw] == list(ODD)
    assert all(message.error for message in raw)
    await subscription.settle([Ack(delivery) for delivery in deliveries])
    assert await subscription.extend(held) == held


async def test_a_routing_key_in_latin_1_stops_nobody(
    broker: RabbitMQBroker, rabbitmq_server: Service, namespace: str
) -> None:
    """It names the queue no more when another exchange led there."""
    subscription = await broker.subscribe({"q": 5})
    async with operator(rabbitmq_server.url) as channel:
        await channel.queue_bind(Names(namespace).queue("q"), "amq.fanout")
        await publish_raw(channel, b"caf\xe9", b"foreign", 0, b"", exchange=b"amq.fanout")
    (delivery,) = await collect(subscription, "q", 1)
    assert isinstance(delivery.message, Raw)


async def test_odd_properties_in_the_stream_stop_no_process(
    rabbitmq_server: Service, namespace: str
) -> None:
    writer, reader = (RabbitMQStorage(rabbitmq_server.url) for _ in range(2))
    await writer.start(namespace)
    try:
        async with operator(rabbitmq_server.url) as channel:
            stream = Names(namespace).log.encode()
            for flags, properties in ODD.values():
                await publish_raw(channel, stream, b"foreign", flags, properties)
        async with asyncio.timeout(120):
            (outcome,) = await writer.save([Task(uuid="u", task_name="t", status="success")])
            assert outcome.status == "done"
            await reader.start(namespace)
            (record,) = await reader.get(["u"])
            assert record is not None
    finally:
        await writer.stop()
        await reader.stop()
