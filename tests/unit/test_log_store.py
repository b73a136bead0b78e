"""The views with a table behind them: bounded memory, restarts, damage, several processes."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from qtasks_core import DONE, Status, Task, TaskQuery
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.queries import page_of
from qtasks_log import Entry, LogStorage
from qtasks_log.entries import Claiming, Content, Deletion, Items, Setting, encode
from qtasks_log.store import Store
from qtasks_log.table import Table
from qtasks_log.view import Proposal, View
from tests.processes import ROOT
from tests.unit.memory_log import MemoryLog, Server

UUIDS = [f"u{number}" for number in range(6)]
STATUSES: tuple[Status, ...] = ("new", "scheduled", "process", "retry", "success", "error")


def record(status: Status = "new", uuid: str = "u", **fields: object) -> Task:
    return Task(uuid=uuid, task_name="n", status=status, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def started(
    log: MemoryLog, directory: Path | None, **options: Any
) -> AsyncIterator[LogStorage]:
    storage = LogStorage(log, directory=directory, **options)
    await storage.start("app")
    try:
        yield storage
    finally:
        await storage.stop()


class CountingLog(MemoryLog):
    """Counts the entries that it has returned."""

    returned = 0

    async def read(self) -> list[Entry]:
        entries = await super().read()
        self.returned += len(entries)
        return entries


# -- the store against plain views


tasks = st.builds(
    Task,
    uuid=st.sampled_from(UUIDS),
    task_name=st.sampled_from("ab"),
    queue=st.sampled_from("pq"),
    status=st.sampled_from(STATUSES),
    dead=st.sampled_from([None, "why"]),
    attempt=st.integers(1, 2),
    execution=st.sampled_from("xy"),
    created_at=st.integers(0, 3).map(float),
)
queries = st.builds(
    TaskQuery,
    status=st.none() | st.lists(st.sampled_from(STATUSES), unique=True, max_size=3).map(tuple),
    task_name=st.none() | st.sampled_from("ab"),
    queue=st.none() | st.sampled_from("pq"),
    created_after=st.none() | st.just(1.0),
    created_before=st.none() | st.just(3.0),
    dead=st.none() | st.booleans(),
    limit=st.integers(1, 4),
)
contents = st.one_of(
    tasks,
    st.builds(Items, st.just((b"item",)), st.just(0.0)),
    st.just(Deletion()),
    st.builds(Setting, st.sampled_from([None, b"1", b"2"]), st.just("CURRENT")),
    st.builds(Claiming, st.sampled_from([None, "me"]), st.just(30.0), st.just("CURRENT")),
)
steps = st.lists(
    st.tuples(st.sampled_from(["u0", "u1", "u2", "u3", "u4"]), contents, st.booleans()), max_size=12
)


class Views:
    """The three views: those of a store, or plain ones with everything in memory."""

    def __init__(self, records: View[Any], values: View[Any], claims: View[Any]) -> None:
        self.all = (records, values, claims)

    def of(self, content: Content) -> View[Any]:
        return self.all[{Setting: 1, Claiming: 2}.get(type(content), 0)]

    def put(self, entry: Entry, content: Content | None) -> None:
        subject, key = entry.partition_key, entry.key
        if content is None:
            for view in self.all:
                view.discard(subject, key)
        elif isinstance(content, Items):
            self.all[0].append(subject, key, content, 10)
        else:
            self.of(content).propose(subject, key, content, None, 10)


class Writers:
    """Makes the entries of a log: proposals that follow the current one, and tombstones."""

    def __init__(self, plain: Views) -> None:
        self.plain = plain
        self.alive: list[Entry] = []
        self.keys = count()

    def entry(
        self, subject: str, content: Content, tombstone: bool
    ) -> tuple[Entry, Content | None]:
        if tombstone and self.alive:
            old = self.alive.pop(len(self.alive) // 2)
            return Entry(old.partition_key, old.key, None), None
        if isinstance(content, Task):
            subject = content.uuid
        elif isinstance(content, Setting | Claiming):
            current = self.plain.of(content).get(subject)
            content = replace(content, after="" if current is None else current.key)
        entry = Entry(subject, f"k{next(self.keys)}", encode(content))
        self.alive.append(entry)
        return entry, content


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(steps, min_size=1, max_size=8),
    memory=st.sampled_from([1, 3000, 10**9]),
    reopen=st.booleans(),
    query=queries,
)
def test_a_store_is_as_good_as_plain_views(
    batches: list[list[tuple[str, Content, bool]]], memory: int, reopen: bool, query: TaskQuery
) -> None:
    with TemporaryDirectory() as directory:
        asyncio.run(_compare(batches, memory, Path(directory) if reopen else None, query))


async def _compare(
    batches: list[list[tuple[str, Content, bool]]],
    memory: int,
    directory: Path | None,
    query: TaskQuery,
) -> None:
    async def opened() -> Store:
        store = Store(Table(directory, "t", "identity"), retention=inf, memory=memory)
        await store.open()
        return store

    plain = Views(View(), View(), View())
    writers = Writers(plain)
    store = await opened()
    try:
        for number, batch in enumerate(batches):
            for step in batch:
                entry, content = writers.entry(*step)
                plain.put(entry, content)
                await store.load(store.missing([(entry.partition_key, entry.key, content)]))
                Views(store.records, store.values, store.claims).put(entry, content)
                await store.took(b"%d" % number)
            if directory is not None and number % 2:
                await store.close()
                store = await opened()
        await _agree(store, plain, query)
    finally:
        await store.close()


async def _agree(store: Store, plain: Views, query: TaskQuery) -> None:
    views: tuple[View[Any], ...] = (store.records, store.values, store.claims)
    for view, plain_view in zip(views, plain.all, strict=True):
        for subject in UUIDS:
            await store.load([subject], view)
            found, expected = view.loaded.get(subject), plain_view.loaded.get(subject)
            if expected is None or expected.empty:
                assert found is None or found.empty
                continue
            assert found is not None
            assert [p[:2] for p in found.standing] == [p[:2] for p in expected.standing]
            assert state_of(found.current) == state_of(expected.current)
            assert found.items() == expected.items()
    states = [state.current for state in plain.all[0].loaded.values()]
    records = [current.content for current in states if current is not None]
    tasks = [content for content in records if isinstance(content, Task)]
    expected_page, page = page_of(tasks, query), await store.page(query)
    while True:
        assert page == expected_page
        if page.cursor is None:
            break
        query = replace(query, cursor=page.cursor)
        expected_page, page = page_of(tasks, query), await store.page(query)
    values = {key: plain.all[1].get(key) for key in plain.all[1].subjects()}
    assert await store.values_beginning("u") == {
        key: current.content.value
        for key, current in values.items()
        if current is not None and current.content.value is not None
    }


def state_of(current: Proposal[Any] | None) -> object:
    return current and current[:2]


# -- memory


async def test_memory_is_bounded_and_all_is_still_there() -> None:
    server = Server()
    uuids = [f"u{number:05}" for number in range(6000)]
    async with started(MemoryLog(server), None, memory=1_000_000) as storage:
        for at in range(0, len(uuids), 500):
            await storage.save(
                [record("success", uuid, returning=uuid.encode()) for uuid in uuids[at : at + 500]]
            )
        loaded = storage._store.records
        assert len(loaded.loaded) * 1000 + loaded.size < 4_000_000
        found = await storage.get(uuids)
        assert [task and task.returning for task in found] == [uuid.encode() for uuid in uuids]
        (refused,) = await storage.save([record("cancel", uuids[0])])
        assert refused.current == record("success", uuids[0], returning=uuids[0].encode())


async def test_an_inbox_is_told_of_a_result_that_left_the_memory() -> None:
    async with started(MemoryLog(Server()), None, memory=1) as storage:
        await storage.save([record("success", "old")])
        await storage.save([record(uuid=f"u{number}") for number in range(1500)])
        await storage.save([record(uuid="last")])
        assert "old" not in storage._store.records.loaded
        inbox = await storage.inbox()
        await inbox.watch(["old"])
        assert [task.uuid for task in await inbox.receive()] == ["old"]


# -- restarts


@pytest.mark.parametrize("compacts", [True, False])
async def test_a_restart_reads_only_what_came_after(tmp_path: Path, compacts: bool) -> None:
    server = Server(partitions=2)

    def log() -> CountingLog:
        return CountingLog(server, compacts=compacts)

    async with started(log(), tmp_path) as storage:
        await storage.save([record("success", f"u{number}") for number in range(500)])
        await storage.append("u1", [b"1", b"2"])
        assert await storage.set("key", b"1")
        assert await storage.claim("claim", "mine", 60.0) is not None
    async with started(MemoryLog(server, compacts=compacts), None) as other:
        await other.save([record("cancel", "u3"), record("success", "later")])
        assert await other.set("key", b"2", expect=b"1")
    again = log()
    async with started(again, tmp_path) as storage:
        assert again.returned < 20
        assert again.seeks[0] is not None
        assert await storage.get(["u3", "u499", "later", "none"]) == [
            record("success", "u3"), record("success", "u499"), record("success", "later"), None,
        ]  # fmt: skip
        assert await storage.read("u1", 0) == [(1, b"1"), (2, b"2")]
        assert await storage.values("") == {"key": b"2"}
        assert await storage.claim("claim", "theirs", 60.0) is None
        assert len((await storage.query(TaskQuery(status=("success",), limit=1000))).tasks) == 501
        (outcome,) = await storage.save([record("error", "u4")])
        assert outcome.status == "refused"


async def test_the_time_of_a_claim_begins_again_with_the_process(tmp_path: Path) -> None:
    server = Server()
    async with started(MemoryLog(server), tmp_path) as storage:
        assert await storage.claim("claim", "mine", 0.01) is not None
    await asyncio.sleep(0.02)
    async with started(MemoryLog(server), tmp_path) as storage:
        before = time.monotonic()
        await storage._store.load(["claim"], storage._store.claims)
        current = storage._store.claims.get("claim")
        assert current is not None
        assert current.over_at is not None
        assert before - 30.0 < current.over_at < time.monotonic() + 0.01


@pytest.mark.parametrize("other", ["log", "retention", "shorter"])
async def test_what_was_kept_of_something_else_is_thrown_away(tmp_path: Path, other: str) -> None:
    server = Server()
    async with started(MemoryLog(server), tmp_path) as storage:
        await storage.save([record("success", "old"), record("success", "kept")])
    if other == "log":
        server = Server()
    elif other == "shorter":
        (partition,) = server.log("app")
        partition.entries, partition.end = partition.entries[:1], 1
    retention = 5.0 if other == "retention" else 604800.0
    async with started(MemoryLog(server), tmp_path, retention=retention) as storage:
        expected = {"log": [None, None], "shorter": [record("success", "old"), None]}
        everything: list[Task | None] = [record("success", "old"), record("success", "kept")]
        assert await storage.get(["old", "kept"]) == expected.get(other, everything)


def spoil_all(file: Path) -> None:
    file.write_bytes(b"no database" * 1000)


def spoil_the_middle(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    file.write_bytes(data)


def spoil_a_record(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute(
        "UPDATE subjects SET data = CAST(substr(data, 1, 20) || X'00' || substr(data, 22) AS BLOB)"
    )
    connection.commit()
    connection.close()


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [spoil_all, spoil_the_middle, spoil_a_record, empty])
async def test_a_damaged_file_is_made_anew(tmp_path: Path, spoil: Any) -> None:
    server = Server()
    async with started(MemoryLog(server), tmp_path) as storage:
        await storage.save([record("success", f"u{number}") for number in range(200)])
    spoil(tmp_path / "MemoryLog-app.sqlite")
    storage = LogStorage(MemoryLog(server), directory=tmp_path)
    await repeated(lambda: storage.start("app"))
    try:
        assert await repeated(lambda: storage.get(["u7"])) == [record("success", "u7")]
        assert await repeated(lambda: storage.save([record("success", "new")])) == [DONE]
        page = await repeated(lambda: storage.query(TaskQuery(limit=1000)))
        assert len(page.tasks) == 201
    finally:
        await storage.stop()
    again = CountingLog(server)
    async with started(again, tmp_path) as storage:
        assert again.returned == 0
        assert await storage.get(["u7", "new"]) == [
            record("success", "u7"),
            record("success", "new"),
        ]


async def repeated(call: Any) -> Any:
    """Call as the engine does: again while the storage is out of reach."""
    for _ in range(100):
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0.01)
    raise AssertionError("never available")


async def test_a_second_process_starts_with_a_copy(tmp_path: Path) -> None:
    server = Server()
    async with started(MemoryLog(server), tmp_path) as storage:
        await storage.save([record("success", f"u{number}") for number in range(200)])
    first, second = CountingLog(server), CountingLog(server)
    async with started(first, tmp_path) as one, started(second, tmp_path) as two:
        assert first.returned == second.returned == 0
        await one.save([record("success", "one")])
        await two.save([record("success", "two")])
        for storage in (one, two):
            assert None not in await storage.get(["one", "two", "u0"])
    async with started(CountingLog(server), tmp_path) as storage:
        assert None not in await storage.get(["one", "two", "u0"])


async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    storage = LogStorage(MemoryLog(Server()), directory=tmp_path / "file")
    with pytest.raises(ConfigurationError, match="directory="):
        await storage.start("app")


# -- killed while it writes

CHILD = """
import asyncio, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from qtasks_log.table import FORMAT, Head, Row, Table

async def write():
    table = Table(Path(sys.argv[1]), "t", "identity")
    await table.open()
    number = 0
    while True:
        number += 1
        data = b"%d" % number
        rows = [Row(0, f"u{at}", 1.0, 0, "n", "q", None, data * 200) for at in range(300)]
        await table.write(rows, [], Head(FORMAT, "identity", 1, number, data))
        print(number, flush=True)

asyncio.run(write())
"""


def killed_after(writes: int, directory: Path) -> int:
    """Return how many writes a process had seen when it was killed."""
    command = [sys.executable, "-c", CHILD, str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        written = [int(child.stdout.readline()) for _ in range(writes)]
        child.send_signal(signal.SIGKILL)
    return written[-1]


@pytest.mark.parametrize("writes", [1, 3, 10])
async def test_a_process_killed_while_it_writes_leaves_one_state(
    tmp_path: Path, writes: int
) -> None:
    written = killed_after(writes, tmp_path)
    table = Table(tmp_path, "t", "identity")
    head = await table.open()
    try:
        assert head is not None
        assert head.places >= written
        rows = await table.load([f"u{at}" for at in range(300)])
        assert len(rows) == 300
        assert {data for _, _, data in rows} == {b"%d" % head.places * 200}
    finally:
        await table.close()


# -- a log that is not what it was


async def test_a_log_that_lost_entries_is_read_anew() -> None:
    server = Server()
    log = CountingLog(server)
    async with started(log, None) as storage, started(MemoryLog(server), None) as other:
        await storage.save([record("success", "old")])
        (partition,) = server.log("app")
        partition.entries = []
        log.replaced = True
        await other.save([record("success", "new")])
        assert await repeated(lambda: storage.get(["old", "new"])) == [
            None,
            record("success", "new"),
        ]
        assert await storage.save([record("success", "next")]) == [DONE]
        assert log.seeks == [None]


async def test_callers_are_told_that_the_log_is_read_anew() -> None:
    server = Server()
    log = MemoryLog(server)
    async with started(log, None) as storage:
        inbox = await storage.inbox()
        waiting = asyncio.create_task(inbox.receive())
        await asyncio.sleep(0)
        await storage.save([record()])
        log.replaced = True
        await repeated(lambda: storage.save([record("success", execution="x")]))
        with pytest.raises(Unavailable, match="anew"):
            await waiting
