"""Errors, lost answers and cancels at any await of a receiver strand no message and no record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from qtasks_core import DONE, Ack, Delivery, Task, TaskMessage
from qtasks_core.errors import Unavailable
from qtasks_postgres import PostgresBroker, PostgresStorage
from qtasks_postgres.inbox import PostgresInbox
from tests.services import Service

PATIENCE = 60.0
STEPS = 8
"""So many calls of the driver go well before the fault."""

FAULTS = ("before", "after", "cancel before", "cancel after")


class Driver:
    """Stands in the way of asyncpg's calls: one of them goes wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        self.fault = ""
        self.cancel: Callable[[], object] | None = None
        for name in ("fetch", "fetchval", "add_listener"):
            self._stand_before(name, monkeypatch)

    def _stand_before(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        call = getattr(asyncpg.Connection, name)

        async def stood(connection: asyncpg.Connection, *args: Any, **more: Any) -> Any:
            due = self.left == 0
            if self.left is not None:
                self.left -= 1
            if due and self.fault == "before":
                raise asyncpg.ConnectionDoesNotExistError("injected before")
            if due and self.fault == "cancel before" and self.cancel:
                self.cancel()
            result = await call(connection, *args, **more)
            if due and self.fault == "after":
                raise asyncpg.ConnectionDoesNotExistError("injected after")
            if due and self.fault == "cancel after" and self.cancel:
                self.cancel()
            return result

        monkeypatch.setattr(asyncpg.Connection, name, stood)

    def plan(self, step: int, fault: str) -> None:
        self.left, self.fault = step, fault

    async def tried(self, call: Callable[[], Any]) -> Any:
        """Return what the call returns, or None where the fault hit it."""
        task = asyncio.ensure_future(call())
        self.cancel = task.cancel
        try:
            return await asyncio.wait_for(asyncio.shield(task), PATIENCE)
        except (Unavailable, asyncio.CancelledError):
            return None


def uuids_of(deliveries: Sequence[Delivery]) -> set[str]:
    return {d.message.uuid for d in deliveries if isinstance(d.message, TaskMessage)}


@pytest.mark.parametrize("fault", FAULTS)
async def test_receivers(
    postgres_server: Service, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broker = PostgresBroker(postgres_server.url, lease=1.0)
    namespace = str(uuid4())
    await broker.start(namespace)
    driver = Driver(monkeypatch)
    sent: set[str] = set()
    settled: set[str] = set()
    subscription = await broker.subscribe({"default": 10})
    for step in range(STEPS):
        messages = [TaskMessage(uuid=str(uuid4()), task_name="tests:task") for _ in range(5)]
        await broker.publish(messages)
        sent |= {message.uuid for message in messages}
        driver.plan(step, fault)
        for wanted in (3, 10):
            receive = partial(subscription.receive, {"default": wanted}, wanted)
            deliveries = await driver.tried(receive) or []
            held = await driver.tried(partial(subscription.extend, deliveries)) or []
            acks = [Ack(delivery) for delivery in held if delivery]
            # It may have had its effect though no answer came.
            settled |= uuids_of([ack.delivery for ack in acks])
            await driver.tried(partial(subscription.settle, acks))
    driver.left = None
    # What was not settled comes again, at the latest once its lease is over.
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                async with asyncio.timeout(2.5):
                    deliveries = await subscription.receive({"default": 10}, 10)
            except TimeoutError:
                break
            await subscription.settle([Ack(delivery) for delivery in deliveries])
            settled |= uuids_of(deliveries)
    connection = await asyncpg.connect(postgres_server.url)
    left = await connection.fetchval(
        "SELECT count(*) FROM qtasks.messages WHERE namespace = $1", namespace
    )
    await connection.close()
    assert left == 0
    assert settled == sent
    await broker.stop()


@pytest.mark.parametrize("fault", FAULTS)
async def test_inboxes(
    postgres_server: Service, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    storage, other = PostgresStorage(postgres_server.url), PostgresStorage(postgres_server.url)
    namespace = str(uuid4())
    await storage.start(namespace)
    await other.start(namespace)
    inbox = await storage.inbox()
    driver = Driver(monkeypatch)
    expected: set[str] = set()
    told: set[str] = set()

    async def hear() -> None:
        told.update(task.uuid for task in await inbox.receive())

    for step in range(STEPS):
        large = b"x" * 9000 * (step % 2)  # too large for a notification: it is read
        pushed, watched = str(uuid4()), str(uuid4())
        expected |= {pushed, watched}
        inbox.expect([pushed])
        driver.plan(step, fault)
        await driver.tried(partial(inbox.watch, [watched]))
        driver.left = None
        await inbox.watch([watched])
        await other.save(
            [
                Task(
                    uuid=uuid, task_name="tests:task", status="success", returning=large,
                    reply_to=inbox.address if uuid == pushed else None,
                )
                for uuid in (pushed, watched)
            ]
        )  # fmt: skip
        driver.plan(step, fault)
        await driver.tried(hear)
    driver.left = None
    async with asyncio.timeout(PATIENCE):
        while not expected <= told:
            await hear()
    await storage.stop()
    await other.stop()


async def test_a_record_that_is_saved_again_is_pushed(
    postgres_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first save has committed and got no answer, so it was not pushed."""
    monkeypatch.setattr(PostgresInbox, "HEARTBEAT", 10 * PATIENCE)
    storage, other = PostgresStorage(postgres_server.url), PostgresStorage(postgres_server.url)
    namespace = str(uuid4())
    await storage.start(namespace)
    await other.start(namespace)
    inbox = await storage.inbox()
    task = Task(
        uuid=str(uuid4()), task_name="tests:task", status="success", execution="this",
        reply_to=inbox.address,
    )  # fmt: skip
    inbox.expect([task.uuid])
    driver = Driver(monkeypatch)
    await other.get([task.uuid])
    driver.plan(0, "after")
    assert await driver.tried(partial(other.save, [task])) is None
    driver.left = None
    assert await other.get([task.uuid]) == [task]
    assert await other.save([task]) == [DONE]
    async with asyncio.timeout(PATIENCE):
        assert await inbox.receive() == [task]
    await storage.stop()
    await other.stop()
