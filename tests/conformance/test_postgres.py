"""The kit on Postgres."""

import pytest

from qtasks_conformance import (
    BrokerContract,
    Least,
    PairContract,
    Part,
    StorageContract,
    Subject,
)
from tests.services import Service


@pytest.fixture
def subject(postgres_server: Service) -> Subject:
    return Subject(
        broker=Part("qtasks_postgres:PostgresBroker", {"url": postgres_server.url, "lease": 1.0}),
        storage=Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url}),
        lease=1.0,
        server=postgres_server,
        driver="asyncpg",
        least_broker=Least(
            survives="machine crash",
            settle_confirmed=True,
            counts_deliveries=True,
            priorities=True,
            transactions=True,
        ),
        least_storage=Least(survives="machine crash", settle_confirmed=True, transactions=True),
    )


class TestPostgresBroker(BrokerContract):
    pass


class TestPostgresStorage(StorageContract):
    pass


class TestPostgresPair(PairContract):
    pass
