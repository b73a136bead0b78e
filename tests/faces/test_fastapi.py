"""The lifespan helper and what failures are over HTTP."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient
from httpx import ASGITransport, AsyncClient

import qtasks.app
from qtasks import Reject, TaskFailed, TaskTimeout, Unavailable, control
from qtasks.asyncio import QueueTasks
from qtasks.bridge.crossing import io_thread
from qtasks.integrations.fastapi import install_error_handlers, lifespan
from qtasks_core import TaskPage, TaskQuery, schemas
from qtasks_core.errors import Closed, MissingDriver, NotSupported, QTasksError, TaskCancelled
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.processes import ROOT
from tests.waits import WaitedFor


@pytest.fixture
def app() -> QueueTasks:
    return QueueTasks(f"api-{uuid4().hex[:8]}", "memory://")


def started(app: QueueTasks) -> bool:
    try:
        return bool(app.client)
    except Closed:
        return False


def test_qtasks_alone_imports_no_framework() -> None:
    program = (
        "import qtasks, qtasks.asyncio, sys; assert not {'fastapi', 'starlette'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_it_starts_and_stops_with_the_api(app: QueueTasks) -> None:
    api = FastAPI(lifespan=lifespan(app))
    for _ in range(2):
        with TestClient(api):
            assert started(app)
        assert not started(app)


def test_another_lifespan_runs_within_it_and_its_state_is_the_apis(app: QueueTasks) -> None:
    told: list[object] = []

    @asynccontextmanager
    async def inner(api: FastAPI) -> AsyncIterator[dict[str, str]]:
        told.append(api.title)
        told.append(started(app))
        yield {"who": "inner"}
        told.append(started(app))

    api = FastAPI(title="store", lifespan=lifespan(app, inner))

    @api.get("/")
    async def root(request: Request) -> str:
        return str(request.state.who)

    with TestClient(api) as client:
        assert client.get("/").json() == "inner"
    assert told == ["store", True, True]
    assert not started(app)


def test_it_stops_though_the_other_lifespan_fails(app: QueueTasks) -> None:
    @asynccontextmanager
    async def inner(api: FastAPI) -> AsyncIterator[None]:
        raise ValueError("no database")
        yield

    with (
        pytest.raises(ValueError, match="no database"),
        TestClient(FastAPI(lifespan=lifespan(app, inner))),
    ):
        pass
    assert not started(app)


def test_without_an_app_it_is_the_default_one(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FastAPI(lifespan=lifespan())
    # After the API was made: what the environment says is read as late as the API starts.
    monkeypatch.setattr(qtasks.app, "_default", app)
    with TestClient(api):
        assert started(app)
    assert not started(app)


class Away(MemoryBroker):
    async def start(self, namespace: str) -> None:
        raise Unavailable("redis://10.0.0.1 does not answer")


async def test_a_default_app_says_where_it_writes_to_and_that_no_worker_was_ever_there(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An API that was not told of the worker's broker would else wait in silence."""
    app = QueueTasks(app.name, f"memory://{app.name}?lease=5")
    app.starts_itself = True
    monkeypatch.setattr(qtasks.app, "_default", app)
    late = f"no worker has begun it; no worker has ever been seen; .* memory://{app.name}"

    @app.task()
    async def add(x: int, y: int) -> int:
        return x + y

    api = FastAPI(lifespan=lifespan())
    install_error_handlers(api)

    @api.get("/")
    async def root() -> None:
        await add.add_task(1, 2, timeout=0.1)

    def start_of_the_api() -> None:
        with TestClient(api) as client:
            answer = client.get("/")
            assert answer.status_code == 504
            assert "no worker has ever been seen" in answer.json()["detail"]
            assert "memory://" not in answer.text

    await asyncio.to_thread(start_of_the_api)
    where = f"no worker of the app {app.name!r} is alive at memory://{app.name}"
    assert where in caplog.text
    assert f"GET /: task {add.name} " in caplog.text
    async with app:
        with pytest.raises(TaskTimeout, match=late):
            await add.add_task(1, 2, timeout=0.1)
        with pytest.raises(TaskTimeout, match=f"uses the broker memory://{app.name}"):
            await asyncio.to_thread(lambda: app.wait(str(uuid4()), 0.1).result())
        async with app.worker():
            assert (await add.add_task(1, 2, timeout=120)).returning == 3
        with pytest.raises(TaskTimeout, match="no worker for that queue is alive; this process's"):
            await add.add_task(1, 2, timeout=0.1)


def test_a_server_out_of_reach_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueueTasks.start, "__defaults__", (0.1,))
    app = QueueTasks("away", Away("away"), MemoryStorage("away"))
    api = FastAPI(lifespan=lifespan(app))
    with pytest.raises(Unavailable, match="does not answer"), TestClient(api):
        pass


# -- failures ----------------------------------------------------------------------------


@pytest.fixture
async def client(app: QueueTasks) -> AsyncIterator[AsyncClient]:
    api = FastAPI()
    install_error_handlers(api)

    @app.task(name="fail")
    async def fail(reason: str) -> None:
        raise Reject(reason)

    @app.task(name="slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    async def failed() -> None:
        _ = (await fail.add_task("in a dependency", timeout=120)).returning

    @api.get("/failed")
    async def get_failed(reason: str) -> None:
        return (await fail.add_task(reason, timeout=120)).returning

    @api.get("/dependency")
    async def get_dependency(_: None = Depends(failed)) -> None: ...

    @api.get("/late")
    async def get_late() -> None:
        await slow.add_task(timeout=0.1)

    @api.get("/away")
    async def get_away() -> None:
        raise Unavailable("redis://10.0.0.1 does not answer")

    @api.get("/cancelled")
    async def get_cancelled() -> None:
        from msgspec.structs import replace

        from qtasks import Task

        record = (await fail.add_task("x", timeout=120)).record
        _ = Task(app, replace(record, status="cancel", error=None), lambda _: None).returning

    @api.get("/own")
    async def get_own() -> None:
        raise TimeoutError("of something else")

    transport = ASGITransport(api, raise_app_exceptions=False)
    async with (
        app.worker(grace=0),
        AsyncClient(transport=transport, base_url="http://api") as client,
    ):
        yield client


async def test_a_failed_task_is_a_500_with_its_error(client: AsyncClient) -> None:
    answer = await client.get("/failed", params={"reason": "sold out"})
    body = answer.json()
    assert (answer.status_code, body["task_name"]) == (500, "fail")
    assert "sold out" in body["detail"]
    assert "Traceback" not in answer.text
    assert len(body["uuid"]) == 36
    assert (await client.get("/dependency")).json()["detail"] == "Reject: in a dependency"


async def test_a_cancelled_task_is_a_500(client: AsyncClient) -> None:
    answer = await client.get("/cancelled")
    assert (answer.status_code, answer.json()["detail"]) == (500, "the task was cancelled")


async def test_a_timeout_is_a_504_with_the_uuid(client: AsyncClient, app: QueueTasks) -> None:
    answer = await client.get("/late")
    assert answer.status_code == 504
    task = await app.get_task(answer.json()["uuid"])
    assert task is not None
    assert not task.finished
    assert "1 alive for that queue" in answer.json()["detail"]
    assert f"{socket.gethostname()}:" not in answer.text


async def test_a_server_out_of_reach_is_a_503_without_its_address(
    client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await client.get("/away")
    assert (answer.status_code, answer.json()) == (
        503, {"detail": "the task queue cannot be reached"},
    )  # fmt: skip
    assert "GET /away: redis://10.0.0.1 does not answer" in caplog.text


def every_error(kind: type[QTasksError] = QTasksError) -> Iterator[type[QTasksError]]:
    for below in kind.__subclasses__():
        if below.__module__ == "qtasks_core.errors":
            yield below
            yield from every_error(below)


STATUS = {
    "TaskFailed": 500, "TaskCancelled": 500, "TaskTimeout": 504, "TaskNotFinished": 409,
    "Unavailable": 503, "Closed": 503, "NotSupported": 501, "UnknownTask": 404, "Refused": 502,
    "PayloadTooLarge": 413, "SerializationError": 422,
}  # fmt: skip


@pytest.mark.parametrize("kind", [*every_error(), QTasksError], ids=lambda kind: kind.__name__)
async def test_every_error_has_its_answer(
    kind: type[QTasksError], caplog: pytest.LogCaptureFixture
) -> None:
    """A sentence where it helps the caller, and nothing of a server."""
    api = FastAPI()
    install_error_handlers(api)
    sentence = "MemoryStorage cannot list tasks yet"
    arguments: tuple[object, ...] = (sentence,)
    if kind in (TaskFailed, TaskCancelled):
        arguments = (schemas.Task(uuid="u", task_name="t", status="error", error=sentence),)
    elif kind is TaskTimeout:
        arguments = (sentence, "u", "written to redis://10.0.0.1")
    elif kind is MissingDriver:
        arguments = ("redis://10.0.0.1", ".[redis]")

    @api.get("/")
    async def root() -> None:
        raise kind(*arguments)

    transport = ASGITransport(api, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url="http://api") as client:
        answer = await client.get("/")
    assert answer.status_code == STATUS.get(kind.__name__, 500)
    body = answer.json()
    assert "10.0.0.1" not in answer.text
    if answer.status_code in (404, 409, 413, 422, 501, 504) or "uuid" in body:
        assert body["detail"] == sentence
    else:
        assert body["detail"].startswith("the task queue ")
        assert "GET /: " in caplog.text
    assert ("uuid" in body) == (kind in (TaskFailed, TaskCancelled, TaskTimeout))


async def test_what_a_storage_cannot_do_is_a_501_with_the_sentence(app: QueueTasks) -> None:
    class Unlisted(MemoryStorage):
        async def query(self, query: TaskQuery) -> TaskPage:
            raise NotSupported("Unlisted cannot list records yet")

    app = QueueTasks("unlisted", MemoryBroker("unlisted"), Unlisted("unlisted"))
    api = FastAPI(lifespan=lifespan(app))
    install_error_handlers(api)

    @api.get("/tasks")
    async def tasks() -> int:
        return len((await app.control(control.query, TaskQuery())).tasks)

    with TestClient(api) as client:
        answer = client.get("/tasks")
    assert (answer.status_code, answer.json()["detail"]) == (
        501,
        "Unlisted cannot list records yet",
    )


async def test_other_errors_are_left_alone(client: AsyncClient) -> None:
    assert (await client.get("/own")).text == "Internal Server Error"


# -- callers that go away ----------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13])
async def test_a_cancelled_caller_does_not_cancel_its_task(turns: int) -> None:
    """As a server cancels the handler of a client that went away, at whatever moment."""
    name = uuid4().hex
    storage = WaitedFor(name)
    app = QueueTasks(name, MemoryBroker(name), storage)
    ran: list[int] = []

    @app.task()
    async def note(number: int) -> None:
        await asyncio.sleep(0.01)
        ran.append(number)

    async with app.worker():
        caller = asyncio.create_task(note.add_task(turns, timeout=120))
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await note.add_task(-1, timeout=120)
        assert sorted(ran) == [-1, turns]
        assert not storage.waited_for


async def test_a_cancelled_start_leaves_nothing_started() -> None:
    begun, release = asyncio.Event(), asyncio.Event()
    here = asyncio.get_running_loop()
    ended: list[str] = []

    class Slow(MemoryBroker):
        async def start(self, namespace: str) -> None:
            here.call_soon_threadsafe(begun.set)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(release.wait(), here))
            await super().start(namespace)

        async def stop(self) -> None:
            ended.append("stopped")
            here.call_soon_threadsafe(release.set)

    app = QueueTasks("slow", Slow("slow"), MemoryStorage("slow"))
    starting = asyncio.create_task(app.start())
    await begun.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await asyncio.wait_for(release.wait(), 120)
    assert ended == ["stopped"]
    assert not started(app)


@pytest.mark.parametrize("turns", range(8))
async def test_starts_cancelled_at_any_moment_are_balanced(app: QueueTasks, turns: int) -> None:
    starting = asyncio.create_task(app.start())
    for _ in range(turns):
        await asyncio.sleep(0.0002 * turns)
    starting.cancel()
    result: Any = (await asyncio.gather(starting, return_exceptions=True))[0]
    if result is None:
        await app.stop()
    async with app:
        assert started(app)
    assert not started(app)


async def test_a_start_cancelled_before_it_has_begun_leaves_no_trace(
    app: QueueTasks, recwarn: pytest.WarningsRecorder
) -> None:
    io_thread().post(time.sleep, 0.1)
    starting = asyncio.create_task(app.start())
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait({starting})
    async with app:
        assert started(app)
    del starting  # with its traceback
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


def test_the_errors_carry_what_an_answer_needs_and_can_be_pickled(app: QueueTasks) -> None:
    import pickle

    from qtasks import Task, TaskTimeout
    from qtasks_core import schemas

    record = schemas.Task(
        uuid="u", task_name="t", status="error", error="ValueError: no", traceback="Traceback …"
    )
    with pytest.raises(TaskFailed, match=r"(?s)task t u failed: ValueError: no\n\nTraceback") as e:
        _ = Task(app, record, lambda raw: raw).returning
    copy = pickle.loads(pickle.dumps(e.value))  # noqa: S301  # our own
    assert (copy.record, str(copy)) == (record, str(e.value))
    late = pickle.loads(pickle.dumps(TaskTimeout("late", "u")))  # noqa: S301
    assert (str(late), late.uuid) == ("late", "u")
