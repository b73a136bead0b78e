"""Generators: their result is the list of what they yield."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from qtasks import ConfigurationError
from qtasks.asyncio import QueueTasks


@dataclass
class Point:
    x: int


async def shifted(n: int) -> Point:
    return Point(n + 1)


def shifted_now(n: int) -> Point:
    return Point(n + 1)


async def test_the_result_is_the_list_of_typed_yields(app: QueueTasks) -> None:
    @app.task()
    async def points(n: int) -> AsyncIterator[Point]:
        for x in range(n):
            yield Point(x)

    @app.task()
    def plain(n: int) -> Iterator[Point]:
        yield from map(Point, range(n))

    @app.task()
    def untyped(n):  # type: ignore[no-untyped-def]
        yield (n, {n})

    async with app.worker():
        expected = [Point(0), Point(1)]
        assert (await points.add_task(2, timeout=120)).returning == expected
        assert (await plain.add_task(2, timeout=120)).returning == expected
        assert (await plain.add_task(0, timeout=120)).returning == []
        assert (await untyped.add_task(2, timeout=120)).returning == [(2, {2})]
    assert list(plain(2)) == expected, "called directly it is its function"


async def test_each_yield_goes_through_the_handler(app: QueueTasks) -> None:
    @app.task(generate_handler=shifted)
    async def numbers(n: int) -> AsyncIterator[int]:
        for x in range(n):
            yield x

    @app.task(generate_handler=shifted_now)
    def plain(n: int) -> Iterator[int]:
        yield from range(n)

    @app.task(generate_handler=str)
    def texts(n: int) -> Iterator[int]:
        yield from range(n)

    async with app.worker():
        assert (await numbers.add_task(2, timeout=120)).returning == [Point(1), Point(2)]
        assert (await plain.add_task(2, timeout=120)).returning == [Point(1), Point(2)]
        assert (await texts.add_task(2, timeout=120)).returning == ["0", "1"]


async def test_a_generator_that_fails_is_closed_and_retried(app: QueueTasks) -> None:
    closed: list[str] = []

    def picky(n: int) -> int:
        raise ValueError(f"not {n}")

    @app.task(retry=1, generate_handler=picky)
    async def numbers() -> AsyncIterator[int]:
        try:
            yield 7
        finally:
            closed.append("closed")

    async with app.worker():
        task = await numbers.add_task(timeout=120)
    assert (task.error, task.attempt, closed) == ("ValueError: not 7", 2, ["closed"] * 2)


def test_a_handler_that_could_never_work_is_refused(app: QueueTasks) -> None:
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(ConfigurationError, match="cannot be async"):
        app.task(generate_handler=shifted)(numbers)
    with pytest.raises(ConfigurationError, match="for generators"):
        app.task(generate_handler=str)(shifted_now)  # type: ignore[arg-type]
