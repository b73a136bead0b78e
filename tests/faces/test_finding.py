"""How an app finds its parts, and a router's task its app, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtasks.asyncio import QueueTasks
from qtasks_core.errors import ConfigurationError
from qtasks_memory import MemoryBroker, MemoryStorage
from qtasks_sqlite import SqliteBroker, SqliteStorage
from tests.processes import ROOT, Process

TASKS = """
from qtasks import AsyncRouter, SyncRouter

router, blocking = AsyncRouter(), SyncRouter()

@router.task("tasks.add")
async def add(x: int, y: int) -> int:
    return x + y

@blocking.task("tasks.halve")
def halve(x: float) -> float:
    return x / 2
"""
SHOP = """
from qtasks.asyncio import QueueTasks
import tasks

app = QueueTasks("shop", "sqlite:///shop.db")
app.include_router(tasks.router)
app.include_router(tasks.blocking)
"""
CALLER = """
import asyncio
from qtasks import AsyncResult, SyncResult, TaskTimeout
from tasks import add, halve

halved = halve.add_task(1.0)
added = asyncio.run(add.add_task(1, 2))
mapped = asyncio.run(add.map([(1, 2)]))
for handle in (halved, added, *mapped):
    print("with", handle._app.name, handle._app.broker.path)

async def look() -> None:
    try:
        await AsyncResult(added.uuid).wait_result(0)
    except TaskTimeout as late:
        print("found", "tasks.add" in str(late))

asyncio.run(look())
try:
    SyncResult(halved.uuid).wait_result(0)
except TaskTimeout as late:
    print("found", "tasks.halve" in str(late))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a module of tasks, one of an app, and a program that knows only the tasks."""
    for name, text in (("tasks", TASKS), ("shop", SHOP), ("caller", CALLER)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def called(place: Path, cwd: Path, **environment: str) -> list[str]:
    """Return what the program says, and the log."""
    path = {"PYTHONPATH": f"{place}:{ROOT}", "XDG_DATA_HOME": str(place / "data")}
    command = (str(place / "caller.py"),)
    with Process(*command, environment={**path, **environment}, cwd=cwd) as caller:
        assert caller.wait() == 0, caller.output()
        return caller.output().splitlines()


def test_the_app_that_qtasks_app_names(place: Path) -> None:
    said = called(place, place, QTASKS_APP="shop:app", QTASKS_BROKER_URL="memory://")
    assert said == [f"with shop {place}/shop.db"] * 3 + ["found True"] * 2


def test_the_default_app_of_the_environment(place: Path) -> None:
    url = f"sqlite:///{place}/theirs.db"
    said = called(place, place, QTASKS_NAME="theirs", QTASKS_BROKER_URL=url)
    assert said == [f"with theirs {place}/theirs.db"] * 3 + ["found True"] * 2


def test_the_embedded_default_is_one_file_wherever_one_is_and_is_logged(place: Path) -> None:
    path = f"{place}/data/qtasks/qtasks.db"
    for cwd in (place, place / "elsewhere"):
        log, *said = called(place, cwd)
        assert log == f"no broker is configured; using the embedded default, sqlite:///{path}"
        assert said == [f"with qtasks {path}"] * 3 + ["found True"] * 2


def test_which_parts_an_app_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is given, else the environment's; a storage alone has the broker of the environment."""
    ours, theirs = f"sqlite:///{tmp_path}/ours.db", f"sqlite:///{tmp_path}/theirs.db"
    with pytest.raises(ConfigurationError, match="a storage without a broker"):
        QueueTasks(storage="memory://")
    monkeypatch.setenv("QTASKS_STORAGE_URL", "memory://")
    with pytest.raises(ConfigurationError, match="a storage without a broker"):
        QueueTasks()
    monkeypatch.setenv("QTASKS_BROKER_URL", theirs)
    app = QueueTasks()
    assert isinstance(app.broker, SqliteBroker)
    assert app.broker.path.name == "theirs.db"
    assert isinstance(app.storage, MemoryStorage)
    app = QueueTasks(storage=ours)
    assert isinstance(app.broker, SqliteBroker)
    assert isinstance(app.storage, SqliteStorage)
    assert (app.broker.path.name, app.storage.path.name) == ("theirs.db", "ours.db")
    app = QueueTasks(broker=ours)
    assert isinstance(app.storage, SqliteStorage), "both halves of the broker's backend"
    with pytest.raises(ConfigurationError, match="MemoryBroker needs storage="):
        QueueTasks(broker=MemoryBroker())
