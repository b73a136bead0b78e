"""The kit on SQLite, where every process is a server to the others, and none is to be killed."""

from pathlib import Path

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
from tests.sqlite_file import injector, spoiler


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    url = f"sqlite:///{tmp_path}/tasks.db"
    return Subject(
        broker=Part("qtasks_sqlite:SqliteBroker", {"url": url, "lease": 1.0}),
        storage=Part("qtasks_sqlite:SqliteStorage", {"url": url}),
        lease=1.0,
        inject=injector(tmp_path / "tasks.db"),
        spoil=spoiler(tmp_path / "tasks.db"),
        driver="sqlite3",
        url=url,
        other_url=f"sqlite:///{tmp_path}/other.db",
        options=("lease", "synchronous", "retention"),
        least_broker=Least(
            survives="server crash",
            settle_confirmed=True,
            atomic_retries=True,
            counts_deliveries=True,
            priorities=True,
            leases_survive=True,
            order="queue",
        ),
        least_storage=Least(survives="server crash", settle_confirmed=True),
    )


class TestSqliteBroker(BrokerContract):
    pass


class TestSqliteStorage(StorageContract):
    pass


class TestSqlitePair(CompositionContract):
    pass


class TestSqliteBackend(BackendContract):
    pass
