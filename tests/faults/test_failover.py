"""A primary of Redis dies under load, and Sentinels promote its replica."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from qtasks.testing.recipes import PASSWORD
from tests.e2e.crash import Setting
from tests.faults.load import loaded
from tests.pairs import LEASES, Pair, with_lease
from tests.redis.test_finding import SERVICE, OwnSentinel, fields, sentinel_url
from tests.redis.test_roles import OwnRedis, follow, port, until
from tests.services import Service

PAUSE = 600_000
"""Milliseconds; the server is killed long before."""


@pytest.fixture
def watched() -> Iterator[tuple[list[Service], list[Service]]]:
    """Two servers, and three Sentinels that watch the first one."""
    with ExitStack() as stack:

        def started(service: Service) -> Service:
            stack.callback(service.stop)
            service.start()
            return service

        servers = [started(OwnRedis()) for _ in range(2)]
        yield servers, [started(OwnSentinel(port(servers[0]))) for _ in range(3)]


async def test_a_failover_by_sentinels(
    watched: tuple[list[Service], list[Service]], tmp_path: Path
) -> None:
    """What a replica has not got is lost with its primary, so the last writes get no answer."""
    servers, sentinels = watched
    url = sentinel_url(sentinels)
    lease = LEASES["redis"]
    async with (
        Redis.from_url(servers[0].url) as first,
        Redis.from_url(servers[1].url) as second,
        Redis(host="127.0.0.1", port=port(sentinels[0]), password="watcher") as watcher,
    ):
        await first.config_set("masterauth", PASSWORD)
        await follow(second, servers[0])

        async def known() -> bool:
            told = fields(await watcher.execute_command("SENTINEL", "MASTER", SERVICE))  # type: ignore[no-untyped-call]
            replica = (await first.info("replication")).get("slave0", {})
            others = int(told["num-other-sentinels"])
            return replica.get("state") == "online" and int(told["num-slaves"]) > 0 and others == 2

        async def in_step() -> bool:
            written = (await first.info("replication"))["master_repl_offset"]
            return bool((await second.info("replication"))["slave_repl_offset"] >= written)

        async def promoted() -> bool:
            try:
                return bool((await second.info("replication"))["role"] == "master")
            except RedisError:
                return False  # Sentinels close the connections of the server that they promote

        async with asyncio.timeout(240):
            await until(known)
        setting = Setting(Pair(with_lease(url, lease), url, lease), tmp_path)
        async with loaded(setting) as load:
            await first.execute_command("CLIENT", "PAUSE", PAUSE, "WRITE")  # type: ignore[no-untyped-call]
            async with asyncio.timeout(240):
                await until(in_step)
                await asyncio.to_thread(servers[0].kill)
                await until(promoted)
            await load.goes_on()
