"""The stream of the records is rewritten: what is left of it, and who reads it afterwards."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qtasks_core import DONE, Task, TaskQuery
from qtasks_core.errors import Unavailable
from qtasks_log import rewriting
from qtasks_log import storage as storage_module
from qtasks_log.rewriting import KEY
from qtasks_rabbitmq import RabbitMQLog, RabbitMQStorage
from qtasks_rabbitmq.topology import Names
from tests.processes import PATIENCE, Process
from tests.rabbitmq.operator import operator
from tests.rabbitmq.stream_app import STEPS, patient
from tests.services.rabbitmq import RabbitMQServer

USUAL = {"copied in part", "after the turn", "before a deletion"}
"""The steps that are tried in every run."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrite small logs too."""
    monkeypatch.setattr(rewriting, "SMALL", 0)


@asynccontextmanager
async def started(url: str, namespace: str, **options: Any) -> AsyncIterator[RabbitMQStorage]:
    storage = RabbitMQStorage(url, **options)
    await patient(storage.start, namespace)
    try:
        yield storage
    finally:
        await storage.stop()


def record(uuid: str, status: str = "success", **fields: Any) -> Task:
    return Task(uuid=uuid, task_name="n", status=status, **fields)  # type: ignore[arg-type]


def log_of(storage: RabbitMQStorage) -> RabbitMQLog:
    assert isinstance(storage._log, RabbitMQLog)
    return storage._log


async def churn(storage: RabbitMQStorage, times: int = 60) -> None:
    """Overwrite a value, so that most of the log counts no more."""
    for number in range(times):
        await patient(storage.set, "churn", b"%d" % number * 200)


async def rewrite(storage: RabbitMQStorage, times: int = 1) -> None:
    """Let the log go on in another stream, and delete what is not needed any more."""
    for _ in range(times):
        before = log_of(storage).name
        while log_of(storage).name == before:
            await churn(storage)
            await patient(storage.expire)
        await patient(storage.expire)


def streams(server: RabbitMQServer, namespace: str) -> set[str]:
    """Return the names of all streams of a log, but that of the pointers."""
    log = f"{Names(namespace).log}:"
    lines = server.control("list_queues", "--no-table-headers", "name").splitlines()
    return {line.strip().removeprefix(log) for line in lines if line.strip().startswith(log)}


async def entries_of(url: str, namespace: str) -> tuple[int, int]:
    """Return how many entries and bytes a reader reads that starts now."""
    log = RabbitMQLog(url)
    await log.start(namespace)
    try:
        mark, entries = await log.mark(), 0
        while not log.reached(mark):
            entries += len(await log.read())
        return entries, log.size
    finally:
        await log.stop()


async def test_it_stays_bounded(
    rabbitmq_server: RabbitMQServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "GRACE", 0.0)
    url = rabbitmq_server.url
    sizes: list[tuple[int, int]] = []
    async with started(url, namespace, retention=0.0) as storage:
        kept = [record(f"kept{n}", "process", args=b"x" * 100) for n in range(20)]
        assert await storage.save(kept) == [DONE] * 20
        for round_ in range(20):
            uuids = [f"{round_}.{n}" for n in range(50)]
            await storage.save([record(uuid, "new") for uuid in uuids])
            await storage.save([record(uuid) for uuid in uuids])
            await storage.append(uuids[0], [b"item"])
            await storage.set(f"deleted{round_}", b"1")
            await storage.set(f"deleted{round_}", None)
            claim = await storage.claim(f"released{round_}", "one", 600.0)
            assert claim is not None
            await storage.release(claim)
            await storage.set("value", b"%d" % round_)
            assert await storage.expire() == 50
            sizes.append(await entries_of(url, namespace))
        # Each round writes some 160 entries. It takes up to three calls of `expire` to rewrite.
        assert max(entries for entries, _ in sizes) < 800
        assert max(size for _, size in sizes) < 8 * min(size for _, size in sizes)
        await rewrite(storage, 2)
        assert len(streams(rabbitmq_server, namespace)) == 2
        # The records, two values and the names of the copies; and what `rewrite` wrote.
        entries, _ = await entries_of(url, namespace)
        assert entries < 20 + 60 + 15
        assert await storage.get(["kept0", "19.0"]) == [kept[0], None]
    async with started(url, namespace) as fresh:
        assert await fresh.get([task.uuid for task in kept]) == kept
        assert await fresh.get_value("value") == b"19"
        assert set(await fresh.values("")) == {"value", "churn", KEY}
        assert len((await fresh.query(TaskQuery(limit=100))).tasks) == 20


async def test_the_winners_are_the_same_in_the_new_stream(
    rabbitmq_server: RabbitMQServer, namespace: str
) -> None:
    url = rabbitmq_server.url
    async with started(url, namespace) as one, started(url, namespace) as two:
        await one.save([record("won", "process", execution="x"), record("deleted")])
        await asyncio.gather(
            one.save([record("won", execution="x")]), two.save([record("won", "cancel")])
        )
        (won,) = await one.get(["won"])
        assert won is not None
        assert await two.delete(["deleted"]) == 1
        await two.append("won", [b"1", b"2"])
        assert await one.claim("claim", "one", 600.0) is not None
        assert await two.claim("claim", "two", 600.0) is None
        await one.set("gone", b"1")
        await one.set("gone", None)
        await rewrite(one, 2)
        for reader in (one, two):
            assert await patient(reader.get, ["won", "deleted"]) == [
                won,
                None,
            ]
        async with started(url, namespace) as late:
            assert await late.get(["won", "deleted"]) == [won, None]
            assert await late.read("won", 0) == [(1, b"1"), (2, b"2")]
            assert await late.claim("claim", "two", 600.0) is None
            assert await late.claim("claim", "one", 600.0) is not None
            assert await two.claim("claim", "two", 600.0) is None
            (again,) = await late.save([record("won", "cancel", execution="y")])
            assert again.current == won
            # A change that follows the deletion of a value wins for all or for nobody.
            assert await late.set("gone", b"2", expect=None)
            assert not await two.set("gone", b"3", expect=None)
            assert await one.get_value("gone") == b"2"


async def test_writers_lose_nothing_while_the_log_is_rewritten(
    rabbitmq_server: RabbitMQServer, namespace: str
) -> None:
    """Nothing is recorded twice either: a counter shows both."""
    url = rabbitmq_server.url
    counted = 0
    saved: list[str] = []
    finals: dict[str, list[int]] = {}
    ended = asyncio.Event()

    async def write(storage: RabbitMQStorage, who: int) -> None:
        nonlocal counted
        number = 0
        while not ended.is_set():
            number += 1
            uuid = f"{who}.{number}"
            assert await storage.save([record(uuid, "new"), record(uuid)]) == [DONE, DONE]
            saved.append(uuid)
            await storage.append(f"items{who}", [b"%d" % number])
            value = await storage.get_value("counter")
            if await storage.set("counter", b"%d" % (int(value or b"0") + 1), expect=value):
                counted += 1
            (outcome,) = await storage.save([record(f"all.{number}", execution=str(who))])
            if outcome.status == "done":
                finals.setdefault(f"all.{number}", []).append(who)
        numbers = [item for _, item in await storage.read(f"items{who}", 0)]
        assert numbers == [b"%d" % n for n in range(1, number + 1)]

    async with started(url, namespace) as one, started(url, namespace) as two:
        async with (
            asyncio.timeout(5 * PATIENCE),
            started(url, namespace) as three,
            asyncio.TaskGroup() as group,
        ):
            for who, storage in enumerate((one, two, three)):
                group.create_task(write(storage, who))
            await rewrite(three, 4)
            ended.set()
        async with started(url, namespace) as fresh:
            assert await fresh.get_value("counter") == b"%d" % counted
            assert None not in await fresh.get(saved)
            for uuid, winners in finals.items():
                (found,) = await fresh.get([uuid])
                assert found is not None
                assert [str(who) for who in winners] == [found.execution]
        assert counted
        assert len(saved) > 20


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "frozen"])
@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=[] if step in USUAL else [pytest.mark.full]) for step in STEPS],
)
async def test_a_rewriter_stops_at_any_step(
    rabbitmq_server: RabbitMQServer, namespace: str, step: str, killed: bool
) -> None:
    """Another one finishes, and the one that was frozen goes on as if nothing had happened."""
    environment = {
        "STREAM_URL": rabbitmq_server.url,
        "STREAM_NAME": namespace,
        "STREAM_DOES": "rewrite",
        "STREAM_STEP": step,
    }
    async with started(rabbitmq_server.url, namespace) as storage:
        await storage.save([record("kept")])
        await churn(storage)
        # A deletion comes only after a second turn.
        await rewrite(storage)
        await churn(storage)
        with Process("-m", "tests.rabbitmq.stream_app", environment=environment) as child:
            await asyncio.to_thread(child.wait_for, f"frozen at {step}")
            if killed:
                child.kill()
            await patient(storage.save, [record("while it was frozen")])
            await rewrite(storage, 3)
            if not killed:
                child.signal(signal.SIGCONT)
                await asyncio.to_thread(child.wait_for, "well")
                assert "found [True, True]" in child.output()
                child.wait()
                expected = ["kept", "while it was frozen", "of the frozen one"]
            else:
                expected = ["kept", "while it was frozen"]
        assert None not in await patient(storage.get, expected)
        async with started(rabbitmq_server.url, namespace) as fresh:
            assert None not in await fresh.get(expected)
        await rewrite(storage, 1)
        log = log_of(storage)
        left = streams(rabbitmq_server, namespace)
        assert left <= {log.name, log._target.base}
        assert set((await storage.get_value(KEY) or b"").decode().strip('[]"').split('","')) == left


async def test_a_frozen_writer_comes_back_after_the_switch(
    rabbitmq_server: RabbitMQServer, namespace: str
) -> None:
    environment = {
        "STREAM_URL": rabbitmq_server.url,
        "STREAM_NAME": namespace,
        "STREAM_DOES": "write",
    }
    async with started(rabbitmq_server.url, namespace) as storage:
        with Process("-m", "tests.rabbitmq.stream_app", environment=environment) as child:
            for round_ in range(3):
                await asyncio.to_thread(child.wait_for, f"saved {child.pid}.{round_ * 20 + 10}\n")
                child.signal(signal.SIGSTOP)
                # Its stream still exists after the first time, and is deleted after the others.
                await rewrite(storage, round_ + 1)
                child.signal(signal.SIGCONT)
            await asyncio.to_thread(child.wait_for, f"saved {child.pid}.70\n")
            child.kill()
            said = [line.split() for line in child.output().splitlines()]
        saved = [words[1] for words in said if words[0] == "saved"]
        appended = [words[1].encode() for words in said if words[0] == "appended"]
        async with started(rabbitmq_server.url, namespace) as fresh:
            for reader in (storage, fresh):
                assert None not in await patient(reader.get, saved)
                items = [item for _, item in await reader.read(str(child.pid), 0)]
                assert sorted(set(items), key=int) == items
                assert set(appended) <= set(items)


async def test_what_was_kept_is_used_while_its_stream_exists(
    rabbitmq_server: RabbitMQServer,
    namespace: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "qtasks.log")
    url = rabbitmq_server.url
    anew = "is read anew"
    async with started(url, namespace) as other:
        async with started(url, namespace, directory=tmp_path) as kept:
            await kept.save([record("u")])
        await rewrite(other)
        async with started(url, namespace, directory=tmp_path) as kept:
            assert log_of(kept).name == log_of(other).name
            assert await kept.get(["u"]) == [record("u")]
        assert anew not in caplog.text
        await other.delete(["u"])
        await rewrite(other, 2)
        async with started(url, namespace, directory=tmp_path) as kept:
            assert await kept.get(["u"]) == [None]
            await kept.save([record("v")])
        assert anew in caplog.text
        caplog.clear()
        async with started(url, namespace, directory=tmp_path) as kept:
            assert await kept.get(["v"]) == await other.get(["v"]) == [record("v")]
        assert anew not in caplog.text


async def test_who_may_not_create_a_stream_rewrites_nothing(
    rabbitmq_server: RabbitMQServer,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with started(rabbitmq_server.url, namespace) as storage:
        ours = f"^qtasks:{namespace}:"
        password = "p"
        rabbitmq_server.control("add_user", namespace, password)
        rabbitmq_server.control("set_permissions", namespace, "^$", rf"{ours}|^amq\.default$", ours)
        try:
            user = rabbitmq_server.url.replace("guest:guest", f"{namespace}:{password}")
            async with started(user, namespace) as limited:
                await limited.save([record("u")])
                await churn(limited)
                for _ in range(3):
                    await limited.expire()
                assert log_of(limited).name.startswith("0:")
                assert "grows for ever" in caplog.text
            assert await storage.get(["u"]) == [record("u")]
        finally:
            rabbitmq_server.control("delete_user", namespace)


async def test_a_lost_stream_is_told_until_its_name_is_deleted_too(
    rabbitmq_server: RabbitMQServer, namespace: str
) -> None:
    async with started(rabbitmq_server.url, namespace) as storage:
        await storage.save([record("u")])
        log = Names(namespace).log
        async with operator(rabbitmq_server.url) as channel:
            await channel.queue_delete(f"{log}:{log_of(storage).name}")
            said = ""
            async with asyncio.timeout(PATIENCE):
                while f"delete the stream {log} too" not in said:
                    with pytest.raises(Unavailable) as raised:
                        await storage.get(["u"])
                    said = str(raised.value)
                    await asyncio.sleep(0.05)
            await channel.queue_delete(log)
        assert await patient(storage.get, ["u"]) == [None]
        assert await storage.save([record("u")]) == [DONE]
