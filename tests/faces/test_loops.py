"""Loops that come and go, several at a time, and others' loops: nothing leaks across them."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import qtasks
from qtasks import AsyncRouter, SyncRouter
from qtasks.asyncio import QueueTasks
from qtasks.integrations.fastapi import lifespan
from tests.faces.descriptors import needs_proc, sockets
from tests.processes import ROOT, until

pytestmark = needs_proc
PARTS = ["sqlite", "redis"]
blocking = SyncRouter()
router = AsyncRouter()


@router.task(name="loops.add")
async def add(x: int, y: int) -> int:
    return x + y


@blocking.task(name="loops.halve")
def halve(x: float) -> float:
    return x / 2


@pytest.fixture
def app(environment: dict[str, str]) -> QueueTasks:
    """An app that runs its tasks in this process too, where a test asks for it."""
    app = QueueTasks(
        environment["QTASKS_NAME"],
        environment["QTASKS_BROKER_URL"],
        environment["QTASKS_STORAGE_URL"],
    )
    return app


@pytest.fixture(autouse=True)
def _no_socket_is_left() -> Iterator[None]:
    """The I/O thread and its own two exist once any test has used them."""
    with qtasks.QueueTasks("warm-up", "memory://"):
        before = sockets()
    yield
    # What the I/O thread, or a server, was told to close it closes soon.
    until(lambda: sockets() <= before, f"no more than {before} sockets")


@pytest.fixture
def worker(app: QueueTasks) -> Iterator[None]:
    """A worker in a thread with a loop of its own."""
    app.include_router(router)
    app.include_router(blocking)
    started, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def work() -> None:
        async with app.worker():
            loops.append(asyncio.get_running_loop())
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert started.wait(120)
    yield
    loops[0].call_soon_threadsafe(stop.set)
    thread.join()


async def use(app: QueueTasks, number: int) -> int:
    return (await add.using(app).add_task(number, 1, timeout=120)).returning


@pytest.mark.parametrize("backend", PARTS, indirect=True)
def test_one_loop_after_another_each_entering(app: QueueTasks) -> None:
    app.include_router(router)

    async def once(number: int) -> int:
        async with app.worker():
            return await use(app, number)

    assert [asyncio.run(once(n)) for n in range(5)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("backend", PARTS, indirect=True)
@pytest.mark.usefixtures("worker")
def test_one_loop_after_another_while_it_is_started_elsewhere(app: QueueTasks) -> None:
    assert [asyncio.run(use(app, n)) for n in range(20)] == list(range(1, 21))


@pytest.mark.parametrize("backend", PARTS, indirect=True)
@pytest.mark.usefixtures("worker")
def test_loops_at_the_same_time(app: QueueTasks) -> None:
    async def many(first: int) -> list[int]:
        async with app:
            return await asyncio.gather(*(use(app, first + n) for n in range(20)))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: asyncio.run(many(n)), range(0, 320, 20)))
    assert [n for some in found for n in some] == list(range(1, 321))


@pytest.mark.usefixtures("worker")
def test_a_loop_that_is_closed_over_its_waits(app: QueueTasks) -> None:
    """Nobody is left to be told; the engine and other loops go on."""
    never = AsyncRouter()

    @never.task(name="loops.unknown", queue="nobody")
    async def unknown() -> None: ...

    async def wait() -> None:
        await unknown.using(app).add_task(timeout=120)

    loop = asyncio.new_event_loop()
    waiting = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    assert asyncio.run(use(app, 1)) == 2
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # as it was meant


class TestLoopPerTest:
    """pytest-asyncio gives each test a loop; an app of the module is used in all of them."""

    app = QueueTasks("loops-per-test", "memory://")

    @pytest.mark.parametrize("number", range(3))
    async def test_entered_in_each(self, number: int) -> None:
        async with self.app:
            task = await add.using(self.app).add_task(number, 1)
            assert task.status == "new"

    async def test_concurrent_first_uses(self) -> None:
        async def enter() -> str:
            async with self.app:
                return (await add.using(self.app).add_task(1, 1)).status

        assert set(await asyncio.gather(*(enter() for _ in range(50)))) == {"new"}


@pytest.mark.parametrize("backend", PARTS, indirect=True)
@pytest.mark.usefixtures("worker")
def test_starlettes_test_client(app: QueueTasks) -> None:
    """Its loop lives in a thread and is another in each block, or in each call outside of one."""
    api = FastAPI(lifespan=lifespan(app))
    loops: set[int] = set()

    @api.get("/")
    async def root(x: int) -> int:
        loops.add(id(asyncio.get_running_loop()))
        return await use(app, x)

    @api.get("/thread")
    def thread(x: float) -> float:
        return halve.using(app).add_task(x, timeout=120).returning

    for _ in range(3):
        with TestClient(api) as client:
            assert [client.get("/", params={"x": n}).json() for n in range(5)] == [1, 2, 3, 4, 5]
            assert client.get("/thread", params={"x": 3}).json() == 1.5
    assert [TestClient(api).get("/", params={"x": n}).json() for n in range(3)] == [1, 2, 3]
    assert loops


class Notebook:
    """As ipykernel runs cells: one loop that is always running, `await` allowed at the top.

    A cell is compiled as IPython compiles it and awaited on the loop if it awaits anything.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}

    async def run(self, cell: str) -> Any:
        *body, last = ast.parse(cell).body
        assert isinstance(last, ast.Expr)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        if body:
            compiled = compile(ast.Module(body, []), "cell", "exec", flags)
            await self._result(eval(compiled, self.names))  # noqa: S307  # our own cells
        expression = compile(ast.Expression(last.value), "cell", "eval", flags)
        return await self._result(eval(expression, self.names))  # noqa: S307

    async def _result(self, value: Any) -> Any:
        return await value if inspect.iscoroutine(value) else value


async def test_a_notebooks_cells(environment: dict[str, str], monkeypatch: Any) -> None:
    notebook = Notebook()
    url = environment["QTASKS_BROKER_URL"]
    await notebook.run(f"url = {url!r}\nurl")
    cells: list[tuple[str, Callable[[Any], bool]]] = [
        (
            "import qtasks\nfrom qtasks.asyncio import QueueTasks\n"
            "app = QueueTasks('notebook', url)\nawait app.start()",
            lambda value: value is None,
        ),
        (
            "@app.task(name='notebook.double')\n"
            "async def double(x: int) -> int:\n    return 2 * x\n"
            "worker = app.worker()\nrunning = await worker.__aenter__()\nrunning.id",
            lambda value: isinstance(value, str),
        ),
        ("task = await double.add_task(4, timeout=120)\ntask.returning", lambda value: value == 8),
        (
            "import asyncio\ntasks = await double.map([(n,) for n in range(5)])\n"
            "[t.returning for t in await asyncio.gather(*(t.wait_result(120) for t in tasks))]",
            lambda value: value == [0, 2, 4, 6, 8],
        ),
        (
            "blocking = qtasks.QueueTasks('notebook', url)\n"
            "try:\n    blocking.start()\n    said = ''\n"
            "except RuntimeError as error:\n    said = str(error)\n"
            "said",
            lambda value: "qtasks.asyncio.QueueTasks" in value,
        ),
        ("await worker.__aexit__(None, None, None)\nawait app.stop()", lambda value: value is None),
    ]
    for cell, right in cells:
        assert right(await notebook.run(cell)), cell


@pytest.mark.usefixtures("worker_process")
def test_the_asyncio_prompt(environment: dict[str, str]) -> None:
    """`python -m asyncio`, typed into: its loop runs in one thread, the prompt in another."""
    typed = """
from tests.faces.sums import add
task = await add.add_task(1, 2, timeout=120)
print("awaited", task.returning)
tasks = await add.map([(n, n) for n in range(4)])
print("mapped", [(await t.wait_result(120)).returning for t in tasks])
"""
    prompt = subprocess.run(
        [sys.executable, "-m", "asyncio"],
        input=typed,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = prompt.stdout + prompt.stderr
    assert prompt.returncode == 0
    assert "awaited 3" in said
    assert "mapped [0, 2, 4, 6]" in said
    assert "Traceback" not in said
