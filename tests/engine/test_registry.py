"""The registry, commands and retention: what a worker does beside its tasks."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import pairwise

import msgspec
import pytest

from qtasks import NotSupported, TaskTimeout
from qtasks.asyncio import QueueTasks
from qtasks.client import registry
from qtasks.client.client import Client
from qtasks.control import workers
from qtasks.worker import consumer, retention
from qtasks_core import Command, WorkerInfo
from qtasks_memory import MemoryBroker, MemoryStorage


async def test_workers_are_in_the_registry_while_they_live(app: QueueTasks) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    @app.task(queue="mail")
    async def send() -> None:
        begun.set()
        await go_on.wait()

    async with app:
        async with app.worker(concurrency=7) as running:
            task = await send.add_task()
            await begun.wait()
            await app.control(lambda client: client.broker.broadcast(Command(name="ping")))
            async with asyncio.timeout(120):
                while not [w for w in await app.control(workers) if w.running]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            (info,) = await app.control(workers)
            go_on.set()
        assert info.id == running.id
        assert (info.queues, info.concurrency) == (("default", "mail"), 7)
        assert [(r.uuid, r.task_name) for r in info.running] == [(task.uuid, send.name)]
        assert abs(info.seen_at - time.time()) < 10
        assert await app.control(workers) == []


async def test_a_silent_worker_is_taken_for_dead(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task()
    async def work() -> None:
        await asyncio.sleep(60)

    async with app, app.worker(grace=0):
        async with asyncio.timeout(120):
            while not await app.control(workers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(TaskTimeout, match=r"1 alive for that queue$"):
            await work.add_task(timeout=0.3)
        monkeypatch.setattr(registry, "STALE", -1.0)
        assert await app.control(workers) == []
        with pytest.raises(TaskTimeout, match="no worker for that queue is alive"):
            await work.add_task(timeout=0.3)


async def test_workers_that_were_killed_long_ago_are_forgotten(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PERIOD", 0.1)
    silent = {"worker/long": time.time() - 3700, "worker/lately": time.time() - 60}

    async def write(client: Client) -> None:
        for key, seen_at in silent.items():
            info = WorkerInfo(id=key, host="there", pid=1, seen_at=seen_at)
            await client.storage.set(key, msgspec.msgpack.encode(info))

    async def written(client: Client) -> set[str]:
        return set(await client.storage.values("worker/"))

    async with app:
        await app.control(write)
        async with app.worker() as running, asyncio.timeout(120):
            while "worker/long" in await app.control(written):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert await app.control(written) == {"worker/lately", f"worker/{running.id}"}


async def test_a_storage_without_values_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(MemoryStorage):
        async def set(self, key, value, expect=None):  # type: ignore[no-untyped-def]
            raise NotSupported("Plain has no shared values")

        async def values(self, prefix: str) -> dict[str, bytes]:
            raise NotSupported("Plain has no shared values")

    caplog.set_level(logging.INFO)
    app = QueueTasks("plain", MemoryBroker("plain"), Plain("plain"))

    @app.task()
    async def work() -> None: ...

    async with app:
        with pytest.raises(TaskTimeout, match="whether a worker is alive is not known"):
            await work.add_task(timeout=0.05)
        async with app.worker():
            await work.add_task(timeout=120)
    said = [r for r in caplog.records if "no registry of workers: Plain" in r.getMessage()]
    assert len(said) == 1


async def test_a_paused_queue_rests_and_the_others_go_on(app: QueueTasks) -> None:
    @app.task(queue="resting")
    async def one() -> int:
        return 1

    @app.task(queue="working")
    async def two() -> int:
        return 2

    async def tell(name: str, target: str | None) -> None:
        await app.control(lambda c: c.broker.broadcast(Command(name=name, target=target)))

    async with app, app.worker():
        assert (await one.add_task(timeout=120)).returning == 1
        await tell("pause", "resting")
        await asyncio.sleep(0.1)
        resting = await one.add_task()
        assert (await two.add_task(timeout=120)).returning == 2
        with pytest.raises(TaskTimeout):
            await resting.wait_result(0.2)
        await tell("pause", None)
        await asyncio.sleep(0.1)
        other = await two.add_task()
        with pytest.raises(TaskTimeout):
            await other.wait_result(0.2)
        await tell("resume", None)
        assert (await resting.wait_result(120)).returning == 1
        assert (await other.wait_result(120)).returning == 2


async def test_old_records_are_deleted_by_one_worker_at_a_time(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PERIOD", 0.1)
    monkeypatch.setattr(consumer, "LEASES", 0.0)

    @app.task(retention=0.2)
    async def brief() -> None: ...

    @app.task()
    async def lasting() -> None: ...

    async with app:
        calls: list[float] = []
        expire = app.client.storage.expire

        async def counted() -> int:
            calls.append(time.monotonic())
            return await expire()

        monkeypatch.setattr(app.client.storage, "expire", counted)
        async with app.worker(), app.worker(), app.worker():
            short, long = await brief.add_task(timeout=120), await lasting.add_task(timeout=120)
            async with asyncio.timeout(120):
                while await app.get(short.uuid) is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert await app.get(long.uuid) is not None
            await asyncio.sleep(0.5)
    gaps = [b - a for a, b in pairwise(calls)]
    assert calls
    assert min(gaps, default=1.0) > 0.04, "one of the three does it, as long as it lives"


async def test_what_fails_beside_the_tasks_does_not_stop_them(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task()
    async def work() -> int:
        return 1

    async def broken(*_: object) -> bool:
        raise ValueError("a defect")

    async with app:
        monkeypatch.setattr(app.client.storage, "set", broken)
        async with app.worker():
            assert (await work.add_task(timeout=120)).returning == 1
    assert "the registry of workers failed" in caplog.text
