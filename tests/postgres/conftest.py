"""Databases and roles of a test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from tests.services import Service


@pytest.fixture
async def fresh(postgres_server: Service) -> AsyncIterator[str]:
    """The URL of a database in which nothing has been started."""
    name = f"fresh_{uuid4().hex}"
    connection = await asyncpg.connect(postgres_server.url)
    await connection.execute(f"CREATE DATABASE {name}")
    yield urlsplit(postgres_server.url)._replace(path=f"/{name}").geturl()
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


@pytest.fixture
async def admin(fresh: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection to the fresh database."""
    connection = await asyncpg.connect(fresh)
    yield connection
    await connection.close()


@pytest.fixture
async def role(fresh: str, admin: asyncpg.Connection) -> AsyncIterator[tuple[str, str]]:
    """A user without any rights: its name, and the URL it connects by."""
    user = f"user_{uuid4().hex}"
    await admin.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'sesame'")
    parts = urlsplit(fresh)
    yield user, parts._replace(netloc=f"{user}:sesame@{parts.hostname}:{parts.port}").geturl()
    await admin.execute(f"DROP OWNED BY {user}")
    await admin.execute(f"DROP ROLE {user}")
