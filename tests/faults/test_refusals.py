"""Servers that answer and refuse: full, read-only, or with an alarm. Work waits, and goes on."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from qtasks.testing.errors import Unobtainable
from tests.conftest import serve
from tests.e2e.crash import Setting
from tests.faults.load import Load, loaded
from tests.pairs import LEASES, Pair, with_lease
from tests.processes import until
from tests.services import PostgresServer, RabbitMQServer, Service
from tests.services.postgres import NativePostgres
from tests.services.service import Way

Call = Callable[[], Awaitable[object]]
DISK = 300
"""MiB of the small disk. The database needs some 40 of them, and its log at most 80."""


def setting_of(url: str, scheme: str, tmp_path: Path) -> Setting:
    lease = LEASES[scheme]
    return Setting(Pair(with_lease(url, lease), url, lease), tmp_path)


@asynccontextmanager
async def refusing(load: Load, begin: Call, end: Call, said: str = "") -> AsyncIterator[None]:
    """Let the server refuse for the block, which begins once a client was told `said`."""

    def refused() -> int:
        return sum(times for error, times in load.refusals.items() if said in error)

    before = refused()
    await begin()
    try:
        async with asyncio.timeout(120):
            while refused() == before:  # noqa: ASYNC110  nothing tells
                await asyncio.sleep(0.05)
        yield
    finally:
        await end()
    await load.goes_on()


@pytest.fixture
async def redis_client(redis_server: Service) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_server.url)
    yield client
    await client.aclose()


async def test_redis_at_maxmemory(
    redis_server: Service, redis_client: Redis, tmp_path: Path
) -> None:
    async with loaded(setting_of(redis_server.url, "redis", tmp_path)) as load:
        full = refusing(
            load,
            lambda: redis_client.config_set("maxmemory", "1mb"),
            lambda: redis_client.config_set("maxmemory", "0"),
            "raise maxmemory",
        )
        async with full:
            pass


async def test_a_replica_behind_the_url_of_redis(
    redis_server: Service, redis_client: Redis, tmp_path: Path
) -> None:
    async with loaded(setting_of(redis_server.url, "redis", tmp_path)) as load:
        replica = refusing(
            load,
            lambda: redis_client.replicaof("127.0.0.1", "1"),  # nobody is there
            lambda: redis_client.replicaof("NO", "ONE"),
            "name the primary",
        )
        async with replica:
            pass


@pytest.mark.full
async def test_an_alarm_of_rabbitmq(rabbitmq_server: RabbitMQServer, tmp_path: Path) -> None:
    """The server stops reading from connections that publish: an outage, not a hang."""

    def memory(fraction: str) -> Call:
        return lambda: asyncio.to_thread(
            rabbitmq_server.control, "set_vm_memory_high_watermark", fraction
        )

    async with (
        loaded(setting_of(rabbitmq_server.url, "rabbitmq", tmp_path)) as load,
        refusing(load, memory("0.00001"), memory("0.4")),
    ):
        pass


class SmallPostgres(NativePostgres):
    """A server whose data are on a small disk of their own."""

    def prepare(self) -> str:
        if os.geteuid() != 0:
            raise Unobtainable("only root may mount a small disk")
        self.disk.mkdir()
        options = f"size={DISK}m,mode=700,uid={_id('-u')},gid={_id('-g')}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.disk)]
        mount = subprocess.run(command, capture_output=True, text=True, check=False)
        if mount.returncode:
            raise Unobtainable(f"a small disk cannot be mounted: {mount.stderr.strip()}")
        return super().prepare()

    def command(self) -> list[str]:
        return [*super().command(), "-c", "max_wal_size=64MB", "-c", "min_wal_size=32MB"]

    @property
    def disk(self) -> Path:
        return self.directory / "data"

    def fill(self) -> None:
        """Write a file until nothing fits any more."""
        with open(self.disk / "filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    continue
            except OSError:
                return

    def stop(self) -> None:
        if self._process is not None:
            self.kill()
            subprocess.run(["umount", self.disk], check=False)
        super().stop()


def _id(which: str) -> str:
    """Return the number of the server's user or group."""
    return subprocess.run(
        ["id", which, str(NativePostgres.recipe.account)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


class OwnPostgres(PostgresServer):
    """One that only this module uses."""

    def __init__(self) -> None:
        self.way = SmallPostgres()

    def ways(self) -> tuple[Way, ...]:
        return (self.way,)


@pytest.fixture(scope="module")
def small_postgres(pytestconfig: pytest.Config) -> Iterator[OwnPostgres]:
    for server in serve(pytestconfig, "postgres on a small disk", OwnPostgres()):
        assert isinstance(server, OwnPostgres)
        yield server


async def test_postgres_on_a_full_disk(small_postgres: OwnPostgres, tmp_path: Path) -> None:
    """Should the server stop because it cannot write its log, it is started when there is room."""
    way = small_postgres.way

    async def room() -> None:
        (way.disk / "filler").unlink()
        if way.ended() is not None:
            await asyncio.to_thread(small_postgres.restart)

    async with (
        loaded(setting_of(small_postgres.url, "postgres", tmp_path)) as load,
        refusing(load, lambda: asyncio.to_thread(way.fill), room, "free some space"),
    ):
        print(f"the server has ended: {way.ended()}")


@pytest.mark.full
async def test_postgres_that_ended_on_a_full_disk(
    small_postgres: OwnPostgres, tmp_path: Path
) -> None:
    """It cannot write its log, panics, and cannot recover before there is room."""
    way = small_postgres.way

    async def fill() -> None:
        connection = await asyncpg.connect(small_postgres.url)
        await asyncio.to_thread(way.fill)
        # Its log grows until it needs a new file.
        with suppress(asyncpg.PostgresError, OSError):
            async with asyncio.timeout(120):
                while way.ended() is None:
                    await connection.execute(
                        "SELECT pg_logical_emit_message(false, 'fill', repeat('x', 1000000))"
                    )
        connection.terminate()
        await asyncio.to_thread(until, lambda: way.ended() is not None, "the server's end")

    async def room() -> None:
        (way.disk / "filler").unlink()
        await asyncio.to_thread(small_postgres.restart)

    async with (
        loaded(setting_of(small_postgres.url, "postgres", tmp_path)) as load,
        refusing(load, fill, room),
    ):
        pass


async def test_a_replica_behind_the_url_of_postgres(
    small_postgres: OwnPostgres, tmp_path: Path
) -> None:
    """As when the name still leads to a server that is promoted only later."""

    async def demote() -> None:
        # Without a primary to follow, it stays in recovery, and so is read-only.
        (small_postgres.way.disk / "standby.signal").touch()
        await asyncio.to_thread(small_postgres.shut_down)
        await asyncio.to_thread(small_postgres.restart)

    async def promote() -> None:
        connection = await asyncpg.connect(small_postgres.url)
        await connection.execute("SELECT pg_promote()")
        await connection.close()

    async with (
        loaded(setting_of(small_postgres.url, "postgres", tmp_path)) as load,
        refusing(load, demote, promote, "name the primary"),
    ):
        pass
