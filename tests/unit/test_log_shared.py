"""Values, claims, streams, lists and expiry of LogStorage, on a log in memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtasks_core import DONE, Claim, Status, Task, TaskQuery
from qtasks_core.errors import Closed, ConfigurationError, Refused, Unavailable
from qtasks_log import Entry, LogStorage, listing, shared, store, table
from qtasks_log import storage as module
from qtasks_log.entries import Claiming, encode
from tests.unit.memory_log import MemoryLog, Server

T = TypeVar("T")


def record(status: Status = "new", uuid: str = "u", **fields: object) -> Task:
    return Task(uuid=uuid, task_name="n", status=status, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def started(
    server: Server, *, retention: float | None = 100.0, log: MemoryLog | None = None
) -> AsyncIterator[LogStorage]:
    storage = LogStorage(log or MemoryLog(server, compacts=True), retention=retention)
    await storage.start("app")
    try:
        yield storage
    finally:
        await storage.stop()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def storage(server: Server) -> AsyncIterator[LogStorage]:
    async with started(server) as storage:
        yield storage


def compact(server: Server) -> None:
    for partition in server.log("app"):
        partition.compact(partition.end, drop_tombstones=partition.end)


class Clock:
    """Stands for `time` in LogStorage, and may be ahead of it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for each in (module, listing, shared, store, table):
        monkeypatch.setattr(each, "time", clock)
    return clock


# -- claims


async def test_the_first_claim_in_the_log_wins(server: Server) -> None:
    """Both saw a free key, and both proposals are in the log before either is read back."""
    log = [MemoryLog(server, pause=lambda: 0.01) for _ in range(2)]
    async with started(server, log=log[0]) as one, started(server, log=log[1]) as two:
        for at in range(5):
            claims = await asyncio.gather(
                one.claim(f"k{at}", "one", 30.0), two.claim(f"k{at}", "two", 30.0)
            )
            assert [claim is None for claim in claims].count(True) == 1
            async with started(server) as late:
                assert await late.claim(f"k{at}", "late", 30.0) is None


async def test_the_winner_of_a_claim_is_the_same_after_compaction(server: Server) -> None:
    async with started(server) as storage, started(server) as other:
        for _ in range(3):
            assert await storage.claim("key", "mine", 30.0) is not None
            assert await other.claim("key", "theirs", 30.0) is None
    compact(server)
    (left,) = server.entries()
    assert left.value is not None
    async with started(server) as fresh:
        assert await fresh.claim("key", "theirs", 30.0) is None
        assert await fresh.claim("key", "mine", 30.0) is not None


async def test_the_winner_of_a_claim_is_the_same_after_truncation(server: Server) -> None:
    """The beginning of the log is gone up to the entry that holds the claim."""
    async with started(server, log=MemoryLog(server, compacts=False)) as storage:
        for _ in range(3):
            assert await storage.claim("key", "mine", 30.0) is not None
    (partition,) = server.log("app")
    partition.entries = partition.entries[-1:]
    async with started(server) as fresh:
        assert await fresh.claim("key", "theirs", 30.0) is None
        assert await fresh.claim("key", "mine", 30.0) is not None


async def test_a_proposal_that_lost_stays_a_loser(server: Server) -> None:
    """Its writer died before it could send the tombstone."""
    async with started(server) as storage:
        first = await storage.claim("key", "mine", 30.0)
        assert first is not None
        lost = Entry("key", "dead.0", encode(Claiming("dead", 30.0, "")))
        await storage._log.append([lost])
        assert await storage.claim("key", "mine", 30.0) is not None
        await storage.release(first)
        assert await storage.claim("key", "theirs", 30.0) is not None
    compact(server)
    async with started(server) as fresh:
        assert await fresh.claim("key", "dead", 30.0) is None


async def test_the_time_of_a_claim_starts_when_it_is_read(server: Server, clock: Clock) -> None:
    """A process that reads it late, for example after its start, waits for the whole time."""
    async with started(server) as storage:
        claim = await storage.claim("key", "mine", 30.0)
        assert claim is not None
        assert claim.expires_at == pytest.approx(clock.time() + 30.0, abs=5.0)
        clock.ahead += 20.0
        async with started(server) as late:
            clock.ahead += 11.0
            assert await late.claim("key", "late", 30.0) is None
            assert await storage.claim("key", "theirs", 30.0) is not None
            assert await late.claim("key", "late", 30.0) is None
            clock.ahead += 30.0
            assert await late.claim("key", "late", 30.0) is not None


async def test_a_released_claim_is_free_at_once(server: Server) -> None:
    async with started(server) as storage, started(server) as other:
        mine = await storage.claim("key", "mine", 30.0)
        assert mine is not None
        await other.release(Claim("key", "theirs", 0.0))
        assert await other.claim("key", "theirs", 30.0) is None
        await other.release(mine)
        assert await other.claim("key", "theirs", 30.0) is not None
        await storage.release(mine)
        assert await storage.claim("key", "mine", 30.0) is None


# -- values


async def test_a_value_is_one_entry_after_compaction(server: Server) -> None:
    async with started(server) as storage, started(server) as other:
        for at in range(5):
            assert await storage.set("key", b"%d" % at)
            assert not await other.set("key", b"x", expect=None)
            assert await other.set("key", b"%d!" % at, expect=b"%d" % at)
    compact(server)
    assert len(server.entries()) == 1
    async with started(server) as fresh:
        assert await fresh.values("") == {"key": b"4!"}


async def test_a_set_that_changes_nothing_writes_nothing(server: Server) -> None:
    async with started(server) as storage:
        assert await storage.set("none", None)
        assert await storage.set("key", b"1")
        before = len(server.entries())
        assert await storage.set("key", b"1")
        assert await storage.set("key", b"1", expect=b"1")
        assert not await storage.set("key", b"2", expect=b"0")
        assert len(server.entries()) == before


async def test_what_is_over_for_long_is_forgotten(server: Server, clock: Clock) -> None:
    async with started(server) as storage, started(server) as other:
        assert await storage.set("gone", b"1")
        assert await storage.set("gone", None)
        assert await storage.set("kept", b"1")
        assert await storage.claim("over", "mine", 30.0) is not None
        assert await storage.claim("held", "mine", 2 * module.GRACE) is not None
        clock.ahead += module.GRACE / 2
        assert await storage.expire() == 0
        assert sorted(storage._store.claims.subjects()) == ["held", "over"]
        clock.ahead += module.GRACE / 2 + 31.0
        assert await storage.expire() == 0
        await storage.stop()
        assert await other.values("") == {"kept": b"1"}
        assert other._store.values.subjects() == ["kept"]
        assert other._store.claims.subjects() == ["held"]
        assert await other.set("gone", b"2", expect=None)
        assert await other.claim("over", "theirs", 30.0) is not None
    compact(server)
    async with started(server) as fresh:
        assert await fresh.values("") == {"kept": b"1", "gone": b"2"}
        assert await fresh.claim("over", "mine", 30.0) is None


async def test_a_log_that_does_not_compact_gets_no_tombstones(server: Server, clock: Clock) -> None:
    async with started(server, log=MemoryLog(server, compacts=False)) as storage:
        for value in (b"1", b"2", None):
            assert await storage.set("key", value)
        assert await storage.claim("key", "mine", 30.0) is not None
        await storage.append("u", [b"1"])
        assert await storage.delete(["u"]) == 0
        clock.ahead += 2 * module.GRACE
        assert await storage.expire() == 0
    assert all(entry.value is not None for entry in server.entries())


async def test_a_watcher_gets_the_error_of_the_reader(server: Server) -> None:
    broken = False
    log = MemoryLog(server, read_fails=lambda: broken)
    async with started(server, log=log) as storage, started(server) as other:
        changes = storage.watch_value("key")
        assert await anext(changes) is None
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        broken = True
        await other.set("key", b"1")
        with pytest.raises(Unavailable):
            await waiting
        broken = False
        assert await anext(storage.watch_value("key")) == b"1"
        assert not storage._watchers._bells


async def test_stop_ends_a_watcher_even_if_the_storage_is_started_again(server: Server) -> None:
    storage = LogStorage(MemoryLog(server))
    await storage.start("app")
    changes = storage.watch_value("key")
    assert await anext(changes) is None
    await storage.stop()
    await storage.start("app")
    with pytest.raises(Closed):
        await anext(changes)
    await storage.stop()


async def test_what_the_log_does_not_take_is_refused(server: Server) -> None:
    async with started(server, log=MemoryLog(server, largest=1000)) as storage:
        for call in (storage.set("key", b"x" * 2000), storage.append("u", [b"x" * 2000])):
            with pytest.raises(Refused, match="larger"):
                await call
        assert await storage.get_value("key") is None
        assert not storage._changes


async def test_keys_are_checked(storage: LogStorage) -> None:
    for call in (
        storage.set("", b""),
        storage.get_value("\0"),
        storage.claim("x" * 201, "mine", 1.0),
        storage.claim("key", "", 1.0),
        storage.append("", [b""]),
        anext(storage.watch_value("")),
    ):
        with pytest.raises(ConfigurationError):
            await call


async def test_nothing_works_before_the_start() -> None:
    storage = LogStorage(MemoryLog(Server()))
    claim = Claim("key", "mine", 0.0)
    for call in (
        storage.set("key", b""), storage.get_value("key"), storage.values(""),
        storage.claim("key", "mine", 1.0), storage.release(claim), storage.append("u", [b""]),
        storage.read("u", 0), storage.query(TaskQuery()), storage.delete(["u"]), storage.expire(),
        anext(storage.watch_value("key")),
    ):  # fmt: skip
        with pytest.raises(Closed):
            await call


# -- records: lists, deletion, expiry


@pytest.mark.parametrize("compacts", [True, False])
async def test_nothing_is_left_of_a_deleted_record(server: Server, compacts: bool) -> None:
    log = [MemoryLog(server, compacts=compacts) for _ in range(3)]
    async with started(server, log=log[0]) as storage, started(server, log=log[1]) as other:
        await storage.save([record(), record("process", execution="x"), record("success")])
        await other.append("u", [b"1", b"2"])
        await other.append("only a stream", [b"1"])
        assert await other.delete(["u", "u", "only a stream", "none"]) == 1
        assert await storage.get(["u"]) == [None]
        assert await storage.read("u", 0) == await storage.read("only a stream", 0) == []
        assert await storage.delete(["u", "only a stream"]) == 0
        await other.stop()
        await storage.read("u", 0)
        assert storage._store.records.subjects() == storage._store.records.streams() == []
    if compacts:
        compact(server)
        assert server.entries() == []
    async with started(server, log=log[2]) as fresh:
        assert await fresh.get(["u"]) == [None]
        assert await fresh.read("u", 0) == []


@pytest.mark.parametrize("compacts", [True, False])
async def test_an_expired_record_makes_way(server: Server, clock: Clock, compacts: bool) -> None:
    log = [MemoryLog(server, compacts=compacts) for _ in range(3)]
    final = record("success", execution="x", finished_at=clock.time())
    async with started(server, log=log[0]) as storage, started(server, log=log[1]) as other:
        await storage.save([final, record("new", "v")])
        await storage.append("u", [b"old"])
        (outcome,) = await other.save([record(execution="y")])
        assert (outcome.status, outcome.current) == ("refused", final)
        clock.ahead += 101.0
        assert await other.get(["u"]) == [None]
        assert (await other.query(TaskQuery())).tasks == [record("new", "v")]
        inbox = await other.inbox()
        await inbox.watch(["u"])
        batch = [record("process", "v"), record(execution="y"), record("process", execution="z")]
        assert await other.save(batch) == [DONE, DONE, DONE]
        await storage.append("u", [b"new"])
        (outcome,) = await other.save([record(execution="y")])
        assert outcome.current == batch[2]
        again = record("success", execution="z", finished_at=clock.time())
        assert await storage.save([again]) == [DONE]
        assert await inbox.receive() == [again]
    async with started(server, log=log[2]) as fresh:
        assert await fresh.get(["u", "v"]) == [again, batch[0]]
        assert await fresh.read("u", 0) == [(1, b"new")]


async def test_expire_deletes_what_is_over_and_streams_without_a_record(
    server: Server, clock: Clock
) -> None:
    async with started(server) as storage, started(server, retention=None) as keeps:
        assert keeps.guarantees.retention == float("inf")
        now = clock.time()
        await storage.save([
            record("success", "over", finished_at=now),
            record("success", "kept", finished_at=now, retention=500.0),
            record("process", "running"),
        ])  # fmt: skip
        for uuid in ("over", "kept", "running", "orphan"):
            await storage.append(uuid, [b"1"])
        assert await storage.expire() == 0
        clock.ahead += 101.0
        await storage.append("young orphan", [b"1"])
        assert await keeps.expire() == 0
        assert await storage.expire() == 1
        assert await storage.expire() == 0
        assert [task and task.uuid for task in await storage.get(["over", "kept", "running"])] == [
            None, "kept", "running",
        ]  # fmt: skip
        for uuid, items in (
            ("over", 0), ("orphan", 0), ("kept", 1), ("running", 1), ("young orphan", 1),
        ):  # fmt: skip
            assert len(await keeps.read(uuid, 0)) == items


async def test_expire_never_deletes_a_newer_record(server: Server, clock: Clock) -> None:
    async with started(server) as storage, started(server) as other:
        await storage.save([record("success", finished_at=clock.time())])
        clock.ahead += 101.0
        await storage.get(["u"])
        deletions = listing.deletions(storage._store.records, ["u"], 100.0)
        assert deletions
        assert await other.save([record()]) == [DONE]
        assert await storage._delete(deletions) == 0
        assert await other.get(["u"]) == [record()]


# -- everything at once


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    compacts=st.booleans(),
    faults=st.sampled_from([0.0, 0.01, 0.05]),
)
def test_processes_count_and_exclude_each_other_with_faults(
    seed: int, compacts: bool, faults: float
) -> None:
    asyncio.run(_processes(random.Random(seed), compacts, faults))


async def _processes(rng: random.Random, compacts: bool, faults: float) -> None:
    server = Server(partitions=2)
    calm = False

    def strikes() -> bool:
        return not calm and rng.random() < faults

    def log() -> MemoryLog:
        return MemoryLog(
            server,
            chunk=rng.randint(2, 10),
            append_lost=strikes,
            append_unknown=strikes,
            read_fails=strikes,
            mark_fails=strikes,
            pause=lambda: rng.choice([0.0, 0.0, 0.001]),
            compacts=compacts,
        )

    async def repeated(call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except Unavailable:
                continue

    inside: list[str] = []
    counted: set[bytes] = set()

    async def work(storage: LogStorage, name: str) -> None:
        for turn in range(6):
            await once(storage, f"{name}.{turn}")

    async def once(storage: LogStorage, mine: str) -> None:
        while await repeated(lambda: storage.claim("lock", mine, 1000.0)) is None:
            continue
        inside.append(mine)
        assert inside == [mine], "two owners at the same time"
        # Only the owner changes the count, so it finds out by reading what a failed set has done.
        there = await repeated(lambda: storage.get_value("count"))
        following = b"%d" % (int(there or b"0") + 1)

        async def step() -> None:
            if await storage.get_value("count") != following:
                assert await storage.set("count", following, expect=there)

        await repeated(step)
        assert following not in counted
        counted.add(following)
        inside.remove(mine)
        await repeated(lambda: storage.release(Claim("lock", mine, 0.0)))

    storages = [LogStorage(log()) for _ in range(3)]
    for storage in storages:
        await repeated(lambda storage=storage: storage.start("app"))  # type: ignore[misc]
    await asyncio.gather(*(work(storage, f"w{n}") for n, storage in enumerate(storages)))
    calm = True
    for storage in storages:
        assert await storage.get_value("count") == b"18"
    for storage in storages:
        await storage.stop()
    for partition in server.log("app"):
        partition.compact(rng.randint(0, partition.end), drop_tombstones=rng.randint(0, 20))
    async with started(server) as fresh:
        assert await fresh.get_value("count") == b"18"
        assert shared.claiming(fresh._store.claims, "lock", "anyone", 1.0) is not None
