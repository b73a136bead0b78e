"""LogStorage against a log in memory that loses answers, fails, lags and is compacted."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import product
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtasks_core import DONE, Status, Task
from qtasks_core.errors import Closed, ConfigurationError, NotSupported, Unavailable
from qtasks_core.records import FINAL, RANK, judge
from qtasks_core.wire import encode_task
from qtasks_log import Entry, LogStorage, reader
from tests.unit.memory_log import MemoryLog, Server

T = TypeVar("T")


def record(status: Status = "new", uuid: str = "u", **fields: object) -> Task:
    return Task(uuid=uuid, task_name="n", status=status, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def started(log: MemoryLog, namespace: str = "app") -> AsyncIterator[LogStorage]:
    storage = LogStorage(log)
    await storage.start(namespace)
    try:
        yield storage
    finally:
        await storage.stop()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def storage(server: Server) -> AsyncIterator[LogStorage]:
    async with started(MemoryLog(server)) as storage:
        yield storage


async def soon(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not within 5 s")


# -- save and get


async def test_save_then_get_from_another_process(storage: LogStorage, server: Server) -> None:
    async with started(MemoryLog(server)) as other:
        assert await storage.save([record(), record("success", "v")]) == [DONE, DONE]
        assert await other.get(["v", "u", "none"]) == [record("success", "v"), record(), None]


@pytest.mark.parametrize("first", RANK)
@pytest.mark.parametrize("second", RANK)
async def test_outcomes_follow_the_order_of_records(
    storage: LogStorage, first: Status, second: Status
) -> None:
    for number, (a, b, same) in enumerate(product((1, 2), (1, 2), (True, False))):
        one = record(first, str(number), attempt=a, execution="x")
        two = record(second, str(number), attempt=b, execution="x" if same else "y")
        assert await storage.save([one]) == [DONE]
        (outcome,) = await storage.save([two])
        judgement = judge(two, one)
        assert outcome.status == ("refused" if judgement == "refuse" else "done")
        assert outcome.current == (one if judgement == "refuse" else None)
        expected = two if judgement == "accept" else one
        assert await storage.get([str(number)]) == [expected]


async def test_one_batch_with_the_same_task_more_than_once(storage: LogStorage) -> None:
    batch = [record(), record("success", execution="x"), record("process"), record("success")]
    outcomes = await storage.save(batch)
    assert [outcome.status for outcome in outcomes] == ["done", "done", "refused", "refused"]
    assert [outcome.current for outcome in outcomes] == [None, None, batch[1], batch[1]]


async def test_nothing_to_do_costs_nothing(server: Server) -> None:
    log = MemoryLog(server)
    async with started(log) as storage:
        marks = log.marks
        assert await storage.save([]) == []
        assert await storage.get([]) == []
        assert (log.appends, log.marks) == (0, marks)


async def test_namespaces_never_meet(storage: LogStorage, server: Server) -> None:
    async with started(MemoryLog(server), "other app") as other:
        await storage.save([record("success")])
        assert await other.get(["u"]) == [None]


async def test_transactions_are_refused(storage: LogStorage) -> None:
    with pytest.raises(NotSupported):
        await storage.save([record()], transaction=object())


async def test_append_of_unknown_outcome_may_be_repeated(server: Server) -> None:
    unknown = iter([True, False])
    async with started(MemoryLog(server, append_unknown=lambda: next(unknown, False))) as storage:
        with pytest.raises(Unavailable):
            await storage.save([record("success", execution="x")])
        assert await storage.save([record("success", execution="x")]) == [DONE]
        assert await storage.save([record("success", execution="y")]) != [DONE]


async def test_what_the_log_does_not_take_is_refused_and_holds_up_no_other(server: Server) -> None:
    big = record("success", "big", returning=b"x" * 2000)
    async with started(MemoryLog(server, largest=1000)) as storage:
        outcomes = await storage.save([record("success", "a"), big, record("success", "b")])
        assert [outcome.status for outcome in outcomes] == ["done", "refused", "done"]
        assert outcomes[1].current is None
        assert "larger" in outcomes[1].reason
        assert (await storage.save([big]))[0].status == "refused"
        assert await storage.get(["a", "big"]) == [record("success", "a"), None]


async def test_cancelled_save_strands_nothing(storage: LogStorage) -> None:
    for turns in range(6):
        save = asyncio.create_task(storage.save([record("success", str(turns))]))
        for _ in range(turns):
            await asyncio.sleep(0)
        save.cancel()
        await asyncio.wait({save})
    assert not storage._saves
    assert await storage.save([record()]) == [DONE]


# -- get is fresh, and cheap when there are many


async def test_concurrent_gets_share_marks(server: Server) -> None:
    log = MemoryLog(server)
    async with started(log) as storage:
        await storage.save([record(uuid=str(n)) for n in range(100)])
        marks = log.marks
        found = await asyncio.gather(*(storage.get([str(n)]) for n in range(100)))
        assert found == [[record(uuid=str(n))] for n in range(100)]
        assert log.marks == marks + 1


async def test_get_does_not_share_a_mark_that_was_on_its_way(server: Server) -> None:
    """The mark may be from before a save that returned before this get began."""
    log = MemoryLog(server, pause=lambda: 0.02)
    async with started(log) as storage, started(MemoryLog(server)) as other:
        early = asyncio.create_task(storage.get(["u"]))
        await asyncio.sleep(0.03)
        await other.save([record()])
        assert await storage.get(["u"]) == [record()]
        assert await early in ([None], [record()])


async def test_cancelled_get_leaves_the_others_alone(storage: LogStorage) -> None:
    await storage.save([record()])
    gets = [asyncio.create_task(storage.get(["u"])) for _ in range(3)]
    await asyncio.sleep(0)
    gets[0].cancel()
    assert await asyncio.gather(*gets[1:]) == [[record()], [record()]]


# -- the reader


async def test_failed_read_is_told_and_the_next_call_goes_on(server: Server) -> None:
    broken = False
    async with (
        started(MemoryLog(server, read_fails=lambda: broken)) as storage,
        started(MemoryLog(server)) as other,
    ):
        broken = True
        with pytest.raises(Unavailable):
            await storage.save([record()])
        with pytest.raises(Unavailable):
            await storage.get(["u"])
        await other.save([record("success")])
        broken = False
        assert await storage.get(["u"]) == [record("success")]


async def test_log_that_gives_nothing_is_unavailable(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "STALLED", 0.05)
    thawed = asyncio.Event()
    thawed.set()

    class FrozenLog(MemoryLog):
        async def read(self) -> list[Entry]:
            await thawed.wait()
            return await super().read()

    async with started(FrozenLog(server)) as storage:
        thawed.clear()
        # The read under way still gets this one.
        assert await storage.save([record()]) == [DONE]
        with pytest.raises(Unavailable):
            await storage.save([record()])
        thawed.set()
        assert await storage.get(["u"]) == [record()]


async def test_start_fails_and_may_be_called_again(server: Server) -> None:
    broken = True
    storage = LogStorage(MemoryLog(server, mark_fails=lambda: broken))
    with pytest.raises(Unavailable):
        await storage.start("app")
    with pytest.raises(Closed):
        await storage.get(["u"])
    broken = False
    await storage.start("app")
    assert await storage.save([record()]) == [DONE]
    await storage.stop()


async def test_what_is_no_record_is_skipped(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    partition = server.log("app")[0]
    for number, value in enumerate([b"", b"\x01", b"\x02\x80", encode_task(record())[:-3]]):
        partition.append(Entry("u", f"foreign {number}", value))
    with caplog.at_level(logging.WARNING):
        async with started(MemoryLog(server)) as storage:
            assert storage.undecodable == 4
            assert await storage.get(["u"]) == [None]
            assert await storage.save([record()]) == [DONE]
    assert len(caplog.records) == 1


async def test_other_errors_of_the_log_reach_the_caller(server: Server) -> None:
    wrong = False

    def fails() -> bool:
        if wrong:
            raise ConfigurationError("wrong password")
        return False

    async with started(MemoryLog(server, read_fails=fails)) as storage:
        wrong = True
        with pytest.raises(ConfigurationError):
            await storage.save([record()])


# -- stop


async def test_stop_is_idempotent_and_ends_what_waits(server: Server) -> None:
    log = MemoryLog(server, pause=lambda: 0.02)
    storage = LogStorage(log)
    await storage.stop()
    await storage.start("app")
    inbox = await storage.inbox()
    waiting: list[Awaitable[object]] = [
        storage.get(["u"]),
        storage.save([record()]),
        inbox.receive(),
    ]
    tasks = [asyncio.ensure_future(each) for each in waiting]
    await asyncio.sleep(0.03)
    await storage.stop()
    for task in tasks:
        with pytest.raises(Closed):
            await task
    await storage.stop()
    for call in (storage.get(["u"]), storage.save([record()]), storage.inbox()):
        with pytest.raises(Closed):
            await call


async def test_started_again_it_reads_all_from_the_start(server: Server) -> None:
    storage = LogStorage(MemoryLog(server))
    for number in range(3):
        await storage.start("app")
        assert await storage.save([record(uuid=str(number))]) == [DONE]
        assert await storage.get(["0"]) == [record(uuid="0")]
        await storage.stop()


# -- tombstones


async def test_only_the_last_record_is_left_after_compaction(server: Server) -> None:
    async with started(MemoryLog(server)) as storage, started(MemoryLog(server)) as other:
        await storage.save([record()])
        await other.save([record("process", execution="x")])
        await other.save([record("success", execution="x")])
        await storage.save([record("cancel")])
        await storage.save([record("success", execution="x")])
    (partition,) = server.log("app")
    partition.compact(partition.end, drop_tombstones=partition.end)
    (left,) = server.entries()
    assert left.value == encode_task(record("success", execution="x"))
    async with started(MemoryLog(server)) as fresh:
        assert await fresh.get(["u"]) == [record("success", execution="x")]


async def test_without_compaction_no_tombstones_are_written(server: Server) -> None:
    log = MemoryLog(server, compacts=False)
    async with started(log) as storage, started(MemoryLog(server, compacts=False)) as other:
        won = record("success", execution="x")
        assert await storage.save([record(), record("process", execution="x"), won]) == [DONE] * 3
        (late,) = await other.save([record("success", execution="y")])
        assert (late.status, late.current) == ("refused", won)
        assert await storage.save([won]) == [DONE]
        assert await storage.get(["u"]) == await other.get(["u"]) == [won]
        assert log.appends == 2
    assert all(entry.value is not None for entry in server.entries())


async def test_tombstones_wait_for_a_log_that_is_unavailable(server: Server) -> None:
    broken = False
    async with started(MemoryLog(server, append_lost=lambda: broken)) as storage:
        await storage.save([record()])
        await storage.save([record("success")])
        broken = True
        await soon(lambda: storage._sweeper.task is not None and storage._sweeper.task.done())
        assert len(storage._sweeper.needless) == 1
        broken = False
    assert [entry.value is None for entry in server.entries()] == [False, False, True]


async def test_stop_does_not_depend_on_tombstones(server: Server) -> None:
    broken = False
    async with started(MemoryLog(server, append_lost=lambda: broken)) as storage:
        await storage.save([record()])
        await storage.save([record("success")])
        broken = True


# -- inbox


async def receive(inbox_receive: Awaitable[T]) -> T:
    async with asyncio.timeout(120):
        return await inbox_receive


async def test_inbox_gets_what_is_sent_to_its_address(storage: LogStorage, server: Server) -> None:
    inbox = await storage.inbox()
    inbox.expect(["u"])
    final = record("success", reply_to=inbox.address)
    async with started(MemoryLog(server)) as other:
        await other.save([record("process", reply_to=inbox.address), final])
        assert await receive(inbox.receive()) == [final]
        await other.save([record("cancel", reply_to=inbox.address)])
        await other.save([record("error", "v", reply_to=inbox.address)])
        assert await receive(inbox.receive()) == [record("error", "v", reply_to=inbox.address)]


async def test_inbox_gets_what_it_watches_before_during_and_after(
    storage: LogStorage, server: Server
) -> None:
    inbox = await storage.inbox()
    async with started(MemoryLog(server)) as other:
        await inbox.watch(["before"])
        await other.save([record("success", "before"), record("success", "after")])
        during = asyncio.create_task(other.save([record("success", "during")]))
        await inbox.watch(["during", "after"])
        await during
        arrived: set[str] = set()
        while arrived != {"before", "during", "after"}:
            arrived |= {task.uuid for task in await receive(inbox.receive())}


async def test_inbox_forgets(storage: LogStorage) -> None:
    inbox = await storage.inbox()
    await inbox.watch(["u", "v"])
    inbox.forget(["u", "unknown"])
    await storage.save([record("success", "u"), record("success", "v")])
    assert await receive(inbox.receive()) == [record("success", "v")]
    assert not storage._inboxes.watchers


async def test_two_inboxes_watch_the_same_task(storage: LogStorage) -> None:
    inboxes = [await storage.inbox(), await storage.inbox()]
    for inbox in inboxes:
        await inbox.watch(["u"])
    await storage.save([record("success")])
    for inbox in inboxes:
        assert await receive(inbox.receive()) == [record("success")]


async def test_cancelled_receive_loses_nothing(storage: LogStorage) -> None:
    inbox = await storage.inbox()
    arrived: set[str] = set()
    saves = [
        asyncio.create_task(storage.save([record("success", str(n), reply_to=inbox.address)]))
        for n in range(50)
    ]
    while len(arrived) < 50:
        waiting = asyncio.create_task(inbox.receive())
        for _ in range(random.randint(0, 4)):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        if not waiting.cancelled():
            arrived |= {task.uuid for task in waiting.result()}
    await asyncio.gather(*saves)


async def test_inbox_misses_nothing_while_the_log_is_unavailable(server: Server) -> None:
    broken = False
    async with (
        started(MemoryLog(server, read_fails=lambda: broken)) as storage,
        started(MemoryLog(server)) as other,
    ):
        inbox = await storage.inbox()
        await inbox.watch(["before"])
        broken = True
        await other.save([record("success", "before")])
        with pytest.raises(Unavailable):
            await receive(inbox.receive())
        await other.save([record("success", "sent", reply_to=inbox.address)])
        await inbox.watch(["watched"])
        await other.save([record("success", "watched")])
        with pytest.raises(Unavailable):
            await receive(inbox.receive())
        broken = False
        arrived: set[str] = set()
        while len(arrived) < 3:
            arrived |= {task.uuid for task in await receive(inbox.receive())}


async def test_closed_inbox(storage: LogStorage) -> None:
    inbox = await storage.inbox()
    await inbox.watch(["u"])
    waiting = asyncio.create_task(inbox.receive())
    await asyncio.sleep(0)
    await inbox.close()
    await inbox.close()
    for call in (waiting, inbox.receive(), inbox.watch(["v"])):
        with pytest.raises(Closed):
            await call
    assert not storage._inboxes.watchers
    await storage.save([record("success", reply_to=inbox.address)])


# -- everything at once


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    partitions=st.integers(1, 3),
    faults=st.sampled_from([0.0, 0.01, 0.05]),
)
def test_many_writers_with_faults_agree(seed: int, partitions: int, faults: float) -> None:
    asyncio.run(_many_writers(random.Random(seed), partitions, faults))


async def _many_writers(rng: random.Random, partitions: int, faults: float) -> None:
    server = Server(partitions)
    calm = False

    def strikes() -> bool:
        return not calm and rng.random() < faults

    def log() -> MemoryLog:
        return MemoryLog(
            server,
            chunk=rng.randint(3, 20),
            append_lost=strikes,
            append_unknown=strikes,
            read_fails=strikes,
            mark_fails=strikes,
            pause=lambda: rng.choice([0.0, 0.0, 0.0, 0.001]),
        )

    async def repeated(call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except Unavailable:
                continue

    uuids = [f"u{n}" for n in range(4)]
    finals: defaultdict[str, set[bytes]] = defaultdict(set)

    async def writes(storage: LogStorage, name: str) -> None:
        for number in range(10):
            batch = [
                record(
                    rng.choice(list(RANK)),
                    rng.choice(uuids),
                    attempt=rng.randint(1, 3),
                    execution=f"{name}.{number}",
                )
                for _ in range(rng.randint(1, 3))
            ]
            outcomes = await repeated(lambda batch=batch: storage.save(batch))  # type: ignore[misc]
            for task, outcome in zip(batch, outcomes, strict=True):
                if outcome.status == "done" and task.status in FINAL:
                    finals[task.uuid].add(encode_task(task))
            if rng.random() < 0.2:
                await repeated(lambda: storage.get(uuids))

    storages = [LogStorage(log()) for _ in range(3)]
    for storage in storages:
        await repeated(lambda storage=storage: storage.start("app"))  # type: ignore[misc]
    await asyncio.gather(*(writes(storage, f"w{n}") for n, storage in enumerate(storages)))
    calm = True
    found = [await storage.get(uuids) for storage in storages]
    assert found[0] == found[1] == found[2]
    for storage in storages:
        await storage.stop()
    for partition in server.log("app"):
        partition.compact(rng.randint(0, partition.end), drop_tombstones=rng.randint(0, 20))
    async with started(MemoryLog(server)) as fresh:
        assert await fresh.get(uuids) == found[0]
    for uuid, task in zip(uuids, found[0], strict=True):
        if task is not None and task.status in FINAL:
            assert finals[uuid] == {encode_task(task)}
        else:
            assert uuid not in finals
