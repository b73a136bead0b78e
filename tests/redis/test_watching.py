"""Tasks of other clients: savers push their records only while an inbox asks for it."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks_core import DONE, Task
from qtasks_redis import RedisStorage, inbox
from qtasks_redis.keys import WATCHED


def final() -> Task:
    return Task(uuid=str(uuid4()), task_name="a", status="success")


async def test_a_record_is_pushed_to_watchers_only_if_there_are_any(
    storage: RedisStorage, server: Redis
) -> None:
    async def pushes() -> int:
        stats = await server.info("commandstats")
        calls: int = stats.get("cmdstat_publish", {}).get("calls", 0)
        return calls

    before = await pushes()
    assert await storage.save([final() for _ in range(10)]) == [DONE] * 10
    assert await pushes() == before
    awaited = final()
    watcher = await storage.inbox()
    await watcher.watch([awaited.uuid])
    assert await storage.save([awaited]) == [DONE]
    assert await watcher.receive() == [awaited]
    assert await pushes() == before + 1


async def test_what_was_not_pushed_is_read(
    storage: RedisStorage, server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request of a process that was frozen runs out, and a failover may lose it."""
    monkeypatch.setattr(inbox, "_PING_AFTER", 0.1)
    awaited = final()
    watcher = await storage.inbox()
    await watcher.watch([awaited.uuid])
    assert await server.delete(storage.started().key(WATCHED, "")) == 1
    assert await storage.save([awaited]) == [DONE]
    receiving = asyncio.create_task(watcher.receive())
    done, _ = await asyncio.wait({receiving}, timeout=0.5)
    assert not done, "nobody has asked for it"
    monkeypatch.setattr(inbox, "_ASK_AGAIN_AFTER", 0.0)
    async with asyncio.timeout(30):
        assert await receiving == [awaited]
