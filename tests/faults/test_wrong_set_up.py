"""A wrong password, database, version or right: the error says what to do and shows no password."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator
from typing import Literal
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest
from redis.asyncio import Redis

import qtasks_postgres.connection
import qtasks_redis.connection
from qtasks_core import Broker, Storage
from qtasks_core.errors import ConfigurationError, ServerTooOld
from qtasks_core.lookup import resolve_broker, resolve_storage
from tests.services import Service

SECRET = "hunter2"
HALVES = pytest.mark.parametrize("half", ["broker", "storage"])
Half = Literal["broker", "storage"]


def changed(url: str, *, login: str = "", path: str = "") -> str:
    """Return a URL with another login, or another path."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{login}@{host}" if login else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc, path=path or parts.path))


async def refused(url: str, half: Half) -> str:
    """Return why a broker or storage does not start. No line that is logged shows a password."""
    part: Broker | Storage = resolve_broker(url) if half == "broker" else resolve_storage(url)
    with pytest.raises(ConfigurationError) as told:
        await part.start(f"wrong-{uuid4().hex[:8]}")
    logged = "".join(traceback.format_exception(told.value))
    assert "\n" not in str(told.value)
    for password in (SECRET, urlsplit(url).password):
        assert not password or password not in str(told.value)
        assert not password or password not in logged
    return str(told.value)


@pytest.fixture
async def redis_admin(redis_server: Service) -> AsyncIterator[Redis]:
    client: Redis = Redis.from_url(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
async def postgres_admin(postgres_server: Service) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_server.url)
    yield connection
    await connection.close()


@HALVES
async def test_redis_refuses_a_password(redis_server: Service, half: Half) -> None:
    url = changed(redis_server.url, login=f":{SECRET}")
    assert "check both in the URL" in await refused(url, half)


@HALVES
async def test_redis_has_no_such_database(redis_server: Service, half: Half) -> None:
    told = await refused(changed(redis_server.url, path="/99999"), half)
    assert "name another database in the URL" in told


@HALVES
async def test_redis_gives_no_right(redis_server: Service, redis_admin: Redis, half: Half) -> None:
    await redis_admin.execute_command(  # type: ignore[no-untyped-call]
        "ACL", "SETUSER", "poor", "reset", "on", f">{SECRET}", "~*", "&*", "+@all", "-evalsha"
    )
    try:
        told = await refused(changed(redis_server.url, login=f"poor:{SECRET}"), half)
    finally:
        await redis_admin.acl_deluser("poor")
    assert "docs/rights.md lists" in told
    assert "evalsha" in told.lower()


@HALVES
@pytest.mark.parametrize("backend", ["redis", "postgres"])
async def test_a_server_is_too_old(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, backend: str, half: Half
) -> None:
    monkeypatch.setattr(qtasks_redis.connection, "_NEEDS", (99, 0))
    monkeypatch.setattr(qtasks_postgres.connection, "OLDEST", 99)
    url = request.getfixturevalue(f"{backend}_server").url
    part: Broker | Storage = resolve_broker(url) if half == "broker" else resolve_storage(url)
    with pytest.raises(ServerTooOld, match="or newer") as told:
        await part.start("wrong")
    assert str(urlsplit(url).password) not in str(told.value)


@HALVES
async def test_postgres_refuses_a_password(postgres_server: Service, half: Half) -> None:
    url = changed(postgres_server.url, login=f"nobody:{SECRET}")
    assert "check the user and the password in the URL" in await refused(url, half)


@HALVES
async def test_postgres_has_no_such_database(postgres_server: Service, half: Half) -> None:
    told = await refused(changed(postgres_server.url, path="/absent"), half)
    assert "create the database, or name another in the URL" in told


@HALVES
async def test_postgres_gives_no_right(
    postgres_server: Service, postgres_admin: asyncpg.Connection, half: Half
) -> None:
    name = f"poor_{uuid4().hex[:8]}"
    await postgres_admin.execute(f"CREATE DATABASE {name}")
    await postgres_admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{SECRET}'")
    try:
        url = changed(postgres_server.url, login=f"{name}:{SECRET}", path=f"/{name}")
        assert "`qtasks migrate`" in await refused(url, half)
    finally:
        await postgres_admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await postgres_admin.execute(f"DROP ROLE {name}")
