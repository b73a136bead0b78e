"""Operating queues and workers: commands of any size, purging in steps, migrating by SQL."""

from __future__ import annotations

import asyncio
import subprocess
from uuid import uuid4

import asyncpg

from qtasks.asyncio import QueueTasks
from qtasks_core import Command, TaskMessage
from qtasks_postgres import PostgresBroker, PostgresStorage, control
from tests.cli.command import Command as Qtasks


async def test_a_command_of_any_size_comes_whole(fresh: str) -> None:
    broker = PostgresBroker(fresh)
    await broker.start("app")
    heard: asyncio.Queue[Command] = asyncio.Queue()

    async def listen() -> None:
        async for command in broker.commands():
            heard.put_nowait(command)

    listening = asyncio.create_task(listen())
    while heard.empty():
        await broker.broadcast(Command(name="hello"))
        await asyncio.sleep(0.02)
    sent = [
        Command(name="config", target=str(size), arguments={"text": "x" * size})
        for size in (5_000, 5_300, 20_000, 100_000)
    ]
    await asyncio.gather(*(broker.broadcast(command) for command in sent))
    got: list[Command] = []
    while len(got) < len(sent):
        command = await asyncio.wait_for(heard.get(), 120)
        got += [] if command.name == "hello" else [command]
    assert {command.target: command for command in got} == {c.target: c for c in sent}
    listening.cancel()
    await asyncio.wait({listening})
    await broker.stop()


async def test_a_cancel_reaches_a_running_function_at_once(fresh: str) -> None:
    app = QueueTasks("shop", fresh)
    begun, stopped = asyncio.Event(), asyncio.Event()

    @app.task(name="wait")
    async def wait() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    async with app, app.worker():
        task = await wait.add_task()
        await asyncio.wait_for(begun.wait(), 120)
        assert await app.cancel(task.uuid)
        # By the command; leases are extended, and records read, after 10 s.
        async with asyncio.timeout(5):
            await stopped.wait()


async def test_many_messages_are_purged(fresh: str) -> None:
    broker = PostgresBroker(fresh)
    await broker.start("app")
    many = control.PURGED + 100
    for delay in (0.0, 600.0):
        await broker.publish(
            [
                TaskMessage(uuid=str(uuid4()), task_name="t", delay=delay, priority=at % 10)
                for at in range(many)
            ]
        )
    assert await broker.purge("default") == 2 * many
    depth = await broker.depth("default")
    assert (depth.ready, depth.delayed, depth.in_flight) == (0, 0, 0)
    await broker.stop()


async def script(qtasks: Qtasks) -> str:
    """Return what `qtasks migrate --sql` prints."""
    said = await asyncio.to_thread(qtasks.ok, "migrate", "--sql", app=None)
    return said.out


async def test_the_sql_of_a_migration_does_the_same(fresh: str, admin: asyncpg.Connection) -> None:
    for schema in ("qtasks", "other"):
        url = f"{fresh}?schema={schema}"
        qtasks = Qtasks({"QTASKS_BROKER_URL": url})
        sql = await script(qtasks)
        assert not await admin.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = $1", schema)
        done = await asyncio.to_thread(
            subprocess.run,
            ["psql", "--quiet", "-v", "ON_ERROR_STOP=1", fresh],
            input=sql, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert (
            await script(qtasks)
            == "-- PostgresBroker: up to date\n-- PostgresStorage: up to date\n"
        )
        for part in (PostgresBroker(fresh, schema=schema), PostgresStorage(fresh, schema=schema)):
            assert await part.migrate("app") == []
            await part.start("app")
            await part.stop()
