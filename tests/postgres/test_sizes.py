"""What is too large is refused by itself; what is large has the time that it takes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from qtasks_core import Task, TaskMessage
from qtasks_postgres import PostgresBroker, PostgresStorage
from qtasks_postgres.batches import LARGEST
from tests.services import Service

LARGE = bytes(LARGEST - 4096)
TOO_LARGE = bytes(LARGEST + 1)


@pytest.fixture
async def parts(postgres_server: Service) -> AsyncIterator[tuple[PostgresBroker, PostgresStorage]]:
    namespace = str(uuid4())
    broker, storage = PostgresBroker(postgres_server.url), PostgresStorage(postgres_server.url)
    await broker.start(namespace)
    await storage.start(namespace)
    yield broker, storage
    await broker.stop()
    await storage.stop()


def record(uuid: str, status: str, returning: bytes = b"") -> Task:
    return Task(uuid=uuid, task_name="tests:task", status=status, returning=returning)  # type: ignore[arg-type]


async def test_records(parts: tuple[PostgresBroker, PostgresStorage]) -> None:
    _, storage = parts
    uuids = [str(uuid4()) for _ in range(4)]
    await storage.save([record(uuid, "new") for uuid in uuids])
    ends = [record(uuid, "success") for uuid in uuids]
    ends[1] = record(uuids[1], "success", LARGE)
    ends[2] = record(uuids[2], "success", TOO_LARGE)
    outcomes = await storage.save(ends)
    assert [outcome.status for outcome in outcomes] == ["done", "done", "refused", "done"]
    assert outcomes[2].current is None
    assert "64 MiB" in outcomes[2].reason
    found = await storage.get(uuids)
    assert [task.status for task in found if task] == ["success", "success", "new", "success"]
    assert found[1] == ends[1]
    # What is there already refuses it as it does any other.
    (outcome,) = await storage.save([record(uuids[0], "error", TOO_LARGE)])
    assert (outcome.status, outcome.current) == ("refused", found[0])


async def test_messages(parts: tuple[PostgresBroker, PostgresStorage]) -> None:
    broker, _ = parts
    sent = [
        TaskMessage(uuid=str(uuid4()), task_name="tests:task", args=args)
        for args in (b"", TOO_LARGE, LARGE, b"")
    ]
    outcomes = await broker.publish(sent)
    assert [outcome.status for outcome in outcomes] == ["done", "refused", "done", "done"]
    subscription = await broker.subscribe({"default": 10})
    received: list[object] = []
    while len(received) < 3:
        received += [d.message for d in await subscription.receive({"default": 10}, 10)]
    assert received == [sent[0], sent[2], sent[3]]
