"""The topic of the records changes under those who use it: it grows, or is made anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from qtasks_core import DONE, Outcome, Task
from qtasks_core.errors import Unavailable
from qtasks_kafka import KafkaStorage
from qtasks_kafka.connection import topic_name
from tests.services import Service

UUIDS = [f"u{number}" for number in range(20)]


def record(uuid: str, execution: str = "x") -> Task:
    return Task(uuid=uuid, task_name="n", status="success", execution=execution)


@asynccontextmanager
async def started(url: str, namespace: str, partitions: int = 2) -> AsyncIterator[KafkaStorage]:
    storage = KafkaStorage(url, partitions=partitions)
    await storage.start(namespace)
    try:
        yield storage
    finally:
        await storage.stop()


async def saved(storage: KafkaStorage, tasks: list[Task]) -> list[Outcome]:
    """Save as the engine does: again while the storage is out of reach."""
    while True:
        try:
            return await storage.save(tasks)
        except Unavailable:
            await asyncio.sleep(0.1)


async def read(storage: KafkaStorage, uuids: list[str]) -> list[Task | None]:
    while True:
        try:
            return await storage.get(uuids)
        except Unavailable:
            await asyncio.sleep(0.1)


async def test_a_topic_that_grows_is_one_log_for_all(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    topic = topic_name(namespace, "records")
    async with started(kafka_server.url, namespace) as old:
        assert set(await old.save([record(uuid) for uuid in UUIDS])) == {DONE}
        await admin.create_partitions({topic: NewPartitions(6)})
        async with started(kafka_server.url, namespace) as new:
            assert await new.get(UUIDS) == [record(uuid) for uuid in UUIDS]
            # All of these are final already, whoever asks.
            for storage in (old, new):
                again = await storage.save([record(uuid, "y") for uuid in UUIDS])
                assert {outcome.status for outcome in again} == {"refused"}
            more = [f"more{uuid}" for uuid in UUIDS]
            assert set(await new.save([record(uuid) for uuid in more])) == {DONE}
            assert await old.get(more) == [record(uuid) for uuid in more]
            assert await new.get(more) == [record(uuid) for uuid in more]


async def test_a_topic_made_anew_is_used_without_a_restart(
    kafka_server: Service, admin: AIOKafkaAdminClient, namespace: str
) -> None:
    """By an operator who gives it more partitions, while one waits for a result and one writes."""
    topic = topic_name(namespace, "records")
    async with (
        started(kafka_server.url, namespace) as waiting,
        started(kafka_server.url, namespace) as writing,
    ):
        assert set(await writing.save([record(uuid) for uuid in UUIDS])) == {DONE}
        inbox = await waiting.inbox()
        await inbox.watch(["result"])
        await admin.delete_topics([topic])
        while True:
            answer = await admin.create_topics([NewTopic(topic, 3, 1)])
            if answer.topic_errors[0][1] == 0:
                break
            # Still being deleted; or a driver's question has made it, with one partition.
            await admin.delete_topics([topic])
            await asyncio.sleep(0.1)
        arrived = asyncio.create_task(inbox.receive())
        assert await saved(writing, [record("result")]) == [DONE]
        while not arrived.done() or isinstance(arrived.exception(), Unavailable):
            await asyncio.wait({arrived}, timeout=0.1)
            if arrived.done() and arrived.exception() is not None:
                arrived = asyncio.create_task(inbox.receive())
        assert [task.uuid for task in arrived.result()] == ["result"]
        for storage in (waiting, writing):
            assert await read(storage, ["result"]) == [record("result")]
        async with started(kafka_server.url, namespace) as late:
            assert await late.get(["result", "u0"]) == [record("result"), None]
