"""A result that its storage does not take: one run, an error that names the limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka.admin import NewTopic
from uuid_utils import uuid4

from qtasks.asyncio import QueueTasks
from qtasks_conformance.waiting import assert_silent
from qtasks_core.lookup import resolve_broker
from qtasks_kafka.connection import topic_name
from tests.e2e.large_app import echo, router
from tests.pairs import pair_of
from tests.processes import Process, until
from tests.services.kafka import asking
from tests.services.rabbitmq import RabbitMQServer

LIMIT = 2**20
"""Bytes that the storage takes of one record."""
SIZE = 700_000
"""Characters of a text that fits once, as the arguments, and not twice."""
NEIGHBOURS = 20
STORAGES = ("kafka", "rabbitmq", "sqlite+kafka", "sqlite+rabbitmq")


@asynccontextmanager
async def limited(request: pytest.FixtureRequest, storage: str, name: str) -> AsyncIterator[None]:
    """Have the server take no larger record, from before it is first used."""
    server = request.getfixturevalue(f"{storage}_server")
    if storage == "kafka":
        configs = {"max.message.bytes": str(LIMIT), "retention.ms": "-1"}
        topic = NewTopic(topic_name(name, "records"), 2, 1, topic_configs=configs)
        async with asking(server.url) as admin:
            await admin.create_topics([topic])
        yield
        return
    assert isinstance(server, RabbitMQServer)
    server.control("eval", f"application:set_env(rabbit, max_message_size, {LIMIT}).")
    try:
        yield
    finally:
        server.control("eval", "application:unset_env(rabbit, max_message_size).")


@pytest.mark.parametrize("names", STORAGES)
async def test_a_result_over_the_storages_limit(
    request: pytest.FixtureRequest, tmp_path: Path, names: str
) -> None:
    pair, name, log = pair_of(request, names, tmp_path), f"t{uuid4().hex[:12]}", tmp_path / "log"
    environment = {**pair.environment, "QTASKS_NAME": name, "LARGE_LOG": str(log)}
    app = QueueTasks(name, broker=pair.broker, storage=pair.storage)
    app.include_router(router)
    async with limited(request, names.rpartition("+")[2], name), app:
        with Process("-m", "tests.e2e.large_app", environment=environment) as workers:
            await asyncio.to_thread(
                until, lambda: workers.output().count("knows echo") == 2, "two workers"
            )
            texts = ["x" * SIZE, *(str(number) for number in range(NEIGHBOURS))]
            handles = await echo.map([(text,) for text in texts])
            large, *others = [await handle.wait_result(timeout=60) for handle in handles]
            assert workers.terminate() == 0
            said = workers.output()
    # All of it was acknowledged: nothing comes again once the workers' leases are over.
    broker = resolve_broker(pair.broker)
    await broker.start(name)
    try:
        await assert_silent(await broker.subscribe({"default": 10}), 1.5 * pair.lease, "default")
    finally:
        await broker.stop()
    assert (large.status, large.dead) == ("error", "unstorable result")
    assert any(str(size) in str(large.error) for size in (LIMIT, LIMIT - 1024)), large.error
    assert [other.returning for other in others] == texts[1:]
    runs = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(size) for size, _ in runs) == sorted(map(len, texts))
    assert said.count("knows echo") == 2, "a worker was started again"
    assert "failed" not in said
    assert "Traceback" not in said
