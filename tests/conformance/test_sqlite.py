"""The kit on SQLite, where every process is a server to the others, and none is to be killed."""

import sqlite3
from pathlib import Path

import pytest

from qtasks_conformance import (
    BrokerContract,
    Least,
    PairContract,
    Part,
    StorageContract,
    Subject,
)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    url = f"sqlite:///{tmp_path}/tasks.db"

    async def inject(namespace: str, queue: str, data: bytes) -> None:
        connection = sqlite3.connect(tmp_path / "tasks.db")
        with connection:
            connection.execute(
                "INSERT INTO qtasks_messages (queue, priority, holder, count, data) "
                "SELECT q.id, 5, 0, 0, ? FROM qtasks_queues AS q "
                "JOIN qtasks_namespaces AS n ON n.id = q.namespace "
                "WHERE n.name = ? AND q.name = ?",
                (data, namespace, queue),
            )
        connection.close()

    return Subject(
        broker=Part("qtasks_sqlite:SqliteBroker", {"url": url, "lease": 1.0}),
        storage=Part("qtasks_sqlite:SqliteStorage", {"url": url}),
        lease=1.0,
        inject=inject,
        driver="sqlite3",
        least_broker=Least(
            survives="server crash",
            settle_confirmed=True,
            counts_deliveries=True,
            priorities=True,
        ),
        least_storage=Least(survives="server crash", settle_confirmed=True),
    )


class TestSqliteBroker(BrokerContract):
    pass


class TestSqliteStorage(StorageContract):
    pass


class TestSqlitePair(PairContract):
    pass
