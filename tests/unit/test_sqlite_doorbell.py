"""The bells: no ring is lost, whoever dies, floods or has no Unix sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qtasks_core.schemas import Delivery, Task, TaskMessage
from qtasks_sqlite import SqliteBroker, SqliteStorage
from qtasks_sqlite.doorbell import Bell, Doorbell
from qtasks_sqlite.inbox import SqliteInbox

# A process that dies as soon as its first transaction of this kind is durable.
DYING = """
import asyncio, os, sys
from qtasks_core.schemas import Task, TaskMessage
from qtasks_sqlite import SqliteBroker, SqliteStorage
from qtasks_sqlite.connection import Transaction

async def main(url, reply_to):
    broker, storage = SqliteBroker(url), SqliteStorage(url)
    await broker.start("n")
    await storage.start("n")
    Transaction.committed = lambda turn: os._exit(9)
    if reply_to:
        end = Task(uuid="u", task_name="t", status="success", reply_to=reply_to)
        await storage.save([end])
    else:
        await broker.publish([TaskMessage(uuid="u", task_name="t")])

asyncio.run(main(*sys.argv[1:]))
"""


class House:
    """A broker and a storage in one file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"sqlite:///{directory}/tasks.db"
        self.bells = directory / "tasks.db-doorbells"
        self.broker = SqliteBroker(self.url)
        self.storage = SqliteStorage(self.url)

    async def __aenter__(self) -> House:
        await self.broker.start("n")
        await self.storage.start("n")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.broker.stop()
        await self.storage.stop()

    async def inbox(self) -> SqliteInbox:
        inbox = await self.storage.inbox()
        assert isinstance(inbox, SqliteInbox)
        return inbox


@pytest.fixture(params=["unix", "long path", "udp"])
async def house(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[House]:
    directory = tmp_path
    if request.param == "long path":
        directory = tmp_path / ("d" * 100)
        directory.mkdir()
    if request.param == "udp":
        path = Doorbell.path
        monkeypatch.setattr(
            Doorbell, "path", lambda self, a: "x" * 200 if a[:4] == "unix" else path(self, a)
        )
    async with House(directory) as house:
        yield house


def ends(uuids: list[str], reply_to: str) -> list[Task]:
    return [Task(uuid=u, task_name="t", status="success", reply_to=reply_to) for u in uuids]


async def arrivals(inbox: SqliteInbox, count: int) -> list[str]:
    arrived: list[str] = []
    async with asyncio.timeout(120):
        while len(arrived) < count:
            arrived += [task.uuid for task in await inbox.receive()]
    return sorted(arrived)


async def test_a_sleeper_is_woken(house: House) -> None:
    subscription = await house.broker.subscribe({"default": 1})
    waiting = asyncio.create_task(subscription.receive({"default": 1}, 1))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await house.broker.publish([TaskMessage(uuid="u", task_name="t")])
    assert [delivery.message for delivery in await waiting]
    assert time.monotonic() - began < 3


async def test_a_flood_is_read_whole(house: House) -> None:
    """More letters than a socket holds: what was dropped is read all the same."""
    inbox = await house.inbox()
    uuids = sorted(f"{'u' * 100}{number}" for number in range(1000))
    inbox.expect(uuids)

    async def flood() -> list[str]:
        async with House(house.directory) as writer:
            for at in range(0, 1000, 10):
                await writer.storage.save(ends(uuids[at : at + 10], inbox.address))
            other = await writer.inbox()
            other.expect(["v"])
            await writer.storage.save(ends(["v"], other.address))
            return await arrivals(other, 1)

    with ThreadPoolExecutor(1) as thread:
        # Waiting here blocks the loop of the inbox, as if its process were frozen.
        assert thread.submit(asyncio.run, flood()).result() == ["v"]
    assert await arrivals(inbox, 1000) == uuids


@pytest.mark.parametrize("part", ["broker", "storage"])
async def test_a_writer_that_dies_after_its_commit_has_rung(house: House, part: str) -> None:
    inbox = await house.inbox()
    inbox.expect(["u"])
    subscription = await house.broker.subscribe({"default": 1})
    waiting: asyncio.Task[list[Task]] | asyncio.Task[list[Delivery]]
    if part == "storage":
        waiting = asyncio.create_task(inbox.receive())
    else:
        waiting = asyncio.create_task(subscription.receive({"default": 1}, 1))
    await asyncio.sleep(0.2)
    address = inbox.address if part == "storage" else ""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DYING, house.url, address,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert await child.wait() == 9
    async with asyncio.timeout(3):
        assert len(await waiting) == 1


async def test_what_the_dead_leave_is_cleared_away(house: House) -> None:
    inbox = await house.inbox()
    await inbox.watch(["u"])
    subscription = await house.broker.subscribe({"default": 1})
    waiting = asyncio.create_task(subscription.receive({"default": 1}, 1))
    await asyncio.sleep(0.2)
    alive = sorted(os.listdir(house.bells))
    assert len(alive) == 3
    dead = "unix-0123456789abcdef"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        udp = f"udp-{free.getsockname()[1]}-{dead[5:]}"
    for name in (dead, f"q1.{dead}", udp, f"q1.{udp}"):
        (house.bells / name).touch()
    doorbell = Doorbell(house.storage.path)
    doorbell.open()
    doorbell.close()
    left = sorted(name for name in os.listdir(house.bells) if not name.endswith(dead))
    assert left == alive
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await inbox.close()
    await subscription.close()
    assert not set(alive) & set(os.listdir(house.bells))


async def test_an_address_from_outside_goes_nowhere(house: House) -> None:
    """`reply_to` comes out of messages: it may be anything."""
    for address in ("../../etc", "udp-1-0123456789abcdef", "unix-nobody", "", "x" * 300):
        outcomes = await house.storage.save(ends([f"to {address}"], address))
        assert outcomes[0].status == "done"


async def test_who_sleeps_again_at_once_is_rung_again(tmp_path: Path) -> None:
    """Even before the ringer has removed the file of the last sleep."""
    bells = Doorbell(tmp_path / "tasks.db"), Doorbell(tmp_path / "tasks.db")
    for doorbell in bells:
        doorbell.open()
    listening, ringing = bells
    bell, ended = Bell(listening), threading.Event()

    def ring() -> None:
        while not ended.is_set():
            ringing.ring_queues([1])

    try:
        bell.sleep_for([1])
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(ring))
            try:
                for _ in range(2000):
                    async with asyncio.timeout(60):
                        await bell.wait()
                    bell.sleep_for([1])
            finally:
                ended.set()
        bell.awake()
        assert [name for name in os.listdir(listening.directory) if name.startswith("q")] == []
    finally:
        bell.close()
        for doorbell in bells:
            doorbell.close()
