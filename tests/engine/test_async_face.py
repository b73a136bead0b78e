"""What users of the asynchronous face see."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from time import monotonic

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
    Task,
    TaskFailed,
    TaskNotFinished,
    TaskTimeout,
)
from qtasks.asyncio import QueueTasks


async def test_async_and_plain_functions(app: QueueTasks) -> None:
    @app.task()
    async def add(x: int, y: int) -> int:
        return x + y

    @app.task()
    def where() -> str:
        return threading.current_thread().name

    async with app.worker():
        task = await add.add_task(1, y=2, timeout=5)
        assert (task.status, task.returning, task.args, task.kwargs) == (
            "success", 3, [1], {"y": 2},
        )  # fmt: skip
        thread = await where.add_task(timeout=5)
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
        assert (await look.add_task(timeout=5)).returning
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
            asyncio.create_task(task.wait_result(5)),
            asyncio.create_task(AsyncResult(task.uuid, app=other).wait_result(5)),
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
        done = await asyncio.gather(*(task.wait_result(20) for task in [*mapped, *mixed]))
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
        lucky = await third_time.add_task(timeout=5)
        assert (lucky.returning, lucky.attempt) == ("lucky", 3)
        failed = await never.add_task(timeout=10)
        assert (failed.status, failed.attempt, failed.dead) == ("error", 2, "failed 2 times")
        with pytest.raises(TaskFailed, match=r"(?s)ValueError: no.*in never"):
            _ = failed.returning
        rejected = await hopeless.add_task(timeout=5)
        assert (rejected.attempt, rejected.dead) == (1, "bad input")


async def test_delay_and_eta(app: QueueTasks) -> None:
    @app.task()
    async def now() -> float:
        return monotonic()

    async with app.worker():
        begin = monotonic()
        task = await now.add_task(delay=0.3)
        assert task.status == "scheduled"
        assert 0.3 <= (await task.wait_result(5)).returning - begin < 2.3
        begin = monotonic()
        eta = datetime.now(UTC) + timedelta(seconds=0.3)
        assert 0.29 <= (await now.add_task(eta=eta, timeout=5)).returning - begin < 2.3
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
            assert (await AsyncResult(uuid, app=app).wait_result(5)).returning == 1


async def test_bad_input_is_told_before_anything_is_sent(app: QueueTasks) -> None:
    @app.task()
    async def two(x, y=0): ...  # type: ignore[no-untyped-def]

    async with app:
        with pytest.raises(SignatureMismatch, match="two"):
            await two.add_task(1, 2, 3)
        with pytest.raises(SerializationError, match="argument 'x'"):
            await two.add_task(object())
        with pytest.raises(PayloadTooLarge, match="max_payload"):
            await two.add_task("x" * 2_000_000)
        with pytest.raises(ConfigurationError, match="priority"):
            await two.add_task(1, priority=10)


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
            await wait.add_task(timeout=5)
        assert (await wait.call(timeout="1", key="2").add_task(timeout=5)).returning == "12"


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
        tasks = await asyncio.gather(*(echo.add_task(value, timeout=5) for value in values))
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
        task = await odd.add_task(timeout=5)
    assert (task.status, task.dead, len(runs)) == ("error", "unstorable result", 1)


async def test_a_router_finds_its_app(app: QueueTasks) -> None:
    router = AsyncRouter()

    @router.task()
    async def one() -> int:
        return 1

    app.include_router(router)
    async with app.worker():
        assert (await one.add_task(timeout=5)).returning == 1
        second = QueueTasks(app.name, "memory://")
        second.include_router(router)
        with pytest.raises(AmbiguousApp, match="using"):
            await one.add_task()
        task: Task[int] = await one.using(app).add_task(timeout=5)
        assert task.returning == 1


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
            return (await one.add_task(timeout=5)).returning

    assert [asyncio.run(once()) for _ in range(3)] == [1, 1, 1]
