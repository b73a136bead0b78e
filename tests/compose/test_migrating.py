"""Moving to other servers: what old and new processes see of each other, and a live app."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest
from msgspec.structs import replace

from qtasks import Task
from qtasks.asyncio import QueueTasks
from qtasks.client.client import Client
from qtasks.compose import MigratingBroker, MigratingStorage
from qtasks_core import Command, QueueDepth, Status, Storage, TaskQuery
from qtasks_core import Task as Record
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker, resolve_storage
from tests.e2e.crash import Log
from tests.pairs import with_lease
from tests.processes import PATIENCE, Process, until
from tests.services import Service

NOTHING = QueueDepth(ready=0, delayed=0, in_flight=0)
SOME = 60
"""How many results each deployment gets before the next one."""


class Stages(NamedTuple):
    """One app as its processes are deployed before, during and after a move."""

    old: QueueTasks
    moving: QueueTasks
    new: QueueTasks


@pytest.fixture
async def stages(tmp_path: Path) -> AsyncIterator[Stages]:
    """All three, started. The brokers and storages are files."""
    old, new = (f"sqlite:///{tmp_path}/{name}.db" for name in ("old", "new"))
    apps = Stages(
        QueueTasks("shop", old, old),
        QueueTasks("shop", MigratingBroker(old, new), MigratingStorage(old, new)),
        QueueTasks("shop", new, new),
    )
    async with AsyncExitStack() as stack:
        for app in apps:
            await stack.enter_async_context(app)
        yield apps


class Storages(NamedTuple):
    """The storages of the stages, for this loop."""

    old: Storage
    moving: MigratingStorage
    new: Storage


@pytest.fixture
async def storages(tmp_path: Path) -> AsyncIterator[Storages]:
    old, new = (f"sqlite:///{tmp_path}/{name}.db" for name in ("old", "new"))
    each = Storages(resolve_storage(old), MigratingStorage(old, new), resolve_storage(new))
    for storage in each:
        await storage.start("shop")
    yield each
    for storage in each:
        await storage.stop()


def record(
    uuid: str, status: Status = "success", *, attempt: int = 1, created_at: float = 1.0
) -> Record:
    return Record(uuid=uuid, task_name="t", status=status, attempt=attempt, created_at=created_at)


async def double(number: int) -> int:
    if number < 0 and number not in failed:
        failed.add(number)
        raise ValueError("the first run of a negative number")
    return 2 * number


failed: set[int] = set()


async def test_tasks_of_every_stage_are_run_by_workers_that_move(stages: Stages) -> None:
    """Also those that failed once, and delayed ones. A retry goes to the new broker."""
    failed.clear()
    tasks: list[Task[int]] = []
    doubles = [app.task(name="double", retry=1)(double) for app in stages]
    for number, task in enumerate(doubles, 1):
        tasks += await task.map([(number,), (-number,)])
        tasks.append(await task.add_task(10 * number, delay=0.5))
    left = await stages.moving.control(what_is_left)
    assert (left.ready, left.delayed, left.in_flight) == (2, 1, 0)
    async with stages.moving.worker():
        results = [(await task.wait_result(PATIENCE)).returning for task in tasks]
    assert results == [2 * n * sign for n in (1, 2, 3) for sign in (1, -1, 10)]
    assert await stages.moving.control(what_is_left) == NOTHING


async def what_is_left(client: Client) -> QueueDepth:
    assert isinstance(client.broker, MigratingBroker)
    return await client.broker.left("default")


async def test_a_worker_says_when_nothing_is_left(
    stages: Stages, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qtasks")
    double_at_old = stages.old.task(name="double")(double)
    stages.moving.task(name="double")(double)
    task = await double_at_old.add_task(1)

    def said() -> bool:
        return "nothing is left in the queue 'default' on SqliteBroker" in caplog.text

    async with stages.moving.worker(concurrency=1), asyncio.timeout(PATIENCE):
        await task.wait_result(PATIENCE)
        while not said():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert caplog.text.count("nothing is left") == 1


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("other", [0, 1])
async def test_a_cancel_reaches_workers_of_the_stage_before(
    stages: Stages, stage: int, other: int
) -> None:
    """Old and moving processes work together, and so do moving and new ones."""
    for pair in (stages[:2], stages[1:]):
        started = asyncio.Event()

        async def wait(started: asyncio.Event = started) -> None:
            started.set()
            await asyncio.Event().wait()

        worker, client = pair[stage], pair[other]
        name = f"wait {uuid4()}"
        worker.task(name=name)(wait)
        enqueuing = client.task(name=name)(wait)
        if worker is stages.old:  # a client that moves must wait until all workers do
            enqueuing = stages.old.task(name=name)(wait)
        async with worker.worker(), asyncio.timeout(PATIENCE):
            task = await enqueuing.add_task()
            await started.wait()
            assert await client.cancel_task(task.uuid)
            assert (await client.wait(task.uuid, PATIENCE)).status == "cancel"


async def test_a_command_comes_once(tmp_path: Path) -> None:
    """It goes through the old broker and the new one."""
    old, new = (f"sqlite:///{tmp_path}/{name}.db" for name in ("old", "new"))
    brokers = [resolve_broker(old), MigratingBroker(old, new), resolve_broker(new)]
    heard: list[list[Command]] = [[], [], []]

    async def listen(at: int) -> None:
        async for command in brokers[at].commands():
            heard[at].append(command)

    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for broker in brokers:
            await broker.start("shop")
            stack.push_async_callback(broker.stop)
        listening = [group.create_task(listen(at)) for at in range(3)]
        async with asyncio.timeout(PATIENCE):
            while not all(heard):  # until all listen
                await brokers[1].broadcast(Command(name="ping", target="first"))
                await asyncio.sleep(0.05)
            await brokers[1].broadcast(Command(name="ping", target="last"))
            while any(each[-1].target != "last" for each in heard):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await brokers[0].broadcast(Command(name="ping", target="old"))
            await brokers[2].broadcast(Command(name="ping", target="new"))
            while len({each.target for each in heard[1]} & {"old", "new"}) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for task in listening:
            task.cancel()
    assert heard[1].count(Command(name="ping", target="last")) == 1


async def test_what_only_the_old_storage_has_is_copied_when_it_is_read(storages: Storages) -> None:
    uuid, other = str(uuid4()), str(uuid4())
    await storages.old.save([record(uuid), record(other)])
    assert await storages.new.get([uuid]) == [None]
    (seen,) = await storages.moving.get([uuid])
    assert seen == record(uuid)
    assert await storages.new.get([uuid, other]) == [seen, None]


async def test_a_writer_that_died_between_the_two_hides_nothing(storages: Storages) -> None:
    """It has saved its result at the old storage only. The next reader copies it."""
    uuid = str(uuid4())
    await storages.moving.save([record(uuid, "process")])
    await storages.old.save([record(uuid)])
    assert await storages.moving.get([uuid]) == [record(uuid)]
    assert await storages.new.get([uuid]) == [record(uuid)]


async def test_the_first_final_record_of_a_new_process_stays(storages: Storages) -> None:
    uuid = str(uuid4())
    await storages.moving.save([record(uuid, "process")])
    await storages.new.save([record(uuid, "cancel")])
    (refused,) = await storages.moving.save([record(uuid)])
    assert (refused.status, refused.current) == ("refused", record(uuid, "cancel"))
    assert await storages.moving.get([uuid]) == [record(uuid, "cancel")]


async def test_the_first_final_record_of_an_old_process_stays(storages: Storages) -> None:
    uuid = str(uuid4())
    await storages.old.save([record(uuid, "cancel")])
    (refused,) = await storages.moving.save([record(uuid)])
    assert refused.status == "refused"
    assert await storages.new.get([uuid]) == [None]
    assert await storages.moving.get([uuid]) == [record(uuid, "cancel")]


@pytest.mark.parametrize("saver", [0, 1, 2])
async def test_results_of_every_stage_come_to_a_client_that_moves(
    storages: Storages, saver: int
) -> None:
    uuid = str(uuid4())
    inbox = await storages.moving.inbox()
    await inbox.watch([uuid])
    final = replace(record(uuid), reply_to=inbox.address)
    await storages[saver].save([final])
    async with asyncio.timeout(PATIENCE):
        (came,) = await inbox.receive()
    assert came == final


async def test_one_process_has_a_claim_at_every_stage(storages: Storages) -> None:
    old, moving, new = storages
    assert await old.claim("a", "old", 60.0) is not None
    assert await moving.claim("a", "moving", 60.0) is None
    assert await new.claim("b", "new", 60.0) is not None
    assert await moving.claim("b", "moving", 60.0) is None
    assert await old.claim("b", "old", 60.0) is not None  # the one that failed holds nothing
    claim = await moving.claim("c", "moving", 60.0)
    assert claim is not None
    for other in (old, new):
        assert await other.claim("c", "other", 60.0) is None
    await moving.release(claim)
    for other in (old, new):
        assert await other.claim("c", "other", 60.0) is not None


async def test_values_of_every_stage_are_seen(storages: Storages) -> None:
    for name, storage in zip(Storages._fields, storages, strict=True):
        assert await storage.set(f"worker/{name}", name.encode())
    seen = await storages.moving.values("worker/")
    assert seen == {f"worker/{name}": name.encode() for name in Storages._fields}
    assert await storages.moving.get_value("worker/new") == b"new"
    assert not await storages.moving.set("worker/new", b"", expect=None)
    assert not await storages.moving.set("worker/new", b"", expect=b"old")
    assert await storages.moving.set("worker/new", b"later", expect=b"new")
    assert await storages.new.get_value("worker/new") == b"later"


async def test_pages_have_each_task_once(storages: Storages) -> None:
    """Some are in one storage, some in both, and the pages are full."""
    records = [record(str(uuid4()), created_at=float(at)) for at in range(21)]
    for at, each in enumerate(records):
        await storages[at % 3].save([each])
    found: list[Record] = []
    cursor: str | None = None
    while cursor is not None or not found:
        page = await storages.moving.query(TaskQuery(limit=4, cursor=cursor))
        assert len(page.tasks) == 4 or page.cursor is None
        found += page.tasks
        cursor = page.cursor
    assert found == records[::-1]


async def test_copy_leaves_nothing_behind(storages: Storages) -> None:
    """Records, values and the items of tasks; a second call finds nothing to copy."""
    records = [record(str(uuid4()), created_at=float(at)) for at in range(1200)]
    uuids = [each.uuid for each in records]
    await storages.old.save(records)
    await storages.old.append(uuids[7], [b"a", b"b"])
    await storages.old.set("key", b"value")
    await storages.moving.save([records[3]])  # a repeat: this one is in both
    assert await storages.moving.copy() == 1199
    assert await storages.new.get(uuids) == records
    assert [item for _, item in await storages.new.read(uuids[7], 0)] == [b"a", b"b"]
    assert await storages.new.get_value("key") == b"value"
    assert await storages.moving.copy() == 0


def test_wrong_parts_are_named() -> None:
    with pytest.raises(ConfigurationError, match="old and new are the same broker"):
        MigratingBroker("memory://a", "memory://a")
    with pytest.raises(ConfigurationError, match="old and new are the same storage"):
        MigratingStorage("memory://a", "memory://a")
    with pytest.raises(ConfigurationError, match="7 is neither a storage nor a URL"):
        MigratingStorage("memory://a", 7)  # type: ignore[arg-type]


class Move:
    """The processes of an app that moves, and what they wrote down."""

    def __init__(self, environment: dict[str, str], directory: Path, stack: ExitStack) -> None:
        self.log = Log(directory / "events")
        self.name = f"move-{uuid4().hex[:8]}"
        self.environment = {
            **environment, "QTASKS_NAME": self.name, "CRASH_LOG": str(self.log.path)
        }  # fmt: skip
        self._stack = stack

    def start(self, role: str, stage: str) -> Process:
        """Start a process, and wait until it works."""
        process = self._stack.enter_context(
            Process("-m", "tests.compose.moving_app", role, stage, environment=self.environment)
        )
        did = "begin" if role == "worker" else "got"
        until(lambda: bool(self.log.numbers(did, process.pid)), f"a {role} at work ({stage})")
        return process

    def replace(self, processes: list[Process], role: str, stage: str) -> None:
        """Restart one after the other; the others work meanwhile."""
        for at, process in enumerate(processes):
            assert process.terminate() == 0, process.output()
            processes[at] = self.start(role, stage)
        count = len(self.log.numbers("got")) + SOME
        until(lambda: len(self.log.numbers("got")) >= count, f"results of the stage {stage}")


def test_a_live_app_moves(
    redis_server: Service, kafka_server: Service, postgres_server: Service, tmp_path: Path
) -> None:
    """From Redis to Kafka and PostgreSQL: workers first, then clients. Nothing is lost.

    No result is recorded twice, and each client gets all of its results.
    """
    old, new = (with_lease(server.url, 6.0) for server in (redis_server, kafka_server))
    environment = {
        "OLD_BROKER": old, "OLD_STORAGE": redis_server.url,
        "NEW_BROKER": new, "NEW_STORAGE": postgres_server.url,
    }  # fmt: skip
    with ExitStack() as stack:
        move = Move(environment, tmp_path, stack)
        clients = [
            stack.enter_context(
                Process(
                    "-m", "tests.compose.moving_app", "client", "old",
                    environment=move.environment,
                )
            )
            for _ in range(2)
        ]  # fmt: skip
        workers = [move.start("worker", "old") for _ in range(2)]
        move.replace(workers, "worker", "moving")
        move.replace(clients, "client", "moving")
        assert asyncio.run(drained(move.name, environment)) == 0
        move.replace(workers, "worker", "new")
        move.replace(clients, "client", "new")
        for process in clients + workers:
            assert process.terminate() == 0, process.output()
    sent = {number: uuid for number, _, uuid in move.log.lines("sent")}
    got = {number: status for number, _, status in move.log.lines("got")}
    assert len(sent) >= 5 * SOME
    assert got == dict.fromkeys(sent, "success")
    assert {n: runs for n, runs in move.log.accepted().items() if len(runs) > 1} == {}
    assert asyncio.run(unfinished(move.name, postgres_server.url, [*sent.values()])) == []


async def drained(name: str, environment: dict[str, str]) -> int:
    """Wait until the old broker is empty, copy all records, and return how many were left then."""
    broker = MigratingBroker(environment["OLD_BROKER"], environment["NEW_BROKER"])
    storage = MigratingStorage(environment["OLD_STORAGE"], environment["NEW_STORAGE"])
    try:
        await broker.start(name)
        await storage.start(name)
        async with asyncio.timeout(PATIENCE):
            while await broker.left("default") != NOTHING:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await storage.copy()
        return await storage.copy()
    finally:
        await broker.stop()
        await storage.stop()


async def unfinished(name: str, url: str, uuids: list[str]) -> list[str]:
    """Return the tasks of which a storage has no success."""
    storage = resolve_storage(url)
    await storage.start(name)
    records = await storage.get(uuids)
    await storage.stop()
    return [
        uuid
        for uuid, found in zip(uuids, records, strict=True)
        if found is None or found.status != "success"
    ]
