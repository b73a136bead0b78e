"""Enqueuing in a transaction of Postgres, and carrying the messages on to another broker."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from qtasks import control
from qtasks.asyncio import QueueTasks
from qtasks_core import DONE, Ack, Broker, Delivery, Outcome, TaskMessage, TaskQuery
from qtasks_core.errors import ConfigurationError, NotSupported, Unavailable
from qtasks_core.lookup import resolve_broker
from qtasks_memory import MemoryBroker
from qtasks_postgres import OutboxBroker
from tests.docs.test_code_blocks import blocks_of
from tests.processes import PATIENCE, ROOT, Process
from tests.services import Service

LEASE = 2.0
MANY = 500


class Fallible(MemoryBroker):
    """A broker that can be away, lose an answer, or refuse."""

    away = False
    loses_answers = False
    refuses: Sequence[str] = ()
    forbids: Sequence[str] = ()
    hangs = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.called = asyncio.Event()

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        self.called.set()
        if self.hangs:
            await asyncio.Event().wait()
        if any(message.uuid in self.forbids for message in messages):
            raise ConfigurationError("this queue is forbidden")
        if self.away:
            raise Unavailable("the other broker does not answer")
        outcomes = await super().publish(
            [message for message in messages if message.uuid not in self.refuses]
        )
        if self.loses_answers:
            self.loses_answers = False
            raise Unavailable("the answer was lost")
        answers = iter(outcomes)
        return [
            Outcome("refused", "no room") if message.uuid in self.refuses else next(answers)
            for message in messages
        ]


@pytest.fixture
def namespace() -> str:
    return f"outbox-{uuid4().hex[:8]}"


@asynccontextmanager
async def outbox(
    server: Service, inner: Broker | str, namespace: str
) -> AsyncIterator[OutboxBroker]:
    broker = OutboxBroker(f"{server.url}?lease={LEASE}", inner)
    await broker.start(namespace)
    try:
        yield broker
    finally:
        await broker.stop()


async def enqueue(
    server: Service, broker: OutboxBroker, messages: list[TaskMessage], *, undo: bool = False
) -> None:
    """Publish in a transaction of its own."""
    connection = await asyncpg.connect(server.url)
    transaction = connection.transaction()
    await transaction.start()
    assert await broker.publish(messages, connection) == [DONE] * len(messages)
    await (transaction.rollback() if undo else transaction.commit())
    await connection.close()


def some(count: int, **more: Any) -> list[TaskMessage]:
    return [
        TaskMessage(uuid=str(uuid4()), task_name="t", queue="q", created_at=time.time(), **more)
        for _ in range(count)
    ]


async def collect(broker: Broker, count: int) -> list[Delivery]:
    subscription = await broker.subscribe({"q": count})
    taken: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(taken) < count:
            came = await subscription.receive({"q": count}, count)
            await subscription.settle([Ack(delivery) for delivery in came])
            taken += came
    return taken


def uuids(messages: Sequence[object]) -> Counter[str]:
    found = [m.message if isinstance(m, Delivery) else m for m in messages]
    return Counter(each.uuid for each in found if isinstance(each, TaskMessage))


async def until_left(broker: OutboxBroker, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while await broker.waiting() != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_several_processes_carry_each_message_once(
    postgres_server: Service, namespace: str
) -> None:
    inner = MemoryBroker(uuid4().hex)
    async with AsyncExitStack() as stack:
        one, *_ = [
            await stack.enter_async_context(outbox(postgres_server, inner, namespace))
            for _ in range(3)
        ]
        messages = some(MANY)
        await enqueue(postgres_server, one, some(7), undo=True)
        await enqueue(postgres_server, one, messages)
        assert uuids(await collect(one, MANY)) == uuids(messages)
        await until_left(one, 0)
        assert (await one.depth("q")).ready == 0


async def test_messages_wait_while_the_other_broker_is_away(
    postgres_server: Service, namespace: str
) -> None:
    """Also for longer than a lease. They can be enqueued all the time."""
    inner = Fallible(uuid4().hex)
    async with outbox(postgres_server, inner, namespace) as broker:
        inner.away = True
        messages = some(3)
        await enqueue(postgres_server, broker, messages)
        began = time.monotonic()
        while time.monotonic() - began < 1.5 * LEASE:
            assert await broker.waiting() == 3
            await asyncio.sleep(0.1)
        inner.away = False
        assert uuids(await collect(broker, 3)) == uuids(messages)
        await until_left(broker, 0)


async def test_a_lost_answer_loses_nothing(postgres_server: Service, namespace: str) -> None:
    inner = Fallible(uuid4().hex)
    async with outbox(postgres_server, inner, namespace) as broker:
        inner.loses_answers = True
        messages = some(3)
        await enqueue(postgres_server, broker, messages)
        assert uuids(await collect(broker, 6)) == uuids(messages + messages)
        await until_left(broker, 0)


async def test_a_refused_message_stays_and_holds_up_no_other(
    postgres_server: Service, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Fallible(uuid4().hex)
    async with outbox(postgres_server, inner, namespace) as broker:
        messages = some(3)
        inner.refuses = [messages[0].uuid]
        await enqueue(postgres_server, broker, messages)
        assert uuids(await collect(broker, 2)) == uuids(messages[1:])
        await until_left(broker, 1)
        assert f"MemoryBroker has refused the message of task {messages[0].uuid}" in caplog.text


async def test_a_message_of_a_later_release_stays(
    postgres_server: Service, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Fallible(uuid4().hex)
    async with outbox(postgres_server, inner, namespace) as broker:
        later = TaskMessage(uuid="later", task_name="outbox", queue="outbox", args=b"\2...")
        await broker.outbox.publish([later])
        messages = some(1)
        await enqueue(postgres_server, broker, messages)
        assert uuids(await collect(broker, 1)) == uuids(messages)
        async with asyncio.timeout(PATIENCE):
            while "stays in the outbox, since" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await until_left(broker, 1)


async def test_a_delayed_message_waits_in_the_outbox(
    postgres_server: Service, namespace: str
) -> None:
    inner = Fallible(uuid4().hex)
    async with outbox(postgres_server, inner, namespace) as broker:
        inner.away = True
        (long,) = some(1, delay=1000.0)
        (short,) = some(1, delay=0.01)
        await enqueue(postgres_server, broker, [long, short])
        await asyncio.sleep(0.05)
        inner.away = False
        (came,) = await collect(broker, 1)
        assert isinstance(came.message, TaskMessage)
        assert came.message.uuid == short.uuid
        assert came.message.delay == 0
        await until_left(broker, 1)  # the long one waits here


async def test_a_message_that_raises_an_error_holds_up_no_other(
    postgres_server: Service, namespace: str
) -> None:
    inner = Fallible(uuid4().hex)
    async with outbox(postgres_server, inner, namespace) as broker:
        messages = some(3)
        inner.forbids = [messages[1].uuid]
        await enqueue(postgres_server, broker, messages)
        assert uuids(await collect(broker, 2)) == uuids([messages[0], messages[2]])
        await until_left(broker, 1)


async def test_it_stops_while_both_servers_are_away(
    postgres_server: Service, namespace: str
) -> None:
    """In the middle of a publish that does not return."""
    inner = Fallible(uuid4().hex)
    broker = OutboxBroker(f"{postgres_server.url}?lease={LEASE}", inner)
    await broker.start(namespace)
    inner.hangs = True
    await enqueue(postgres_server, broker, some(1))
    async with asyncio.timeout(PATIENCE):
        await inner.called.wait()
        postgres_server.kill()
        try:
            await broker.stop()
        finally:
            postgres_server.restart()


async def test_two_outboxes_lead_to_their_own_brokers(
    postgres_server: Service, namespace: str
) -> None:
    url = f"{postgres_server.url}?lease={LEASE}"
    brokers = [
        OutboxBroker(url, MemoryBroker(uuid4().hex), name=name) for name in ("mails", "events")
    ]
    messages = some(40)
    for broker in brokers:
        await broker.start(namespace)
    try:
        await enqueue(postgres_server, brokers[0], messages[:20])
        await enqueue(postgres_server, brokers[1], messages[20:])
        assert uuids(await collect(brokers[0], 20)) == uuids(messages[:20])
        assert uuids(await collect(brokers[1], 20)) == uuids(messages[20:])
    finally:
        for broker in brokers:
            await broker.stop()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_process_that_dies_while_it_carries_loses_nothing(
    postgres_server: Service, redis_server: Service, namespace: str, when: str
) -> None:
    """After a death behind the publishing, there are two messages with one uuid."""
    inner = f"{redis_server.url}?lease={LEASE}"
    url = f"{postgres_server.url}?lease={LEASE}"
    environment = {"OUTBOX": url, "INNER": inner, "NAMESPACE": namespace}
    messages = some(1)
    writer = resolve_broker(url)
    outbox_alone = OutboxBroker(url, MemoryBroker(uuid4().hex))
    await writer.start(f"{namespace}.outbox")
    outbox_alone.outbox = writer  # type: ignore[assignment]  # nothing carries on here
    await enqueue(postgres_server, outbox_alone, messages)
    with Process("-m", "tests.postgres.dying_relay", when, environment=environment) as process:
        assert await asyncio.to_thread(process.wait) == -9, process.output()
    assert (await writer.depth("outbox")).in_flight == 1
    await writer.stop()
    async with outbox(postgres_server, inner, namespace) as broker:
        count = 2 if when == "after" else 1
        assert uuids(await collect(broker, count)) == uuids(messages * count)
        await until_left(broker, 0)


@pytest.mark.parametrize("same", [True, False], ids=["records there", "records elsewhere"])
async def test_an_app_enqueues_in_its_transaction(
    postgres_server: Service, redis_server: Service, tmp_path: Path, namespace: str, same: bool
) -> None:
    """The result comes either way. With the records in the same database, keys hold too."""
    broker = OutboxBroker(
        f"{postgres_server.url}?lease={LEASE}", f"{redis_server.url}?lease={LEASE}"
    )
    storage = postgres_server.url if same else f"sqlite:///{tmp_path}/records.db"
    app = QueueTasks(namespace, broker, storage)

    @app.task(name="add")
    async def add(x: int) -> int:
        return x + 1

    connection = await asyncpg.connect(postgres_server.url)
    async with app, app.worker():
        undoing = connection.transaction()
        await undoing.start()
        undone = await add.add_task(0, transaction=connection)
        await undoing.rollback()
        async with connection.transaction():
            task = await add.add_task(1, transaction=connection)
            if same:
                assert await app.get(task.uuid) is None
        assert (await task.wait_result(PATIENCE)).returning == 2
        assert (await add.add_task(2, timeout=PATIENCE)).returning == 3
        assert await app.get(undone.uuid) is None
        async with connection.transaction():
            if same:
                first = await add.call(3).add_task(key="k", transaction=connection)
                again = await add.call(4).add_task(key="k", transaction=connection)
                assert first.uuid == again.uuid
            else:
                with pytest.raises(NotSupported, match="in the database of the outbox"):
                    await add.call(3).add_task(key="k", transaction=connection)
        if same:
            assert (await again.wait_result(PATIENCE)).returning == 4
            async with connection.transaction():
                third = await add.call(5).add_task(key="k", transaction=connection)
            assert (await third.wait_result(PATIENCE)).returning == 4
    await connection.close()


def test_an_outbox_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the outbox is a MemoryBroker: give a Postgres"):
        OutboxBroker("memory://", "memory://")


async def test_the_page(postgres_server: Service, redis_server: Service, namespace: str) -> None:
    """Its code, and its command that counts what is left."""
    names: dict[str, Any] = {"__name__": "shop"}
    for block in blocks_of(ROOT / "docs" / "outbox.md"):
        code = block.code.replace("postgresql://localhost/shop", postgres_server.url)
        code = code.replace("redis://localhost", redis_server.url).replace(
            '"shop"', repr(namespace)
        )
        exec(code, names)  # noqa: S102  # the page's own code
    connection = await asyncpg.connect(postgres_server.url)
    await connection.execute("CREATE TABLE orders (id int)")
    app: QueueTasks = names["app"]
    task = names["confirm"]
    try:
        async with app, app.worker():
            first = await task.add_task(1, timeout=PATIENCE)
            assert first.returning == "order 1 confirmed"
            await names["place"](connection, 2)
            assert await connection.fetchval("SELECT id FROM orders") == 2
            query = TaskQuery(status=("success",))
            async with asyncio.timeout(PATIENCE):
                while len((await app.control(control.query, query)).tasks) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
    finally:
        await connection.execute("DROP TABLE orders")
        await connection.close()
    counted = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "qtasks", "-b", postgres_server.url, "queues", "outbox", "--json"],
        env={**os.environ, "QTASKS_NAME": f"{namespace}.outbox"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = json.loads(counted.stdout)
    assert (row["ready"], row["delayed"], row["in_flight"]) == (0, 0, 0)
