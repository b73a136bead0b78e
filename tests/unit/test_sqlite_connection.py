"""Rows in few steps, and the order of records as SQLite's storage keeps it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtasks_core.records import RANK, judge
from qtasks_core.schemas import Status, Task
from qtasks_sqlite import SqliteStorage
from qtasks_sqlite.connection import INLINE, Transaction

STATUSES: list[Status] = list(RANK)


@pytest.mark.parametrize("count", [0, 1, 3, 255, 256, 1000])
def test_rows_come_back_as_they_went(count: int) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, data BLOB)")
    sizes = (0, 1, 100, INLINE, INLINE + 1)
    turn = Transaction(connection, {})
    rows = [(n, f'"name", {n}', bytes([n % 256]) * sizes[n % 5]) for n in range(count)]
    turn.insert("INTO t (id, name, data)", rows)
    found = turn.select_blobs("t", "id", "name", "id >= ?", (0,))
    assert sorted((row, name, data) for (row, name), data in found) == rows
    names = turn.select("id, name", "FROM t WHERE id >= ?", (0,))
    assert sorted(names) == [[row, name] for row, name, _ in rows]
    connection.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


saves = st.lists(
    st.builds(
        Task,
        uuid=st.sampled_from(["a", "b"]),
        task_name=st.just("t"),
        status=st.sampled_from(STATUSES),
        attempt=st.integers(1, 3),
        execution=st.sampled_from(["", "e", "f"]),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=saves, second=saves)
async def test_saves_are_judged_as_the_core_does(
    directory: Path, first: list[Task], second: list[Task]
) -> None:
    path = directory / "tasks.db"
    path.unlink(missing_ok=True)
    storage = SqliteStorage(f"sqlite:///{path}")
    await storage.start("n")
    model: dict[str, Task] = {}
    for batch in (first, second):
        expected = []
        for task in batch:
            verdict = judge(task, model.get(task.uuid))
            expected.append("refused" if verdict == "refuse" else "done")
            if verdict == "accept":
                model[task.uuid] = task
        assert [outcome.status for outcome in await storage.save(batch)] == expected
        assert await storage.get(["a", "b"]) == [model.get("a"), model.get("b")]
    await storage.stop()
