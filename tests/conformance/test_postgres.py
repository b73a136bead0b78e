"""The kit on Postgres."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from qtasks_conformance import (
    BackendContract,
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    StorageContract,
    Subject,
)
from tests.services import Service


def postgres_subject(server: Service) -> Subject:
    """Return what is tested: a broker and a storage in one database."""

    async def inject(namespace: str, queue: str, data: bytes) -> None:
        connection = await asyncpg.connect(server.url)
        await connection.execute(
            "INSERT INTO qtasks.messages (priority, namespace, queue, body) "
            "VALUES (5, $1, $2, $3)",
            namespace, queue, data,
        )  # fmt: skip
        await connection.close()

    async def spoil(namespace: str, uuid: str, data: bytes) -> None:
        connection = await asyncpg.connect(server.url)
        await connection.execute(
            "UPDATE qtasks.records SET record = $3 WHERE namespace = $1 AND uuid = $2",
            namespace, uuid, data,
        )  # fmt: skip
        await connection.close()

    @asynccontextmanager
    async def begin() -> AsyncIterator[object]:
        connection = await asyncpg.connect(server.url)
        async with connection.transaction():
            yield connection
        await connection.close()

    return Subject(
        broker=Part("qtasks_postgres:PostgresBroker", {"url": server.url, "lease": 1.0}),
        storage=Part("qtasks_postgres:PostgresStorage", {"url": server.url}),
        lease=1.0,
        inject=inject,
        spoil=spoil,
        begin=begin,
        server=server,
        driver="asyncpg",
        url=server.url,
        options=("lease", "retention", "listen_url", "schema", "connect_timeout", "sslmode"),
        least_broker=Least(
            survives="machine crash",
            settle_confirmed=True,
            atomic_retries=True,
            counts_deliveries=True,
            priorities=True,
            transactions=True,
            leases_survive=True,
            order="queue",
        ),
        least_storage=Least(survives="machine crash", settle_confirmed=True, transactions=True),
    )


@pytest.fixture
def subject(postgres_server: Service) -> Subject:
    return postgres_subject(postgres_server)


class TestPostgresBroker(BrokerContract):
    pass


class TestPostgresStorage(StorageContract):
    pass


class TestPostgresPair(CompositionContract):
    pass


class TestPostgresBackend(BackendContract):
    @pytest.fixture
    async def subject(self, subject: Subject) -> AsyncIterator[Subject]:
        """With a database beside that of the URL."""
        assert subject.url is not None
        name = f"other_{uuid4().hex}"
        connection = await asyncpg.connect(subject.url)
        await connection.execute(f"CREATE DATABASE {name}")
        other_url = urlsplit(subject.url)._replace(path=f"/{name}").geturl()
        yield replace(subject, other_url=other_url)
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await connection.close()
