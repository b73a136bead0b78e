"""Tasks that misbehave: each ends with an error that says so, and the rest of the queue goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from qtasks import Reject, SerializationError
from qtasks.asyncio import QueueTasks


class Base(BaseException):
    """Which `except Exception` does not catch."""


class Untraceable(Exception):
    __traceback__ = 5  # type: ignore[assignment]


RAISED = {
    "odd traceback": Untraceable("no trace"),
    "error": ValueError("of the usual kind"),
    "sys.exit": SystemExit(3),
    "interrupt": KeyboardInterrupt(),
    "generator exit": GeneratorExit(),
    "cancelled": asyncio.CancelledError(),
    "base": Base("of no usual kind"),
    "odd syntax": SyntaxError("odd", ("file", 1, "x", "text")),  # type: ignore[arg-type]
}


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Wordless:
    def __str__(self) -> str:
        raise ValueError("no words")


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


async def nothing() -> None: ...


async def numbers() -> AsyncIterator[int]:
    yield 1


def fall(n: int) -> int:
    return fall(n + 1)


@pytest.mark.parametrize("as_coroutine", [False, True])
@pytest.mark.parametrize(
    ("what", "says", "dead"),
    [
        ("recursion", "RecursionError: maximum recursion depth", "no retry is configured"),
        ("error", "ValueError: of the usual kind", "no retry is configured"),
        ("sys.exit", "SystemExit: 3", "no retry is configured"),
        ("memory", "MemoryError: ", "no retry is configured"),
        ("interrupt", "KeyboardInterrupt: ", "no retry is configured"),
        ("generator exit", "GeneratorExit", "no retry is configured"),
        ("cancelled", "CancelledError: the function cancelled itself", "no retry is configured"),
        ("base", "Base: of no usual kind", "no retry is configured"),
        ("unspeakable", "Unspeakable: (its message", "no retry is configured"),
        ("odd syntax", "SyntaxError: odd", "no retry is configured"),
        ("odd traceback", "Untraceable: no trace", "no retry is configured"),
        ("rejected", "Reject: (its reason cannot be made)", "(its reason cannot be made)"),
        ("surrogate", "ValueError: no file \\udcff", "no retry is configured"),
        ("object", "would not come back as it is", "unstorable result"),
        ("nested", "RecursionError", "unstorable result"),
        ("surrogate result", "surrogates not allowed", "unstorable result"),
        ("large", "bytes, the limit is 1048576", "unstorable result"),
        ("coroutine", "nobody has run the coroutine that it is", "unstorable result"),
        ("generator", "nobody has run the generator that it is", "unstorable result"),
        ("async generator", "nobody has run the async_generator that it is", "unstorable result"),
    ],
)
async def test_its_task_fails_and_the_others_go_on(
    app: QueueTasks, what: str, says: str, dead: str, as_coroutine: bool
) -> None:
    def misbehave(what: str) -> Any:
        if what in RAISED:
            raise RAISED[what]
        if what == "memory":
            return bytearray(1 << 62)
        if what == "recursion":
            return fall(0)
        if what == "unspeakable":
            raise Unspeakable
        if what == "rejected":
            raise Reject(Wordless())  # type: ignore[arg-type]
        if what == "surrogate":
            raise ValueError("no file \udcff")
        if what == "coroutine":
            return nothing()
        return {
            "object": object(),
            "nested": nested(5000),
            "surrogate result": "\udcff",
            "large": "x" * 2_000_000,
            "generator": (n for n in range(3)),
            "async generator": numbers(),
        }[what]

    async def misbehave_async(what: str) -> Any:
        return misbehave(what)

    misbehaving = app.task("misbehave")(misbehave_async if as_coroutine else misbehave)

    @app.task()
    async def fine() -> str:
        return "fine"

    async with app.worker():
        ended = await misbehaving.add_task(what, timeout=120)
        assert (ended.status, ended.attempt, ended.dead) == ("error", 1, dead)
        assert says in (ended.error or "")
        assert (await fine.add_task(timeout=120)).returning == "fine"


@pytest.mark.parametrize("stored", [True, False])
async def test_a_decorator_that_is_not_async_is_told(app: QueueTasks, stored: bool) -> None:
    """As a success it would be one of a task that did nothing."""

    def passing(function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], Any]:
        @wraps(function)
        def passed() -> Any:
            return function()

        return passed

    @app.task(retry=3, store_result=stored)
    @passing
    async def decorated() -> None: ...

    async with app.worker():
        ended = await decorated.add_task(timeout=120)
    assert (ended.attempt, ended.dead) == (1, "unstorable result")
    assert "nobody has run the coroutine that it is; the task's function" in (ended.error or "")


async def test_the_limit_of_a_result_is_the_apps() -> None:
    app = QueueTasks("limited", "memory://", max_payload=100)

    @app.task()
    async def text(length: int) -> str:
        return "x" * length

    @app.task(store_result=False)
    async def unstored(length: int) -> str:
        return "x" * length

    async with app.worker():
        assert (await text.add_task(90, timeout=120)).status == "success"
        assert (await text.add_task(200, timeout=120)).dead == "unstorable result"
        assert (await unstored.add_task(200, timeout=120)).status == "success"


async def test_a_nested_argument_that_cannot_travel_is_told(app: QueueTasks) -> None:
    @app.task()
    async def take(value): ...  # type: ignore[no-untyped-def]

    async with app:
        with pytest.raises(SerializationError, match="argument 'value'"):
            await take.add_task(nested(5000))


def test_forks_and_closed_standard_files_do_not_stop_a_worker() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engine.hostile"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not line.startswith("task ")]
    assert said == [
        "fork_thread success parent",
        "statuses success [3, 0, 1, 1]",
        "over",
        "fork success parent",
        "close_stdout success None",
        "use_closed error ValueError: I/O operation on closed file.",
        "close_stderr success None",
        "fail error ValueError: nobody hears of this",
        "again error ValueError: twice",
        "fine success fine",
    ]
    assert (done.stdout, done.returncode) == ("about to close\n", 0)


async def test_an_exception_beyond_exception_fails_its_task(app: QueueTasks) -> None:
    """Given back it would come again at once, for ever."""
    runs: list[int] = []

    class Unusual(BaseException):
        pass

    @app.task()
    async def unusual() -> None:
        runs.append(1)
        raise Unusual("hello")

    @app.task()
    def in_a_thread() -> None:
        runs.append(2)
        raise Unusual("there")

    async with app.worker():
        assert "Unusual: hello" in ((await unusual.add_task(timeout=120)).error or "")
        assert "Unusual: there" in ((await in_a_thread.add_task(timeout=120)).error or "")
    assert runs == [1, 2]
