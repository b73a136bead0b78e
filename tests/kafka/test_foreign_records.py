"""What another program wrote into the log, or how a broker packed it, stops nobody."""

from __future__ import annotations

import sys

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from qtasks_core import DONE, Task
from qtasks_core.errors import ConfigurationError
from qtasks_kafka import KafkaStorage
from qtasks_kafka.connection import KEPT, topic_name
from tests.services import Service

RECORD = Task(uuid="u", task_name="n", status="success", returning=b"x" * 2000)
FOREIGN: list[tuple[bytes | None, bytes | None]] = [
    (None, b"no key"),
    (None, b""),
    (b"", b"\x01\xc1"),
    (b"no line", None),
    (b"\xff\xfe\n\xff", b"\x01\x90"),
    (b"u\n", None),
    (b"\nlayout", b"{}"),
    (b"\nlayout", None),
    (b"\nlayout", b'{"partitions": 0, "id": "x"}'),
    (b"u\nforeign", b"\x01\x83\xa4uuid\xa1u\xa9task_name\xa1n\xa6status\xa4gone"),
]


async def put(server: Service, topic: str) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=server.url.removeprefix("kafka://"))
    await producer.start()
    try:
        for partition in (0, 1):
            for key, value in FOREIGN:
                await producer.send_and_wait(
                    topic, value, key, partition, headers=[("h", b"\xff"), ("h", b"")]
                )
    finally:
        await producer.stop()


@pytest.mark.parametrize("first", [True, False])
async def test_foreign_records_stop_nobody(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str, first: bool
) -> None:
    topic = topic_name(namespace, "records")
    await admin.create_topics([NewTopic(topic, 2, 1, topic_configs=dict(KEPT))])
    storage = KafkaStorage(kafka_server.url)
    if first:
        await put(kafka_server, topic)
    await storage.start(namespace)
    try:
        if not first:
            await put(kafka_server, topic)
        assert await storage.save([RECORD]) == [DONE]
        other = KafkaStorage(kafka_server.url)
        await other.start(namespace)
        try:
            assert await other.get(["u"]) == [RECORD]
        finally:
            await other.stop()
    finally:
        await storage.stop()


@pytest.mark.parametrize("codec", ["zstd", "lz4", "snappy", "gzip"])
async def test_records_that_the_server_compresses(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str, codec: str
) -> None:
    topic = topic_name(namespace, "records")
    configs = {**KEPT, "compression.type": codec}
    await admin.create_topics([NewTopic(topic, 2, 1, topic_configs=configs)])
    storage = KafkaStorage(kafka_server.url)
    await storage.start(namespace)
    try:
        assert await storage.save([RECORD]) == [DONE]
        assert await storage.get(["u"]) == [RECORD]
    finally:
        await storage.stop()


async def test_a_missing_codec_is_named(
    kafka_server: Service,
    admin: AIOKafkaAdminClient,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import aiokafka.codec

    topic = topic_name(namespace, "records")
    configs = {**KEPT, "compression.type": "zstd"}
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=configs)])
    storage = KafkaStorage(kafka_server.url)
    # As where the package is not installed.
    monkeypatch.setattr(aiokafka.codec, "cramjam", None)
    monkeypatch.setitem(sys.modules, "cramjam", None)
    with pytest.raises(ConfigurationError, match="cramjam"):
        await storage.start(namespace)
