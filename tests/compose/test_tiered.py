"""Records in two tiers: what moves when, what is seen meanwhile, and crashes in the middle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from uuid import uuid4

import pytest
from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.compose import TieredStorage, tiered
from qtasks_core import Outcome, Status, Storage, Task, TaskQuery
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_memory import MemoryStorage
from tests.processes import PATIENCE

AFTER = 3600.0


class Failing(MemoryStorage):
    """A storage that is away, or that dies after it has done one call of a kind."""

    def __init__(self) -> None:
        super().__init__(uuid4().hex)
        self.is_away = False
        self.dies_after = ""

    def _died(self, call: str) -> None:
        if self.dies_after == call:
            self.dies_after = ""
            raise Unavailable(f"died after {call}")

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        self._answers()
        outcomes = await super().save(tasks, transaction)
        self._died("save")
        return outcomes

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        self._answers()
        return await super().get(uuids)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        await super().append(uuid, items)
        self._died("append")

    async def delete(self, uuids: Sequence[str]) -> int:
        count = await super().delete(uuids)
        if uuids:
            self._died("delete")
        return count

    def _answers(self) -> None:
        if self.is_away:
            raise Unavailable("away")


@pytest.fixture
def hot() -> Failing:
    return Failing()


@pytest.fixture
def archive() -> Failing:
    return Failing()


@pytest.fixture
async def storage(hot: Failing, archive: Failing) -> AsyncIterator[TieredStorage]:
    storage = TieredStorage(hot, archive, after=AFTER)
    await storage.start("shop")
    yield storage
    await storage.stop()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next move may follow at once."""
    monkeypatch.setattr(tiered, "_APART", 0.0)


def record(age: float, status: Status = "success", created: float = 0.0) -> Task:
    """Return a record that finished `age` seconds ago, with a uuid that names no time."""
    now = time.time()
    return Task(
        uuid=str(uuid4()),
        task_name="t",
        status=status,
        execution=uuid4().hex,
        created_at=created or now - age - 1,
        finished_at=now - age if status in ("success", "error", "cancel") else None,
    )


async def uuids_in(storage: Storage) -> set[str]:
    return {task.uuid for task in (await storage.query(TaskQuery(limit=1000))).tasks}


@pytest.mark.usefixtures("no_pause")
async def test_what_has_been_finished_for_long_enough_moves(
    storage: TieredStorage, hot: Failing, archive: Failing
) -> None:
    """More than one page of it. Younger records and unfinished ones stay."""
    old = [record(2 * AFTER) for _ in range(2 * tiered._PAGE + 1)]
    stay = [record(AFTER / 2), record(2 * AFTER, "process"), record(2 * AFTER, "retry")]
    await storage.save([*old, *stay])
    await storage.append(old[0].uuid, [b"one", b"two"])
    assert await storage.expire() == 0
    assert await uuids_in(archive) == {task.uuid for task in old}
    await storage.expire()
    assert await uuids_in(hot) == {task.uuid for task in stay}
    assert await storage.get([task.uuid for task in [*old, *stay]]) == [*old, *stay]
    assert [item for _, item in await storage.read(old[0].uuid, 0)] == [b"one", b"two"]
    assert await storage.delete([old[0].uuid, stay[0].uuid]) == 2
    assert await storage.get([old[0].uuid, stay[0].uuid]) == [None, None]
    assert await storage.read(old[0].uuid, 0) == []


async def test_a_copied_record_stays_for_a_while(
    storage: TieredStorage, hot: Failing, archive: Failing
) -> None:
    """A save that has looked into the archive before the copy still meets the record in `hot`."""
    task = record(2 * AFTER)
    await storage.save([task])
    other = TieredStorage(hot, archive, after=AFTER)
    for each in (storage, other, storage):
        await each.expire()
        assert await uuids_in(hot) == await uuids_in(archive) == {task.uuid}


@pytest.mark.usefixtures("no_pause")
async def test_an_archived_record_refuses_others(storage: TieredStorage, hot: Failing) -> None:
    task, fresh = record(2 * AFTER), record(0, "process")
    await storage.save([task])
    await storage.expire()
    await storage.expire()
    assert await uuids_in(hot) == set()
    again = replace(task, status="new", execution="another", finished_at=None)
    failed = replace(task, status="error", execution="another")
    outcomes = await storage.save([again, fresh, failed, task])
    assert [outcome.status for outcome in outcomes] == ["refused", "done", "refused", "done"]
    assert outcomes[0].current == outcomes[2].current == task
    assert await uuids_in(hot) == {fresh.uuid}


@pytest.mark.usefixtures("no_pause")
async def test_the_archive_was_the_only_storage_before(
    storage: TieredStorage, hot: Failing, archive: Failing
) -> None:
    """Tasks that were running then finish, and their results replace the records there."""
    task = record(2 * AFTER)
    running = replace(task, status="process", finished_at=None)
    await archive.save([running])
    first = replace(running, status="new", execution="another")
    outcomes = await storage.save([first, task])
    assert [outcome.status for outcome in outcomes] == ["refused", "done"]
    assert outcomes[0].current == running
    await storage.expire()
    assert await uuids_in(hot) == {task.uuid}
    await storage.expire()
    assert await uuids_in(hot) == set()
    assert await storage.get([task.uuid]) == await archive.get([task.uuid]) == [task]


@pytest.mark.usefixtures("no_pause")
async def test_who_waits_for_an_archived_task_gets_it(storage: TieredStorage) -> None:
    task = record(2 * AFTER)
    await storage.save([task])
    await storage.expire()
    await storage.expire()
    inbox = await storage.inbox()
    await inbox.watch([task.uuid])
    async with asyncio.timeout(PATIENCE):
        assert await inbox.receive() == [task]


@pytest.mark.usefixtures("no_pause")
async def test_pages_show_each_record_once_while_records_move(storage: TieredStorage) -> None:
    """Some only in `hot`, some in both, some only in the archive; a move between two pages."""
    tasks = [record(2 * AFTER, created=float(number + 1)) for number in range(12)]
    await storage.save(tasks[::2])
    await storage.expire()
    await storage.save([*tasks[1::2], young := record(1)])
    shown: list[Task] = []
    cursor = None
    while True:
        page = await storage.query(TaskQuery(limit=3, cursor=cursor))
        shown += page.tasks
        if (cursor := page.cursor) is None:
            break
        await storage.expire()
    assert shown == [young, *reversed(tasks)]


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(
    ("dies", "call"), [("archive", "append"), ("archive", "save"), ("hot", "delete")]
)
async def test_a_crash_in_the_middle_of_a_move(
    storage: TieredStorage, hot: Failing, archive: Failing, dies: str, call: str
) -> None:
    """After each step, everything is there once. The next move goes on."""
    tasks = [record(2 * AFTER), record(2 * AFTER)]
    await storage.save(tasks)
    for task in tasks:
        await storage.append(task.uuid, [b"item"])
    {"hot": hot, "archive": archive}[dies].dies_after = call
    crashes = 0
    for _ in range(4):
        try:
            await storage.expire()
        except Unavailable:
            crashes += 1
        assert await storage.get([task.uuid for task in tasks]) == tasks
        assert len((await storage.query(TaskQuery())).tasks) == 2
        for task in tasks:
            assert [item for _, item in await storage.read(task.uuid, 0)] == [b"item"]
    assert crashes == 1
    assert await uuids_in(hot) == set()


async def test_what_is_deleted_during_its_move_stays_deleted(
    storage: TieredStorage, archive: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = record(2 * AFTER)
    await storage.save([task])
    get = archive.get

    async def get_and_delete(uuids: Sequence[str]) -> list[Task | None]:
        found = await get(uuids)
        monkeypatch.setattr(archive, "get", get)
        assert await storage.delete(uuids) == 1
        return found

    monkeypatch.setattr(archive, "get", get_and_delete)
    await storage.expire()
    assert await storage.get([task.uuid]) == [None]


async def test_without_the_archive_young_tasks_go_on(
    storage: TieredStorage, archive: Failing
) -> None:
    """Their uuids name their time. Other uuids may be in the archive."""
    archive.is_away = True
    young = [replace(record(0, status), uuid=str(uuid7())) for status in ("new", "success")]
    assert [outcome.status for outcome in await storage.save(young)] == ["done", "done"]
    assert await storage.get([task.uuid for task in young]) == young
    assert await storage.get([str(uuid7())]) == [None]
    for uuid in ("any text", str(uuid4())):
        with pytest.raises(Unavailable):
            await storage.get([uuid])
    with pytest.raises(Unavailable):
        await storage.save([record(0)])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigurationError, match="neither a storage nor a URL"):
        TieredStorage("memory://a", 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="the same storage"):
        TieredStorage("memory://a", "memory://a")
    with pytest.raises(ConfigurationError, match="is not a number of seconds"):
        TieredStorage("memory://a", "memory://b", after=-1)
    for urls in (
        ("memory://a?retention=60", "memory://b"),
        ("memory://a", "memory://b?retention=60"),
    ):
        with pytest.raises(ConfigurationError, match=r"deletes records after 60 s .* after 3600 s"):
            TieredStorage(*urls, after=3600)
