"""An app's life: starting, many threads and loops, forks, signals, and being given up."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks import AsyncRouter, Closed, ConfigurationError, TaskTimeout
from qtasks import app as app_module
from qtasks.asyncio import QueueTasks
from qtasks.bridge.crossing import io_thread
from qtasks_core import Task
from qtasks_core.errors import Unavailable
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.processes import Process
from tests.waits import WaitedFor


def script(path: Path, code: str, **environment: str) -> Process:
    """Run a program of its own, with an embedded default of its own."""
    path.write_text(code)
    return Process(str(path), environment={"XDG_DATA_HOME": str(path.parent), **environment})


# -- starting and stopping -----------------------------------------------------------------


class Slow(MemoryBroker):
    """Takes its time to start, or never does."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name)
        self.seconds = seconds
        self.starts = 0

    async def start(self, namespace: str) -> None:
        self.starts += 1
        await asyncio.sleep(self.seconds)
        await super().start(namespace)


def slow_app(seconds: float) -> tuple[QueueTasks, Slow]:
    name = uuid4().hex
    broker = Slow(name, seconds)
    return QueueTasks(name, broker, MemoryStorage(name)), broker


@pytest.mark.parametrize("seconds", [0.2, 60.0])
async def test_a_start_that_was_cancelled_is_taken_back(seconds: float) -> None:
    app, broker = slow_app(seconds)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(app.start(), 0.1)
    await asyncio.sleep(0.3)
    broker.seconds = 0.0
    async with app:
        assert app.client
    with pytest.raises(Closed):
        _ = app.client


async def test_stopping_what_was_not_started_does_nothing(app: QueueTasks) -> None:
    await app.stop()
    async with app:
        assert app.client
    with pytest.raises(Closed):
        _ = app.client


def test_threads_and_loops_start_the_default_app_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at its first use; the app that starts by itself has one client for them all."""
    router = AsyncRouter()

    @router.task()
    async def one() -> int:
        return 1

    default, broker = slow_app(0.05)
    default.starts_itself = True
    monkeypatch.setattr(app_module, "_default", default)
    default.register(one.definition)
    gate = threading.Barrier(8)

    def first_use(_: int) -> str:
        gate.wait()
        return asyncio.run(one.add_task()).status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first_use, range(8))) == ["new"] * 8
    assert broker.starts == 1
    asyncio.run(default.stop())


async def test_a_signal_ends_the_wait_for_a_server_that_is_not_there(tmp_path: Path) -> None:
    code = "from qtasks.asyncio import QueueTasks\nQueueTasks().run_forever()"
    nowhere = "amqp://guest:guest@127.0.0.1:1/"
    with script(tmp_path / "worker.py", code, QTASKS_BROKER_URL=nowhere) as worker:
        worker.wait_for("trying again")
        assert worker.terminate(timeout=10) == 0
        assert "stopped before" in worker.output()


# -- forks ---------------------------------------------------------------------------------

FORKED = """
import asyncio, os
from qtasks.asyncio import QueueTasks

app = QueueTasks("forked")

@app.task()
async def pid() -> int:
    return os.getpid()

async def work():
    async with app.worker():
        assert (await pid.add_task(timeout=20)).returning == os.getpid()

async def main():
    async with app:
        assert (await pid.add_task()).status == "new"

asyncio.run(main())
app.connect().result()
child = os.fork()
if child == 0:
    asyncio.run(main())
    asyncio.run(work())
    app.disconnect().result()  # of the parent's block, which the child inherited
else:
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
    asyncio.run(work())
    app.disconnect().result()
    print("both went on")
"""


def test_a_child_and_its_parent_go_on_after_a_fork(tmp_path: Path) -> None:
    with script(tmp_path / "forked.py", FORKED) as process:
        process.wait_for("both went on")


PREFORKED = """
import asyncio, os
from qtasks import AsyncRouter
from qtasks.app import default_app

router = AsyncRouter()

@router.task()
async def one() -> int:
    return 1

default_app()  # made before the forks, as `--preload` makes it
if {used}:
    asyncio.run(one.add_task())
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        assert asyncio.run(one.add_task()).status == "new"
        raise SystemExit(0)  # runs what is registered for the exit
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0, "a child failed"
asyncio.run(one.add_task())
print("all did")
"""


@pytest.mark.parametrize("used", [False, True])
def test_the_default_app_in_forked_servers(used: bool, tmp_path: Path) -> None:
    with script(tmp_path / "server.py", PREFORKED.format(used=used)) as process:
        process.wait_for("all did")
        assert "Traceback" not in process.output()


def test_parts_that_cannot_be_built_anew_say_so_in_a_child(tmp_path: Path) -> None:
    code = """
import os
from qtasks import QueueTasks
from qtasks_sqlite import SqliteBroker, SqliteStorage

app = QueueTasks("parts", SqliteBroker("sqlite:///{0}/x.db"), SqliteStorage("sqlite:///{0}/x.db"))
app.connect().result()
if os.fork() == 0:
    app.connect().result()
os.wait()
"""
    with script(tmp_path / "parts.py", code.format(tmp_path)) as process:
        process.wait_for("give its parts as URLs")


# -- waits that end early --------------------------------------------------------------------


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    name = uuid4().hex
    storage = WaitedFor(name)
    app = QueueTasks(name, MemoryBroker(name), storage)

    @app.task()
    async def never() -> None: ...

    async with app:
        adding = [asyncio.create_task(never.add_task(timeout=50)) for _ in range(20)]
        async with asyncio.timeout(10):
            while len(storage.waited_for) < 20:  # noqa: ASYNC110  # on the I/O thread
                await asyncio.sleep(0.01)
        for one in adding:
            one.cancel()
        await asyncio.wait(adding)
        assert all(one.cancelled() for one in adding)
        async with asyncio.timeout(10):
            while storage.waited_for:  # noqa: ASYNC110  # on the I/O thread
                await asyncio.sleep(0.01)
        # The tasks themselves go on.
        async with app.worker():
            assert (await never.add_task(timeout=120)).status == "success"


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/tasks.db"])
async def test_calls_in_the_air_are_answered_when_their_app_stops(tmp_path: Path, url: str) -> None:
    app = QueueTasks(f"stops-{uuid4().hex[:8]}", url.format(tmp_path))

    @app.task()
    async def never() -> None: ...

    for number in range(30):
        await app.start()
        calls = [asyncio.create_task(never.add_task(timeout=50)) for _ in range(50)]
        for _ in range(number % 10):
            await asyncio.sleep(0)
        await app.stop()
        async with asyncio.timeout(120):
            errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in errors} == {Closed}


def test_ctrl_c_ends_a_blocking_wait(tmp_path: Path) -> None:
    code = """
from qtasks import QueueTasks
from qtasks_memory import MemoryBroker
from tests.waits import WaitedFor

storage = WaitedFor("interrupted")
app = QueueTasks("interrupted", MemoryBroker("interrupted"), storage)

@app.task()
def never() -> None: ...

with app:
    try:
        print("waiting", flush=True)
        never.add_task(timeout=50)
    except KeyboardInterrupt:
        app.get_task("x")  # a crossing later the wait was taken back
        print("left behind:", storage.waited_for, flush=True)
"""
    with script(tmp_path / "interrupted.py", code) as process:
        process.wait_for("waiting")
        time.sleep(0.3)
        process.signal(signal.SIGINT)
        process.wait_for("left behind: set()")


class Frozen(MemoryStorage):
    """Answers no question."""

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        await asyncio.sleep(60)
        raise Unavailable("frozen")


async def test_a_frozen_storage_adds_little_to_a_timeout() -> None:
    name = uuid4().hex
    app = QueueTasks(name, MemoryBroker(name), Frozen(name))

    @app.task()
    async def never() -> None: ...

    async with app:
        began = time.monotonic()
        with pytest.raises(TaskTimeout, match="no record of it can be read"):
            await never.add_task(timeout=0.2)
        assert time.monotonic() - began < 40  # not the 60 s of a read


class Garbage(MemoryStorage):
    """Its first inbox fails in a way that nobody expects."""

    fail: asyncio.Event

    async def inbox(self):  # type: ignore[no-untyped-def]
        inbox = await super().inbox()
        if not self.fail.is_set():

            async def broken() -> list[Task]:
                await self.fail.wait()
                raise ValueError("garbage")

            inbox.receive = broken  # type: ignore[method-assign]
        return inbox


async def test_an_inbox_that_fails_ends_the_waits_and_is_replaced() -> None:
    name = uuid4().hex
    storage = Garbage(name)
    storage.fail = asyncio.Event()
    app = QueueTasks(name, MemoryBroker(name), storage)

    @app.task()
    async def one() -> int:
        return 1

    async with app:
        waits = [asyncio.create_task(one.add_task(timeout=120)) for _ in range(3)]
        await asyncio.sleep(0.1)
        io_thread().post(storage.fail.set)
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert [str(error) for error in errors] == ["garbage"] * 3
        assert len({id(error) for error in errors}) == 3, "each waiter has an error of its own"
        async with app.worker():
            assert (await one.add_task(timeout=120)).returning == 1


# -- the client's rest -----------------------------------------------------------------------


class Refusing(MemoryBroker):
    async def publish(self, messages, transaction=None):  # type: ignore[no-untyped-def]
        raise ValueError("not today")


async def test_callers_of_one_batch_raise_errors_of_their_own() -> None:
    name = uuid4().hex
    app = QueueTasks(name, Refusing(name), MemoryStorage(name))

    @app.task()
    async def one() -> int:
        return 1

    async with app:
        errors = await asyncio.gather(*(one.add_task() for _ in range(5)), return_exceptions=True)
    assert {type(error) for error in errors} == {ValueError}
    assert len({id(error) for error in errors}) == 5


async def test_stopping_ends_each_wait_with_an_error_of_its_own(app: QueueTasks) -> None:
    @app.task()
    async def never() -> None: ...

    async with app:
        waits = [asyncio.create_task(never.add_task(timeout=120)) for _ in range(3)]
        await asyncio.sleep(0.1)
    errors = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(error).__name__ for error in errors] == ["Closed"] * 3
    assert len({id(error) for error in errors}) == 3


def test_loops_that_were_closed_are_forgotten() -> None:
    app = QueueTasks("closed-loops", "memory://")

    async def once() -> None:
        async with app:
            await app.get_task("x")

    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    for _ in range(5):
        with asyncio.Runner() as runner:
            loops.append(weakref.ref(runner.get_loop()))
            runner.run(once())
        del runner
    gc.collect()
    assert len([loop for loop in loops if loop() is not None]) <= 1


async def test_two_apps_in_one_process() -> None:
    first, second = (QueueTasks(uuid4().hex, "memory://") for _ in range(2))
    router = AsyncRouter()

    @router.task()
    async def name_of(it: str) -> str:
        return it

    first.include_router(router)
    second.include_router(router)
    async with first.worker(), second.worker():
        tasks = [
            await name_of.using(app).add_task(app.name, timeout=120) for app in (first, second)
        ]
        assert [task.returning for task in tasks] == [first.name, second.name]
        assert await first.get_task(tasks[1].uuid) is None


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mongodb://me:hidden@h", r"^no backend for mongodb:// is installed; there are: amqp, "),
        ("localhost:6379", r"^'localhost:…' is not a URL; try sqlite:///"),
        ("memory://?lease=soon", "lease='soon' must be a number of seconds"),
        ("sqlite:////nowhere/tasks.db", r"^/nowhere is not a directory: create it first$"),
        ("redis://:hidden@127.0.0.1:1/0", r"^redis:// needs .*: pip install '\.\[redis\]'"),
        ("amqp://me:hidden@127.0.0.1:1", r"^amqp:// needs .*: pip install '\.\[rabbitmq\]'"),
        ("kafka://127.0.0.1:1", r"^kafka:// needs .*: pip install '\.\[kafka\]'"),
        (
            "postgresql://127.0.0.1:1/x",
            r"^postgresql:// .* pip install '\.\[postgres\]'",
        ),
    ],
)
async def test_parts_that_cannot_be_had_are_told_and_another_app_goes_on(
    app: QueueTasks, url: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = {"redis", "aio_pika", "aiormq", "aiokafka", "asyncpg"}
    for module in drivers | {name for name in sys.modules if name.split(".")[0] in drivers}:
        monkeypatch.setitem(sys.modules, module, None)

    @app.task()
    async def one() -> int:
        return 1

    async with app.worker():
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=says) as caught:
                async with QueueTasks("wrong", url):
                    pytest.fail("it started")
            assert "hidden" not in str(caught.value)
            assert (await one.add_task(timeout=120)).returning == 1


async def test_a_thread_cannot_be_a_worker_process(app: QueueTasks) -> None:
    with pytest.raises(ConfigurationError, match=r"main thread.*app\.worker\(\)"):
        await asyncio.to_thread(app.run_forever)


async def test_a_worker_that_could_run_nothing_is_refused(app: QueueTasks) -> None:
    with pytest.raises(ConfigurationError, match="concurrency=0 is below 1"):
        async with app.worker(concurrency=0):
            pytest.fail("it started")
