"""The connection that listens for all iterators, inboxes and receivers of a part."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from qtasks_postgres.connection import Database, Listener
from tests.services import Service


async def test_a_channel_is_requested_again_while_it_is_given_up(
    postgres_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker subscribes to its queue anew. It must hear the next notification."""
    database = Database(postgres_server.url)
    await database.start({})
    listener = Listener(database)
    await listener.start()
    channels = [str(uuid4()), str(uuid4())]
    given_up, proceed = asyncio.Event(), asyncio.Event()
    remove = asyncpg.Connection.remove_listener

    async def slowly(connection: asyncpg.Connection, *args: Any) -> None:
        given_up.set()
        await proceed.wait()
        await remove(connection, *args)

    monkeypatch.setattr(asyncpg.Connection, "remove_listener", slowly)
    heard: asyncio.Queue[str | None] = asyncio.Queue()
    try:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            await listener.listen(channels, lambda _: None)
            listener._callbacks.clear()
            group.create_task(listener._unlisten())
            await given_up.wait()
            listening = group.create_task(listener.listen(channels, heard.put_nowait))
            await asyncio.sleep(0)  # it has begun
            proceed.set()
            await listening
            for channel in channels:
                await database.fetch("SELECT pg_notify($1, $1)", channel)
            assert {await heard.get(), await heard.get()} == set(channels)
    finally:
        await listener.stop()
        await database.stop()
