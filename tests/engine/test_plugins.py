"""Plugins around runs and after failures, end to end, on a pair in memory and one on disk."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

import qtasks
from qtasks import AsyncRouter, ConfigurationError, Reject, Retry, SyncRouter
from qtasks.asyncio import QueueTasks
from qtasks.plugins import (
    Again,
    Backoff,
    Decision,
    GiveUp,
    Plugin,
    Proceed,
    Retries,
    Run,
)
from tests.engine import processes

SOON = Backoff(3, first=0)


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://?lease=1" if request.param == "memory" else f"sqlite:///{tmp_path}/q.db"


@pytest.fixture
def app(url: str) -> QueueTasks:
    return QueueTasks(uuid4().hex, url)


class Named(Plugin):
    """Notes when a run enters and leaves it, and which failures it is asked about."""

    def __init__(self, name: str, seen: list[str], decision: Decision | None = None) -> None:
        self.name = name
        self.seen = seen
        self.decision = decision

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        self.seen.append(f"{self.name}>")
        try:
            return await proceed(run)
        finally:
            self.seen.append(f"<{self.name}")

    async def decide(self, run: Run, error: BaseException) -> Decision | None:
        self.seen.append(f"{self.name}?{type(error).__name__}")
        return self.decision


class Timing(Plugin):
    """Keeps how long runs took, by task."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        begun = time.perf_counter()
        try:
            return await proceed(run)
        finally:
            took = time.perf_counter() - begun
            self.seconds.setdefault(run.message.task_name, []).append(took)


class Replacing(Plugin):
    """Gives a result of its own, having run the function or not."""

    def __init__(self, result: Any) -> None:
        self.result = result

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        return self.result


class Seeing(Plugin):
    """Keeps the results, and adds to those that are sets."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        result = await proceed(run)
        self.results.append(result)
        return result | {100} if isinstance(result, set) else result


class Deciding(Plugin):
    """Decides by what it is given: a decision, or what to raise."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def decide(self, run: Run, error: BaseException) -> Decision | None:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return cast(Decision, self.answer)


async def test_retries_by_exception(app: QueueTasks) -> None:
    runs: list[str] = []

    @app.task(plugins=[Retries(SOON, {ValueError: 0, OSError: Backoff(1, first=0)})])
    async def fails(kind: str) -> None:
        runs.append(kind)
        raise {"key": KeyError, "unicode": UnicodeError, "reset": ConnectionResetError}[kind]("no")

    async with app.worker():
        key, unicode, reset = [
            await fails.add_task(kind, timeout=120) for kind in ("key", "unicode", "reset")
        ]
    assert (key.attempt, key.dead) == (4, "failed 4 times")
    assert (unicode.attempt, unicode.dead) == (1, "no retry is configured")
    assert (reset.attempt, reset.dead) == (2, "failed 2 times")
    assert runs == ["key"] * 4 + ["unicode"] + ["reset"] * 2


async def test_which_retry_counts(app: QueueTasks) -> None:
    """The task's own, else its router's, else the app's; none of these: no retry."""
    plain = AsyncRouter()
    router = AsyncRouter(plugins=[Retries(Backoff(1, first=0))])

    async def fails() -> None:
        raise ValueError("no")

    tasks = {
        "app": plain.task("of the app")(fails),
        "router": router.task("of the router")(fails),
        "never": router.task("never", retry=0)(fails),
        "task": router.task("of the task", plugins=[Retries(Backoff(3, first=0))])(fails),
        "left": router.task("left", plugins=[Retries(None, {KeyError: 5})])(fails),
    }
    app.include_router(plain)
    app.include_router(router)
    app.add_plugin(Retries(Backoff(2, first=0)))
    async with app.worker():
        ended = {name: await task.add_task(timeout=120) for name, task in tasks.items()}
    attempts = {name: task.attempt for name, task in ended.items()}
    assert attempts == {"app": 3, "router": 2, "never": 1, "task": 4, "left": 2}
    assert ended["never"].dead == "no retry is configured"


async def test_a_function_asks_for_another_run(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(retry=0)
    async def asks(after: float) -> int:
        runs.append(1)
        if len(runs) < 4:
            raise Retry(after=after)
        return len(runs)

    @app.task(retry=0)
    async def asks_nonsense() -> None:
        raise Retry(after=math.nan)

    app.add_plugin(Retries(Backoff(9, first=60)))
    async with app.worker():
        assert (await asks.add_task(0, timeout=120)).returning == 4
        nonsense = await asks_nonsense.add_task(timeout=120)
    assert nonsense.error == (
        "ValueError: Retry(after=nan): `after` must be a number of seconds, 0 or more"
    )
    assert "in asks_nonsense" in (nonsense.traceback or "")


async def test_without_after_it_is_the_backoff_of_the_retries(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(plugins=[Retries(Backoff(0, first=0))])
    async def unlucky() -> str:
        runs.append(1)
        if len(runs) < 5:
            raise Retry
        return "lucky"

    async with app.worker():
        ended = await unlucky.add_task(timeout=120)
    assert (ended.returning, ended.attempt) == ("lucky", 5)


async def test_the_order_is_app_router_task(url: str) -> None:
    seen: list[str] = []
    router = AsyncRouter(plugins=[Named("r1", seen), Named("r2", seen)])

    @router.task(plugins=[Named("t1", seen), Named("t2", seen)])
    async def fails() -> None:
        seen.append("run")
        raise ValueError("no")

    app = QueueTasks(uuid4().hex, url, plugins=[Named("a1", seen, GiveUp("enough"))])
    app.add_plugin(Named("a2", seen))
    app.include_router(router)
    async with app.worker():
        ended = await fails.add_task(timeout=120)
    assert seen[:6] == ["a1>", "a2>", "r1>", "r2>", "t1>", "t2>"]
    assert seen[6:13] == ["run", "<t2", "<t1", "<r2", "<r1", "<a2", "<a1"]
    asked = ["t2", "t1", "r2", "r1", "a2", "a1"]
    assert seen[13:] == [f"{name}?ValueError" for name in asked]
    assert (ended.attempt, ended.dead) == (1, "enough")


async def test_the_first_that_decides_wins(app: QueueTasks) -> None:
    seen: list[str] = []
    first = Named("in", seen, GiveUp("not today \udcff"))

    @app.task(retry=5, plugins=[first])
    async def fails() -> None:
        raise ValueError("no")

    @app.task(plugins=[first])
    async def rejects() -> None:
        raise Reject("never")

    @app.task(plugins=[Deciding(GiveUp(cast(str, ValueError("a reason of another type"))))])
    async def wrongly() -> None:
        raise ValueError("no")

    app.add_plugin(Named("out", seen, Again(0)))
    async with app.worker():
        assert (await fails.add_task(timeout=120)).dead == "not today \\udcff"
        assert (await rejects.add_task(timeout=120)).dead == "never"
        assert (await wrongly.add_task(timeout=120)).dead == "a reason of another type"
    assert [word for word in seen if "?" in word] == ["in?ValueError"]


async def test_one_that_times_and_one_that_replaces(app: QueueTasks) -> None:
    timing = Timing()
    app.add_plugin(timing)

    @app.task("slow")
    async def slow(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @app.task("replaced", plugins=[Replacing(7)])
    async def replaced() -> int:
        raise AssertionError("it does not run")

    @app.task("unstorable", retry=3, plugins=[Replacing(object())])
    async def unstorable() -> None: ...

    async with app.worker():
        ended = await asyncio.gather(*(slow.add_task(n / 50, timeout=120) for n in (3, 2, 1)))
        assert [task.returning for task in ended] == [0.06, 0.04, 0.02]
        assert (await replaced.add_task(timeout=120)).returning == 7
        assert (await unstorable.add_task(timeout=120)).dead == "unstorable result"
    took = sorted(timing.seconds["slow"])
    assert all(least <= got for least, got in zip((0.015, 0.035, 0.055), took, strict=True))
    assert len(timing.seconds["replaced"]) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (RuntimeError("a bug"), "RuntimeError: a bug"),
        (SystemExit(3), "SystemExit: 3"),
        (asyncio.CancelledError(), "CancelledError: "),
        (True, "TypeError: Deciding.decide returned True"),
    ],
)
async def test_a_failure_hook_that_fails(
    app: QueueTasks, caplog: pytest.LogCaptureFixture, answer: object, says: str
) -> None:
    @app.task(retry=5, plugins=[Deciding(answer)])
    async def fails() -> None:
        raise ValueError("no")

    @app.task()
    async def fine() -> int:
        return 1

    async with app.worker():
        with caplog.at_level(logging.ERROR):
            ended = await fails.add_task(timeout=120)
        assert (await fine.add_task(timeout=120)).returning == 1
    assert ended.error == f"ValueError: no; then a plugin failed: {says}"
    assert (ended.status, ended.attempt, ended.dead) == ("error", 1, "a plugin failed")
    assert ended.traceback is not None
    assert "in fails" in ended.traceback
    logged = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info and type(record.exc_info[1]) for record in logged] in (
        [type(answer)],
        [TypeError],
    )


async def test_what_is_raised_around_a_run_is_its_failure(app: QueueTasks) -> None:
    class Raising(Plugin):
        def __init__(self, *errors: Exception) -> None:
            self.errors = list(errors)

        async def around_execute(self, run: Run, proceed: Proceed) -> Any:
            if self.errors:
                raise self.errors.pop(0)
            return await proceed(run)

    @app.task(plugins=[Retries(SOON), Raising(ValueError("no"), Retry(after=0))])
    async def third_time() -> str:
        return "run"

    @app.task(plugins=[Raising(Reject("not this one"))])
    async def rejected() -> None: ...

    async with app.worker():
        ended = await third_time.add_task(timeout=120)
        assert (ended.returning, ended.attempt) == ("run", 3)
        assert (await rejected.add_task(timeout=120)).dead == "not this one"


async def test_a_traceback_begins_where_the_error_is_of_interest(app: QueueTasks) -> None:
    """At the function, whatever is around it; at the plugin, when it is the plugin that raised."""

    class Strict(Plugin):
        async def around_execute(self, run: Run, proceed: Proceed) -> Any:
            if await proceed(run) is None:
                raise ValueError("no result")

    @app.task("raises")
    async def raises() -> None:
        raise ValueError("no")

    @app.task("threaded")
    def threaded() -> None:
        raise ValueError("no")

    @app.task("empty")
    async def empty() -> None: ...

    app.add_plugin(Timing())
    app.add_plugin(Strict())
    async with app.worker():
        for task, begins_in in ((raises, "raises"), (threaded, "threaded")):
            trace = (await task.add_task(timeout=120)).traceback or ""
            assert trace.splitlines()[1].endswith(f"in {begins_in}")
        trace = (await empty.add_task(timeout=120)).traceback or ""
    assert [line.rpartition(" in ")[2] for line in trace.splitlines() if " in " in line] == [
        "around_execute", "around_execute",
    ]  # fmt: skip


async def test_a_run_that_waits_for_a_decision_is_given_back(app: QueueTasks) -> None:
    asked = asyncio.Event()

    class Slow(Plugin):
        async def decide(self, run: Run, error: BaseException) -> Decision | None:
            if not asked.is_set():
                asked.set()
                await asyncio.sleep(60)
            return GiveUp("asked again")

    @app.task(plugins=[Slow()])
    async def fails() -> None:
        raise ValueError("no")

    async with app:
        async with app.worker(grace=0.05):
            task = await fails.add_task()
            await asyncio.wait_for(asked.wait(), 120)
        async with app.worker():
            ended = await task.wait_result(120)
    assert (ended.attempt, ended.dead) == (1, "asked again")


async def test_generators_and_threads(app: QueueTasks) -> None:
    """What the plugin sees is the list of yields; its context reaches the thread."""
    tenant: ContextVar[str] = ContextVar("tenant")

    class Tenant(Plugin):
        async def around_execute(self, run: Run, proceed: Proceed) -> Any:
            tenant.set(f"of {run.message.task_name}, run {run.attempt}")
            result = await proceed(run)
            return sorted(result) if isinstance(result, list) else result

    app.add_plugin(Tenant())

    @app.task("numbers")
    async def numbers() -> AsyncIterator[int]:
        yield 3
        yield 1

    @app.task("plain")
    def plain() -> Iterator[str]:
        yield tenant.get()
        yield "a"

    @app.task("threaded", plugins=[Retries(SOON)])
    def threaded() -> str:
        if tenant.get().endswith("1"):
            raise ValueError("again")
        return tenant.get()

    async with app.worker():
        assert (await numbers.add_task(timeout=120)).returning == [1, 3]
        assert (await plain.add_task(timeout=120)).returning == ["a", "of plain, run 1"]
        assert (await threaded.add_task(timeout=120)).returning == "of threaded, run 2"


async def test_one_router_in_two_apps_with_different_plugins(url: str) -> None:
    seen: list[str] = []
    router = AsyncRouter(plugins=[Named("router", seen)])

    @router.task()
    async def value() -> int:
        return 1

    one = QueueTasks(uuid4().hex, url, plugins=[Named("one", seen)])
    two = QueueTasks(uuid4().hex, url, plugins=[Replacing(2), Named("within", seen)])
    for app in (one, two):
        app.include_router(router)
    async with one.worker(), two.worker():
        assert (await value.using(one).add_task(timeout=120)).returning == 1
        assert seen == ["one>", "router>", "<router", "<one"]
        assert (await value.using(two).add_task(timeout=120)).returning == 2
    assert len(seen) == 4


def test_the_blocking_face(url: str) -> None:
    """The same plugins; the hooks run on the worker's loop."""
    router = SyncRouter(plugins=[Retries(SOON)])
    runs: list[int] = []

    @router.task(plugins=[Deciding(None)])
    def second_time() -> int:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("no")
        return len(runs)

    timing = Timing()
    app = qtasks.QueueTasks(uuid4().hex, url, plugins=[timing])
    app.include_router(router)

    @app.task(plugins=[Replacing("replaced")])
    def replaced() -> str:
        return "run"

    async def work() -> None:
        async with app.worker():
            assert await asyncio.to_thread(add) == (2, "replaced")

    def add() -> tuple[int, str]:
        with app:
            one, two = second_time.add_task(timeout=120), replaced.add_task(timeout=120)
            return one.returning, two.returning

    asyncio.run(work())
    assert [len(times) for times in timing.seconds.values()] == [2, 1]


def test_what_is_no_plugin_is_refused() -> None:
    app = QueueTasks(uuid4().hex, "memory://")
    wrong: Any = Timing
    for give in (
        lambda: app.add_plugin(wrong),
        lambda: app.task(plugins=[wrong]),
        lambda: AsyncRouter(plugins=[wrong]),
        lambda: SyncRouter(plugins=[wrong]),
        lambda: QueueTasks(plugins=[wrong]),
    ):
        with pytest.raises(ConfigurationError, match="is not a Plugin object"):
            give()
    with pytest.raises(ConfigurationError, match="not both"):
        app.task(retry=3, plugins=[Retries(5)])
    with pytest.raises(ConfigurationError, match="retry=-1"):
        app.task(retry=-1)


async def test_a_result_from_another_process_is_seen_as_any_other(app: QueueTasks) -> None:
    seeing = Seeing()
    app.include_router(processes.router)
    app.add_plugin(seeing)
    async with app.worker():
        task = await processes.numbers.using(app).add_task(2, timeout=120)
        await processes.unstored.using(app).add_task(timeout=120)
    assert task.returning == {0, 1, 100}
    assert seeing.results == [{0, 1}, None], "what is not kept does not come here"
