"""What is wrong with a file is said in QTasks's own errors, and passes when it is put right."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from pathlib import Path

import pytest

from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_core.schemas import TaskMessage
from qtasks_sqlite import SqliteBackend, SqliteBroker, SqliteStorage
from qtasks_sqlite.connection import PATIENCE

MESSAGE = TaskMessage(uuid="u", task_name="t")


def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("sqlite://host/x", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///x?colour=red", "unknown option"),
        ("sqlite:///x?lease=soon", "float"),
        ("sqlite:///x?lease=0", "above 0"),
        ("sqlite:///x?synchronous=off", "neither normal nor full"),
    ],
)
def test_a_wrong_url(wrong: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SqliteBackend().broker(wrong)


def test_one_url_serves_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = "sqlite:///tasks.db?lease=2.5&synchronous=full"
    broker, storage = SqliteBackend().broker(one), SqliteBackend().storage(one)
    assert broker.path == storage.path == tmp_path.resolve() / "tasks.db"
    assert broker.guarantees.lease == 2.5
    assert broker.guarantees.survives == storage.guarantees.survives == "machine crash"
    assert type(broker.compose(storage)).__name__ == "SqliteComposition"
    elsewhere = SqliteStorage(url(tmp_path / "others.db"), synchronous="full")
    assert type(broker.compose(elsewhere)).__name__ == "SeparateComposition"


async def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="create it first"):
        await SqliteBroker(url(tmp_path / "missing" / "tasks.db")).start("n")


async def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "tasks.db").write_bytes(b"no database " * 1000)
    with pytest.raises(ConfigurationError, match="no SQLite database"):
        await SqliteStorage(url(tmp_path / "tasks.db")).start("n")


async def test_a_corrupt_file(tmp_path: Path) -> None:
    broker = SqliteBroker(url(tmp_path / "tasks.db"))
    await broker.start("n")
    await broker.publish([MESSAGE] * 2000)
    await broker.stop()
    with (tmp_path / "tasks.db").open("r+b") as file:
        file.seek(4096 * 2)
        file.write(os.urandom(4096 * 30))
    with pytest.raises(ConfigurationError, match="corrupt"):
        await broker.start("n")
    await broker.stop()


async def test_the_schema_of_a_newer_release(tmp_path: Path) -> None:
    broker = SqliteBroker(url(tmp_path / "tasks.db"))
    await broker.start("n")
    await broker.stop()
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        connection.execute("UPDATE qtasks_schema SET version = 1000")
    connection.close()
    with pytest.raises(ConfigurationError, match="upgrade qtasks"):
        await broker.start("n")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
async def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    broker = SqliteBroker(url(tmp_path / "tasks.db"))
    await broker.start("n")
    await broker.stop()
    (tmp_path / "tasks.db").chmod(0o400)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        await broker.start("n")


async def test_a_lock_that_another_process_keeps(tmp_path: Path) -> None:
    broker, storage = [part(url(tmp_path / "tasks.db")) for part in (SqliteBroker, SqliteStorage)]
    assert isinstance(broker, SqliteBroker)
    assert isinstance(storage, SqliteStorage)
    await broker.start("n")
    await storage.start("n")
    other = sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()

    async def late() -> None:
        await asyncio.sleep(1)
        await broker.publish([MESSAGE])

    outcomes = await asyncio.gather(broker.publish([MESSAGE]), late(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
    assert PATIENCE <= time.monotonic() - began < PATIENCE + 2.5
    assert await storage.get(["u"]) == [None]
    other.execute("ROLLBACK")
    other.close()
    assert [outcome.status for outcome in await broker.publish([MESSAGE])] == ["done"]
    await broker.stop()
    await storage.stop()


async def test_one_bad_item_fails_only_its_own_call(tmp_path: Path) -> None:
    broker = SqliteBroker(url(tmp_path / "tasks.db"))
    await broker.start("n")
    bad = TaskMessage(uuid="b", task_name="t", priority=2**70)
    outcomes = await asyncio.gather(
        *(broker.publish([message]) for message in (MESSAGE, bad, MESSAGE)), return_exceptions=True
    )
    assert [isinstance(outcome, list) for outcome in outcomes] == [True, False, True]
    subscription = await broker.subscribe({"default": 10})
    assert len(await subscription.receive({"default": 10}, 10)) == 2
    await broker.stop()
    with pytest.raises(Closed):
        await broker.publish([MESSAGE])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_a_child_does_not_touch_what_it_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = SqliteBroker(url(tmp_path / "tasks.db"))
    await broker.start("n")
    parent = os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(Closed, match="fork"):
            await broker.publish([MESSAGE])
    await broker.publish([MESSAGE])
    await broker.stop()
