"""The topic of the records is compacted: what is left of it, and who starts in it afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from qtasks_core import DONE, Task, TaskQuery
from qtasks_core.errors import Unavailable
from qtasks_kafka import KafkaStorage, log
from qtasks_kafka.connection import KEPT, topic_name
from qtasks_kafka.log import COMPACTED, KafkaLog
from tests.services import Service

T = TypeVar("T")
SOON = {
    **KEPT, **COMPACTED, "segment.bytes": "1048576", "segment.ms": "100",
    "min.cleanable.dirty.ratio": "0.001", "min.compaction.lag.ms": "0",
    "max.compaction.lag.ms": "1000",
}  # fmt: skip
"""Settings of a topic that is compacted as soon as the server's cleaner comes by."""


@asynccontextmanager
async def started(url: str, namespace: str, **options: Any) -> AsyncIterator[KafkaStorage]:
    storage = KafkaStorage(url, **options)
    await storage.start(namespace)
    try:
        yield storage
    finally:
        await storage.stop()


async def repeated(call: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0.1)


class Later:
    """Stands for `time`, some seconds ahead."""

    def __init__(self, ahead: float) -> None:
        self._ahead = ahead

    def time(self) -> float:
        return time.time() + self._ahead


def record(status: str, uuid: str, execution: str = "") -> Task:
    return Task(uuid=uuid, task_name="n", status=status, execution=execution)  # type: ignore[arg-type]


async def records_in(server: Service, topic: str) -> list[tuple[bytes, bool]]:
    """Return for each record of a topic its key, and whether it is a tombstone."""
    place = TopicPartition(topic, 0)
    consumer = AIOKafkaConsumer(bootstrap_servers=server.url.removeprefix("kafka://"))
    await consumer.start()
    found: list[tuple[bytes, bool]] = []
    try:
        consumer.assign([place])
        await consumer.seek_to_beginning(place)
        end = (await consumer.end_offsets([place]))[place]
        while await consumer.position(place) < end:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                found += [(record.key, record.value is None) for record in records]
    finally:
        await consumer.stop()
    return found


async def compacted(server: Service, topic: str, storage: KafkaStorage) -> None:
    """Wait until the server has compacted the tombstones that are in the topic now."""
    before = {key for key, gone in await records_in(server, topic) if gone}
    assert before
    for number in range(10_000):
        # Without a further record, the server would not begin a new segment.
        await storage.set("a further record", b"%d" % number)
        left = {key for key, gone in await records_in(server, topic) if not gone}
        if not left & before:
            return
        await asyncio.sleep(0.5)


async def test_new_topics_are_compacted(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    async with started(kafka_server.url, namespace) as storage:
        topic = topic_name(namespace, "records")
        asked = ConfigResource(ConfigResourceType.TOPIC, topic, dict.fromkeys(COMPACTED))
        (answer,) = await admin.describe_configs([asked])
        ((_, _, _, _, entries),) = answer.resources
        assert {name: value for name, value, *_ in entries} == COMPACTED
        assert storage._log.compacts
        assert any("compacted" in note for note in storage.guarantees.notes)


async def test_the_winners_are_the_same_after_compaction(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str, tmp_path: Path
) -> None:
    topic = topic_name(namespace, "records")
    url = kafka_server.url
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=SOON)])
    early = tmp_path / "early"
    async with started(url, namespace, directory=early) as kept:
        assert await kept.save([record("new", "won"), record("new", "deleted")]) == [DONE, DONE]
    async with started(url, namespace) as one, started(url, namespace) as two:
        await one.save([record("process", "won", "x"), record("process", "lost", "x")])
        await asyncio.gather(
            one.save([record("success", "won", "x"), record("success", "lost", "x")]),
            two.save([record("cancel", "won"), record("error", "lost", "y")]),
        )
        (won, lost) = await one.get(["won", "lost"])
        assert await two.delete(["deleted"]) == 1
        for number in range(5):
            assert await one.set("value", b"%d" % number)
        assert await one.claim("claim", "one", 600.0) is not None
        assert await two.claim("claim", "two", 600.0) is None
    async with started(url, namespace) as writing:
        await compacted(kafka_server, topic, writing)
    left = [key for key, gone in await records_in(kafka_server, topic) if not gone]
    assert len([key for key in left if key.startswith(b"won\n")]) == 1
    assert not [key for key in left if key.startswith(b"deleted\n")]
    # One starts with nothing, one with what it kept from before.
    for options in ({}, {"directory": early}):
        async with started(url, namespace, **options) as late:
            assert await late.get(["won", "lost", "deleted"]) == [won, lost, None]
            assert (await late.values("value")) == {"value": b"4"}
            assert await late.claim("claim", "two", 600.0) is None
            assert await late.claim("claim", "one", 600.0) is not None
            again = await late.save([record("success", "won", "z"), record("cancel", "lost")])
            assert [outcome.current for outcome in again] == [won, lost]
            assert len((await late.query(TaskQuery())).tasks) == 2


async def test_a_file_from_before_the_tombstones_were_forgotten_is_thrown_away(
    kafka_server: Service, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(kafka_server.url, namespace, directory=tmp_path) as storage:
        await storage.save([record("success", "u")])
        position = storage._log.position
    late = KafkaLog(kafka_server.url)
    await late.start(namespace)
    try:
        assert await late.seek(position)
        monkeypatch.setattr(log, "time", Later(24 * 3600.0))
        assert not await late.seek(position)
    finally:
        await late.stop()


async def test_a_process_that_was_frozen_reads_the_log_anew(
    kafka_server: Service, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had not read may be compacted by now."""
    async with started(kafka_server.url, namespace) as storage:
        await storage.save([record("success", "u")])
        seeks: list[bytes | None] = []
        seek = storage._log.seek

        async def counted(position: bytes | None) -> bool:
            seeks.append(position)
            return await seek(position)

        monkeypatch.setattr(storage._log, "seek", counted)
        monkeypatch.setattr(log, "time", Later(3600.0))
        while not seeks:
            await repeated(lambda: storage.get(["u"]))
            await asyncio.sleep(0.05)
        assert await repeated(lambda: storage.get(["u"])) == [record("success", "u")]


async def test_a_topic_that_is_not_compacted_gets_no_tombstones(
    kafka_server: Service,
    admin: AIOKafkaAdminClient,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    topic = topic_name(namespace, "records")
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=dict(KEPT))])
    async with started(kafka_server.url, namespace) as storage:
        await storage.save([record("new", "u"), record("success", "u")])
        assert await storage.delete(["u"]) == 1
    assert not any(gone for _, gone in await records_in(kafka_server, topic))
    assert any("grows for ever" in entry.message for entry in caplog.records)
