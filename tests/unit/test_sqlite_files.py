"""What is wrong with a file is said in QTasks's own errors, and passes when it is put right."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_core.records import order_of
from qtasks_core.schemas import QueueDepth, Task, TaskMessage, TaskQuery
from qtasks_core.separate import compose
from qtasks_core.wire import encode_message, encode_task
from qtasks_sqlite import (
    SqliteBackend,
    SqliteBroker,
    SqliteStorage,
    control,
    filesystem,
    listing,
)
from qtasks_sqlite.errors import PATIENCE

MESSAGE = TaskMessage(uuid="u", task_name="t")


def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("sqlite://host/x", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///x?colour=red", "there is no option 'colour'; there are: lease"),
        ("sqlite:///x?lease=soon", "lease='soon' must be a number of seconds"),
        ("sqlite:///x?synchronous=off", "must be one of normal, full"),
    ],
)
def test_a_wrong_url(wrong: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SqliteBackend().broker(wrong)


def test_one_url_serves_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = "sqlite:///tasks.db?lease=2.5&synchronous=full&retention=inf"
    broker, storage = SqliteBackend().broker(one), SqliteBackend().storage(one)
    assert broker.path == storage.path == tmp_path.resolve() / "tasks.db"
    assert broker.guarantees.lease == 2.5
    assert broker.guarantees.survives == storage.guarantees.survives == "machine crash"
    assert type(compose(broker, storage)).__name__ == "SqliteComposition"
    elsewhere = SqliteStorage(url(tmp_path / "others.db"), synchronous="full")
    assert type(compose(broker, elsewhere)).__name__ == "SeparateComposition"


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


@pytest.mark.parametrize("what", ["file", "bells", "directory", "another file"])
async def test_a_file_that_is_removed_or_replaced_while_it_is_used(
    tmp_path: Path, what: str
) -> None:
    """Nothing is written where nobody finds it; who sleeps hears of it; put back, it is in use."""
    path, bells = tmp_path / "here" / "tasks.db", tmp_path / "here" / "tasks.db-doorbells"
    gone = {"bells": bells, "directory": tmp_path / "here"}.get(what, path)
    path.parent.mkdir()
    broker, storage = [part(url(path)) for part in (SqliteBroker, SqliteStorage)]
    assert isinstance(broker, SqliteBroker)
    assert isinstance(storage, SqliteStorage)
    await broker.start("n")
    await storage.start("n")
    subscription, inbox = await broker.subscribe({"default": 1}), await storage.inbox()
    inbox.expect(["u"])
    waiting = [
        asyncio.create_task(subscription.receive({"default": 1}, 1)),
        asyncio.create_task(inbox.receive()),
        asyncio.ensure_future(anext(broker.commands())),
    ]
    await broker.publish([replace(MESSAGE, queue="other")])  # behind their looks
    gone.rename(tmp_path / "away")
    if what == "another file":
        path.touch()

    async def refused() -> None:
        while True:
            with suppress(Unavailable):  # its bells cannot be rung
                await broker.publish([replace(MESSAGE, queue="other")])

    async with asyncio.timeout(120):
        with pytest.raises(ConfigurationError, match="removed or replaced"):
            await refused()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(error) for error in errors} <= {ConfigurationError, Unavailable}
    assert path.exists() == (what in ("bells", "another file")), "it was made anew"
    (tmp_path / "away").rename(gone)
    assert [outcome.status for outcome in await broker.publish([MESSAGE])] == ["done"]
    await broker.stop()
    await storage.stop()


async def test_a_stop_that_fails_lets_go_of_the_file(tmp_path: Path) -> None:
    """The next start finds what is there then, and not what there was."""
    (tmp_path / "here").mkdir()
    broker, storage = [
        part(url(tmp_path / "here" / "moved.db")) for part in (SqliteBroker, SqliteStorage)
    ]
    assert isinstance(broker, SqliteBroker)
    assert isinstance(storage, SqliteStorage)
    await broker.start("n")
    await storage.start("n")
    await broker.publish([MESSAGE])
    subscription = await broker.subscribe({"default": 1})
    # A cancelled call leaves the delivery that it has fetched.
    receiving = asyncio.create_task(subscription.receive({"default": 1}, 1))
    await asyncio.sleep(0)
    receiving.cancel()
    while (await broker.depth("default")).in_flight != 1:  # noqa: ASYNC110  # nothing tells of it
        await asyncio.sleep(0.01)
    await (await storage.inbox()).watch(["v"])
    (tmp_path / "here").rename(tmp_path / "away")
    (tmp_path / "here").mkdir()
    await asyncio.sleep(0.1)  # longer than the file is trusted to be there
    for part in (broker, storage):
        with pytest.raises(ConfigurationError, match="removed or replaced"):
            await part.stop()
    async with asyncio.timeout(60):
        while [thread for thread in threading.enumerate() if "moved.db" in thread.name]:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.01)
    await broker.start("n")
    assert (await broker.depth("default")).ready == 0
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


START = """
import asyncio, os, sqlite3, sys
from qtasks_sqlite import SqliteBroker
if os.geteuid() == 0:  # who may write everything
    os.setuid(65534)
try:
    asyncio.run(SqliteBroker(sys.argv[1]).start("n"))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no file modes")
@pytest.mark.parametrize(
    ("mode", "of_directory", "said"),
    [(0o444, 0o777, "cannot be written: check its permissions"), (0o666, 0o555, "permissions")],
)
def test_a_file_that_cannot_be_written(mode: int, of_directory: int, said: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # where another user may go, unlike `tmp_path`
        directory, path = Path(name), Path(name) / "tasks.db"
        asyncio.run(SqliteBroker(url(path)).migrate("app"))
        path.chmod(mode)
        directory.chmod(of_directory)
        ran = subprocess.run(
            [sys.executable, "-c", START, url(path)], stdout=subprocess.PIPE, text=True, timeout=60
        )
        directory.chmod(0o777)
        assert ran.stdout.startswith("ConfigurationError: ")
        assert said in ran.stdout


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no file modes")
def test_a_directory_that_may_not_be_entered() -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "closed" / "inner").mkdir(parents=True)
        (Path(name) / "closed").chmod(0o000)
        path = Path(name) / "closed" / "inner" / "tasks.db"
        ran = subprocess.run(
            [sys.executable, "-c", START, url(path)], stdout=subprocess.PIPE, text=True, timeout=60
        )
        (Path(name) / "closed").chmod(0o700)
        assert ran.stdout == (
            f"ConfigurationError: {path}: it cannot be opened: check path and permissions\n"
        )


async def test_a_full_disk_and_then_some_space(tmp_path: Path) -> None:
    """The message that found no room is an error, what was there stays, and work goes on."""
    broker = SqliteBroker(url(tmp_path / "tasks.db"))
    await broker.start("n")
    await broker.publish([MESSAGE])
    # For this connection the file may not grow, which SQLite tells as it tells a full disk.
    await broker.started().write(lambda turn: turn.execute("PRAGMA max_page_count = 1").fetchone())
    big = TaskMessage(uuid="b", task_name="t", args=bytes(1_000_000))
    with pytest.raises(Unavailable, match="the disk is full: free some space"):
        await broker.publish([big])
    assert [outcome.status for outcome in await broker.publish([big])] == ["done"]
    subscription = await broker.subscribe({"default": 10})
    assert len(await subscription.receive({"default": 10}, 10)) == 2
    await broker.stop()


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
    assert PATIENCE <= time.monotonic() - began < 4 * PATIENCE
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


async def test_a_file_of_the_first_release(tmp_path: Path) -> None:
    """Its tables are brought up to date at the start, and what is in them stays."""
    record = Task(uuid="u", task_name="t", status="error", created_at=5.0, dead="no")
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        connection.executescript((Path(__file__).parent / "sqlite_schema_1.sql").read_text())
        connection.execute("INSERT INTO qtasks_namespaces VALUES (1, 'n')")
        connection.execute("INSERT INTO qtasks_queues VALUES (1, 1, 'default')")
        connection.execute(
            "INSERT INTO qtasks_messages VALUES (1, 1, 5, NULL, 0, 0, ?)",
            (encode_message(MESSAGE),),
        )
        connection.execute(
            "INSERT INTO qtasks_records VALUES (1, 'u', ?, '', 't', 'default', 5.0, 1, NULL, ?)",
            (order_of(record), encode_task(record)),
        )
    connection.close()
    broker, storage = (
        SqliteBroker(url(tmp_path / "tasks.db")),
        SqliteStorage(url(tmp_path / "tasks.db")),
    )
    await asyncio.gather(*(part.migrate("n") for part in (broker, storage)))
    await broker.start("n")
    await storage.start("n")
    subscription = await broker.subscribe({"default": 10})
    (delivery,) = await subscription.receive({"default": 10}, 10)
    assert delivery.message == MESSAGE
    assert await storage.get(["u"]) == [record]
    assert (await storage.query(TaskQuery(dead=True))).tasks == [record]
    assert await storage.set("key", b"value", expect=None)
    await broker.stop()
    await storage.stop()


async def test_a_record_that_cannot_be_decoded(tmp_path: Path) -> None:
    """It is told by its columns, and its neighbours are as they were."""
    storage = SqliteStorage(url(tmp_path / "tasks.db"))
    await storage.start("n")
    good, bad = [
        Task(uuid=uuid, task_name="t", status="success", attempt=2, execution="e", created_at=at)
        for uuid, at in (("good", 1.0), ("bad", 2.0))
    ]
    await storage.save([good, bad])
    for data in (b"", b"\x01\xff", b"\x09" + encode_task(bad)[1:]):
        with sqlite3.connect(tmp_path / "tasks.db") as connection:
            connection.execute("UPDATE qtasks_records SET data = ? WHERE uuid = 'bad'", (data,))
        connection.close()
        found = await storage.get(["bad", "none", "good"])
        assert found[1:] == [None, good]
        assert found[0] is not None
        assert replace(found[0], error=None) == replace(bad, status="error")
        assert "cannot be read" in str(found[0].error)
        assert (await storage.query(TaskQuery())).tasks == [found[0], good]
        (outcome,) = await storage.save([replace(bad, execution="other")])
        assert (outcome.status, outcome.current) == ("refused", found[0])
    await storage.stop()


async def test_a_list_of_more_than_one_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is filled by several short transactions, and its border falls anywhere."""
    monkeypatch.setattr(listing, "LOOKED_AT", 3)
    storage = SqliteStorage(url(tmp_path / "tasks.db"))
    await storage.start("n")
    records = [
        Task(uuid=f"{at:03}", task_name=str(at % 5), status="new", created_at=float(at // 2))
        for at in range(40)
    ]
    await storage.save(records)
    for name in ("0", "4", None):
        expected = [r for r in reversed(records) if name in (None, r.task_name)]
        for limit in (1, 2, 3, 7, 100):
            shown: list[Task] = []
            page = await storage.query(TaskQuery(task_name=name, limit=limit))
            shown += page.tasks
            while page.cursor is not None:
                assert len(page.tasks) == limit
                page = await storage.query(
                    TaskQuery(task_name=name, limit=limit, cursor=page.cursor)
                )
                shown += page.tasks
            assert shown == expected
    await storage.stop()


async def test_what_has_no_record_does_not_stay_for_ever(tmp_path: Path) -> None:
    storage = SqliteStorage(url(tmp_path / "tasks.db"), retention=0.0)
    await storage.start("n")
    await storage.save([Task(uuid="there", task_name="t", status="new")])
    for uuid in ("there", "gone"):
        await storage.append(uuid, [b"item"])
    await storage.claim("key", "me", 0.0)
    await storage.expire()
    assert await storage.read("there", 0) == [(1, b"item")]
    assert await storage.read("gone", 0) == []
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        assert connection.execute("SELECT count(*) FROM qtasks_claims").fetchone() == (0,)
    connection.close()
    await storage.stop()


async def test_more_than_one_transaction_clears_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "DELETED", 7)
    monkeypatch.setattr(control, "PURGED", 7)
    broker, storage = [part(url(tmp_path / "tasks.db")) for part in (SqliteBroker, SqliteStorage)]
    assert isinstance(broker, SqliteBroker)
    assert isinstance(storage, SqliteStorage)
    await broker.start("n")
    await storage.start("n")
    await storage.save(
        [Task(uuid=str(at), task_name="t", status="success", finished_at=1.0) for at in range(21)]
    )
    assert await storage.expire() == 21
    await broker.publish([MESSAGE] * 15 + [replace(MESSAGE, delay=60.0)] * 8)
    assert await broker.purge("default") == 23
    assert await broker.depth("default") == QueueDepth(0, 0, 0)
    await broker.stop()
    await storage.stop()


MOUNTS = """
/dev/vda1 / ext4 rw 0 0
proc /proc proc rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local xfs rw 0 0
me@there: /media/sp\\040ce fuse.sshfs rw 0 0
//nas/x /größe cifs rw 0 0
overlay /home/hidden nfs rw 0 0
overlay /home/hidden tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/tasks.db", "ext4"),
        ("/home/me/tasks.db", "nfs4"),
        ("/home/local/tasks.db", "xfs"),
        ("/homeless/tasks.db", "ext4"),
        ("/media/sp ce/tasks.db", "fuse.sshfs"),
        ("/größe/tasks.db", "cifs"),
        ("/home/hidden/tasks.db", "tmpfs"),
    ],
)
def test_the_kind_of_a_file_system(tmp_path: Path, path: str, kind: str) -> None:
    (tmp_path / "mounts").write_text(MOUNTS.lstrip())
    assert filesystem.kind_of(Path(path), str(tmp_path / "mounts")) == kind


async def test_a_network_file_system_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(filesystem, "kind_of", lambda path, mounts: "nfs4")
    for part in (SqliteBroker, SqliteStorage, SqliteBroker):
        started = part(url(tmp_path / "tasks.db"))
        await started.start("n")
        await started.stop()
    (told,) = [record.getMessage() for record in caplog.records if record.name == "qtasks.sqlite"]
    assert "network file system (nfs4)" in told


def test_where_nothing_is_known_of_mounts(tmp_path: Path) -> None:
    assert filesystem.kind_of(tmp_path, str(tmp_path / "none")) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
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
