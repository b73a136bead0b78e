"""Which text may be a uuid, an address, a key or an owner, and who refuses what may not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio

from qtasks import AsyncResult, control
from qtasks import QueueTasks as BlockingApp
from qtasks.asyncio import QueueTasks
from qtasks_core import Storage
from qtasks_core.errors import ConfigurationError, UnknownTask
from qtasks_core.names import checked_id, is_id
from qtasks_memory import MemoryStorage
from qtasks_sqlite import SqliteStorage

WRONG = ("", "u" * 201, "中" * 201, "a\0b", "\ud800", "a\udfff")
Call = Callable[[Storage, str], Awaitable[object]]


@pytest.mark.parametrize("text", ["a", "a" * 200, "🦀" * 200, " ", "a\nb", "%*?:/'\"\\"])
def test_any_script_is_taken(text: str) -> None:
    assert is_id(text)
    assert checked_id(text, "a uuid") is text


@pytest.mark.parametrize("text", WRONG, ids=ascii)
def test_what_is_no_id_is_refused_by_the_name_of_its_field(text: str) -> None:
    assert not is_id(text)
    with pytest.raises(
        ConfigurationError, match="cannot be the owner of a claim: 1 to 200"
    ) as told:
        checked_id(text, "the owner of a claim")
    assert str(told.value).isascii()


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    part: Storage = MemoryStorage()
    if request.param == "sqlite":
        part = SqliteStorage(f"sqlite:///{tmp_path}/ids.db")
    await part.start(f"ids-{uuid4().hex[:8]}")
    yield part
    await part.stop()


CALLS: dict[str, Call] = {
    "the key of a claim": lambda storage, text: storage.claim(text, "me", 1.0),
    "the owner of a claim": lambda storage, text: storage.claim("key", text, 1.0),
    "the key of a value": lambda storage, text: storage.set(text, b"1"),
    "a uuid": lambda storage, text: storage.append(text, [b"1"]),
}


@pytest.mark.parametrize("of", CALLS)
@pytest.mark.parametrize("text", WRONG, ids=ascii)
async def test_a_storage_refuses_what_is_no_id(storage: Storage, of: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot be {of}"):
        await CALLS[of](storage, text)


@pytest.mark.parametrize("text", WRONG, ids=ascii)
async def test_an_app_knows_no_task_of_what_is_no_uuid(text: str) -> None:
    """An API passes on what its clients send: that is a task not found, and no error of its own."""
    app = QueueTasks(f"ids-{uuid4().hex[:8]}", "memory://")
    async with app:
        assert await app.get_task(text) is None
        for call in (app.cancel(text), AsyncResult(text, app=app).wait_result(0.0)):
            with pytest.raises(UnknownTask, match="no task can have the uuid"):
                await call
        for operation in (control.revive, control.drop):
            with pytest.raises(ConfigurationError, match="cannot be a uuid"):
                await app.control(operation, [text])


@pytest.mark.parametrize("text", WRONG, ids=ascii)
def test_a_blocking_app_knows_no_task_of_what_is_no_uuid(text: str) -> None:
    app = BlockingApp(f"ids-{uuid4().hex[:8]}", "memory://")
    with app:
        assert app.get_task(text) is None
        for call in (app.cancel, lambda uuid: app.wait(uuid, 0.0).result()):
            with pytest.raises(UnknownTask, match="no task can have the uuid"):
                call(text)
