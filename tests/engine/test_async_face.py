"""What users of the asynchronous face see."""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import threading
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest

from qtasks import (
    AmbiguousApp,
    AsyncResult,
    AsyncRouter,
    Closed,
    ConfigurationError,
    PayloadTooLarge,
    Reject,
    Retry,
    SerializationError,
    SignatureMismatch,
    SyncRouter,
    Task,
    TaskFailed,
    TaskNotFinished,
    TaskTimeout,
    Unavailable,
)
from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import BaseTask, CallOptions
from qtasks.execution.definition import RESERVED
from qtasks.executors import ThreadExecutor


async def test_async_and_plain_functions(app: QueueTasks) -> None:
    @app.task()
    async def add(x: int, y: int) -> int:
        return x + y

    @app.task()
    def where() -> str:
        return threading.current_thread().name

    async with app.worker():
        task = await add.add_task(1, y=2, timeout=120)
        assert (task.status, task.returning, task.args, task.kwargs) == (
            "success", 3, [1], {"y": 2},
        )  # fmt: skip
        thread = await where.add_task(timeout=120)
        assert thread.returning.startswith("qtasks-task")
    assert await add(2, 3) == 5, "a task called directly is its function"


async def test_the_function_runs_on_the_callers_loop_and_io_does_not(app: QueueTasks) -> None:
    here = asyncio.get_running_loop()
    names: list[str] = []

    @app.task()
    async def look() -> bool:
        names.append(threading.current_thread().name)
        return asyncio.get_running_loop() is here

    async with app.worker():
        assert (await look.add_task(timeout=120)).returning
    assert names != ["qtasks-io"]


async def test_waiting_later_by_handle_by_uuid_and_from_another_client(app: QueueTasks) -> None:
    release = asyncio.Event()

    @app.task()
    async def slow() -> str:
        await release.wait()
        return "done"

    other = QueueTasks(app.name, "memory://")
    async with app.worker(), other:
        task = await slow.add_task()
        assert task.status == "new"
        with pytest.raises(TaskNotFinished):
            _ = task.returning
        waits = [
            asyncio.create_task(task.wait_result(120)),
            asyncio.create_task(AsyncResult(task.uuid, app=other).wait_result(120)),
        ]
        await asyncio.sleep(0)
        release.set()
        assert [(await wait).returning for wait in waits] == ["done", "done"]
        again = await app.get_task(task.uuid)
        assert again is not None
        assert again.returning == "done"
        assert await again.wait_result(0) is again


async def test_many_at_once(app: QueueTasks) -> None:
    @app.task()
    async def double(x: int) -> int:
        return 2 * x

    @app.task()
    async def shout(text: str) -> str:
        return text.upper()

    async with app.worker(concurrency=7):
        mapped = await double.map([(n,) for n in range(1000)])
        mixed = await app.add_tasks([double.call(4), shout.call("a")])
        done = await asyncio.gather(*(task.wait_result(120) for task in [*mapped, *mixed]))
    assert [task.returning for task in done] == [*range(0, 2000, 2), 8, "A"]


async def test_retries_end_in_success_or_error(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(retry=2)
    async def third_time() -> str:
        runs.append(1)
        if len(runs) < 3:
            raise Retry(after=0.01)
        return "lucky"

    @app.task(retry=1)
    async def never() -> None:
        raise ValueError("no")

    @app.task(retry=5)
    async def hopeless() -> None:
        raise Reject("bad input")

    async with app.worker():
        lucky = await third_time.add_task(timeout=120)
        assert (lucky.returning, lucky.attempt) == ("lucky", 3)
        failed = await never.add_task(timeout=120)
        assert (failed.status, failed.attempt, failed.dead) == ("error", 2, "failed 2 times")
        with pytest.raises(TaskFailed, match=r"(?s)ValueError: no.*in never"):
            _ = failed.returning
        rejected = await hopeless.add_task(timeout=120)
        assert (rejected.attempt, rejected.dead) == (1, "bad input")


async def test_delay_and_eta(app: QueueTasks) -> None:
    @app.task()
    async def now() -> float:
        return monotonic()

    async with app.worker():
        begin = monotonic()
        task = await now.add_task(delay=0.3)
        assert task.status == "scheduled"
        assert 0.3 <= (await task.wait_result(120)).returning - begin < 2.3
        begin = monotonic()
        eta = datetime.now(UTC) + timedelta(seconds=0.3)
        assert 0.29 <= (await now.add_task(eta=eta, timeout=120)).returning - begin < 2.3
        with pytest.raises(ConfigurationError, match="time zone"):
            await now.add_task(eta=datetime(2030, 1, 1))


async def test_a_timeout_says_what_is_known_and_the_task_goes_on(app: QueueTasks) -> None:
    @app.task()
    async def slow() -> int:
        await asyncio.sleep(0.5)
        return 1

    async with app:
        with pytest.raises(TaskTimeout, match="no worker has begun it") as caught:
            await slow.add_task(timeout=0.1)
        uuid = str(caught.value).split()[2]
        async with app.worker() as worker:
            with pytest.raises(TaskTimeout, match=f"worker {worker.id} runs it"):
                await slow.add_task(timeout=0.3)
            assert (await AsyncResult(uuid, app=app).wait_result(120)).returning == 1


@pytest.mark.parametrize(
    ("error", "args", "kwargs", "says"),
    [
        (SignatureMismatch, (1, 2, 3), {}, r"^two\(x, y=0\) .*: too many positional arguments$"),
        (SignatureMismatch, (), {"y": 1}, "^two.*: missing a required argument: 'x'$"),
        (SignatureMismatch, (1,), {"z": 1}, "^two.*: got an unexpected keyword argument 'z'$"),
        (SerializationError, (object(),), {}, "^two: argument 'x': a builtins.object would not"),
        (
            SerializationError,
            (1,),
            {"y": [{2: 1j}, open]},
            "^two: argument 'y': a builtins.",
        ),
        (PayloadTooLarge, ("x" * 2**20,), {}, "^two: .* 1048582 bytes, .* 1048576; .*max_payload"),
    ],
)
async def test_arguments_that_cannot_be_sent_are_told_and_nothing_is(
    app: QueueTasks, error: type[Exception], args: tuple[Any, ...], kwargs: Any, says: str
) -> None:
    runs: list[object] = []

    @app.task("two")
    async def two(x, y=0) -> None:  # type: ignore[no-untyped-def]
        runs.append(x)

    async with app.worker(concurrency=1):
        with pytest.raises(error, match=says):
            await two.add_task(*args, **kwargs)
        with pytest.raises(error, match=says):
            await app.add_tasks([two.call("unsent"), two.call(*args, **kwargs)])
        if not kwargs:
            with pytest.raises(error, match=says):
                await two.map([("unsent",), args])
        assert (await two.add_task("sent", timeout=120)).status == "success"
    assert runs == ["sent"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"priority": 10}, "^priority=10 is no whole number between 0 and 9$"),
        ({"priority": 5.5}, "^priority=5.5 is no whole number between 0 and 9$"),
        ({"priority": "9"}, "^priority='9' is no whole number between 0 and 9$"),
        ({"queue": "a b"}, "^'a b' cannot be the name of a queue"),
        ({"delay": math.nan}, "^delay=nan is not within"),
        ({"delay": 1e18}, r"^delay=1e\+18 is not within"),
        ({"eta": datetime(9999, 1, 1, tzinfo=UTC)}, "^eta=9999-01-01 .* is not within"),
        ({"eta": datetime(2030, 1, 1)}, "^eta= needs a time zone"),
        ({"eta": datetime.now(UTC), "delay": 1}, "^give delay= or eta=, not both"),
        ({"expires": math.inf}, "^expires=inf is not within"),
        ({"expires": math.nan}, "^expires=nan is not within"),
        ({"expires": 0.0}, "^expires=0.0: the task would be due after"),
    ],
)
async def test_options_out_of_bounds_are_told(app: QueueTasks, options: Any, says: str) -> None:
    @app.task()
    async def one() -> int:
        return 1

    async with app.worker():
        with pytest.raises(ConfigurationError, match=says):
            await one.add_task(**options)
        assert (await one.add_task(timeout=120)).returning == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"priority": -1}, "priority=-1 is no whole number between 0 and 9"),
        ({"priority": 5.5}, "priority=5.5 is no whole number between 0 and 9"),
        ({"retry": -1}, "retry=-1 is below 0"),
        ({"max_time": math.nan}, "max_time=nan is not above 0"),
        ({"retention": -1}, "retention=-1 is not a number of seconds from 0"),
        ({"retention": math.nan}, "retention=nan is not a number of seconds from 0"),
        ({"queue": ""}, "'' cannot be the name of a queue"),
        ({"executor": "process"}, "'process' is not an Executor object"),
        ({"executor": ThreadExecutor}, "ThreadExecutor'> is not an Executor object"),
        ({"generate_handler": 5}, "generate_handler=5 is no function"),
    ],
)
def test_options_of_a_decorator_out_of_bounds_are_told(
    app: QueueTasks, options: Any, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        app.task(**options)


async def test_the_limit_is_that_of_all_arguments() -> None:
    app = QueueTasks("limited", "memory://", max_payload=100)

    @app.task()
    async def length(*texts: str, **more: str) -> int:
        return sum(map(len, [*texts, *more.values()]))

    async with app.worker():
        sent = length.call("x" * 40, a="y" * 20).message(app)
        left = 100 - len(sent.args) - len(sent.kwargs)
        most = await length.add_task("x" * (40 + left), a="y" * 20, timeout=120)
        assert most.returning == 60 + left
        with pytest.raises(PayloadTooLarge, match="take 101 bytes, the limit is 100"):
            await length.add_task("x" * (41 + left), a="y" * 20)
        assert (await length.add_task("x", timeout=120)).returning == 1


async def test_a_parameter_named_as_an_option_is_told_of_and_call_reaches_it(
    app: QueueTasks, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task("wait")
    async def wait(timeout: str, key: str = "") -> str:
        return timeout + key

    assert [record.getMessage() for record in caplog.records] == [
        "task wait: parameters timeout, key are options of add_task; pass them through "
        ".call(…).add_task()"
    ]
    async with app.worker():
        with pytest.raises(SignatureMismatch, match="missing a required argument: 'timeout'"):
            await wait.add_task(timeout=120)
        assert (await wait.call(timeout="1", key="2").add_task(timeout=120)).returning == "12"


def test_the_names_of_options_are_the_same_wherever_they_are_listed() -> None:
    options = {"timeout", "transaction", *CallOptions.__annotations__}
    assert options == set(RESERVED)
    parameters = inspect.signature(BaseTask.add_task).parameters.values()
    assert options == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


async def test_what_has_no_annotation_comes_back_as_it_was(app: QueueTasks) -> None:
    from decimal import Decimal
    from uuid import UUID, uuid4

    @app.task()
    async def echo(value):  # type: ignore[no-untyped-def]
        return value

    values: list[object] = [
        (1, (2,)), {3, 4}, frozenset({"a"}), uuid4(), Decimal("1.10"), datetime(2026, 1, 2, 3),
        10**30, -(10**30), {"k": (UUID(int=1), [Decimal("NaN").is_nan()])}, b"bytes", None,
        timedelta(days=-1, microseconds=5), datetime(2026, 1, 2, tzinfo=UTC), {1: "int key"},
    ]  # fmt: skip
    async with app.worker():
        tasks = await asyncio.gather(*(echo.add_task(value, timeout=120) for value in values))
    for value, task in zip(values, tasks, strict=True):
        assert task.returning == value
        assert type(task.returning) is type(value)


async def test_an_unstorable_result_is_an_error_and_not_run_again(app: QueueTasks) -> None:
    runs = []

    @app.task(retry=3)
    async def odd():  # type: ignore[no-untyped-def]
        runs.append(1)
        return object()

    async with app.worker():
        task = await odd.add_task(timeout=120)
    assert (task.status, task.dead, len(runs)) == ("error", "unstorable result", 1)


async def test_a_router_finds_its_app(app: QueueTasks) -> None:
    router = AsyncRouter()

    @router.task()
    async def one() -> int:
        return 1

    app.include_router(router)
    async with app.worker():
        assert (await one.add_task(timeout=120)).returning == 1
        second = QueueTasks(app.name, "memory://")
        second.include_router(router)
        with pytest.raises(AmbiguousApp, match="using"):
            await one.add_task()
        task: Task[int] = await one.using(app).add_task(timeout=120)
        assert task.returning == 1


async def test_a_stopped_app_no_longer_claims_its_routers() -> None:
    """Each test of an API has an app of its own, and the garbage collector has no say in that."""
    router = AsyncRouter()

    @router.task()
    async def one() -> int:
        return 1

    def build() -> QueueTasks:
        app = QueueTasks(f"engine-{uuid4().hex[:8]}", "memory://")
        app.include_router(router)
        return app

    kept = []
    for _ in range(3):
        app = build()
        kept.append(app)
        async with app.worker():
            assert (await one.add_task(timeout=120)).returning == 1
    away = QueueTasks("away", "redis://127.0.0.1:1/0")
    away.include_router(router)
    with pytest.raises(Unavailable):
        await away.start(0.0)
    async with app.worker():
        assert (await one.add_task(timeout=120)).returning == 1, "started again"
        other = build()
        with pytest.raises(AmbiguousApp, match="using"):
            await one.add_task()
        del other


@pytest.mark.parametrize("collected", [False, True])
async def test_a_router_without_its_app_does_not_go_to_the_default_one(collected: bool) -> None:
    router = AsyncRouter()

    @router.task()
    async def one() -> int:
        return 1

    app = QueueTasks("mine", "memory://")
    app.include_router(router)
    async with app:
        await one.add_task()
    if collected:
        del app
        gc.collect()
    with pytest.raises(Closed, match="the app 'mine' is not started"):
        await one.add_task()


async def test_a_task_that_waits_for_a_task(app: QueueTasks) -> None:
    """With either face, while there is a place for the other; else its timeout ends it."""
    blocking = SyncRouter()

    @app.task("inner")
    async def inner(x: int) -> int:
        return x + 1

    @blocking.task()
    def inner_blocking(x: int) -> int:
        return x + 1

    @app.task()
    async def outer(timeout: float) -> int:
        return (await inner.add_task(1, timeout=timeout)).returning

    @app.task()
    def outer_blocking(timeout: float) -> int:
        return inner_blocking.add_task(1, timeout=timeout).returning

    @app.task()
    async def wrong() -> int:
        return inner_blocking.add_task(1).status == "new"

    app.include_router(blocking)
    async with app.worker(concurrency=2):
        for task in (outer, outer_blocking):
            assert (await task.call(5.0).add_task(timeout=120)).returning == 2
        assert "qtasks.asyncio" in str((await wrong.add_task(timeout=120)).error)
    async with app.worker(concurrency=1):
        for task in (outer, outer_blocking):
            full = await task.call(0.2).add_task(timeout=120)
            assert "no worker has begun it; 1 alive for that queue" in str(full.error)


async def test_an_app_that_was_not_entered_says_so(app: QueueTasks) -> None:
    @app.task()
    async def one() -> int:
        return 1

    with pytest.raises(Closed, match="async with app"):
        await one.add_task()


async def test_two_functions_cannot_share_a_name(app: QueueTasks) -> None:
    @app.task(name="same")
    async def one() -> int:
        return 1

    with pytest.raises(ConfigurationError, match="'same'"):

        @app.task(name="same")
        async def two() -> int:
            return 2


def test_loops_come_and_go() -> None:
    app = QueueTasks("loops", "memory://")

    @app.task()
    async def one() -> int:
        return 1

    async def once() -> int:
        async with app.worker():
            return (await one.add_task(timeout=120)).returning

    assert [asyncio.run(once()) for _ in range(3)] == [1, 1, 1]
