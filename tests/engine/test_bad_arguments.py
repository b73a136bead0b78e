"""Arguments that do not fit the function: its task ends at once, and says which one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qtasks import SerializationError
from qtasks.asyncio import QueueTasks
from qtasks_core import TaskMessage


@dataclass
class Point:
    x: int
    y: int = 0

    def __post_init__(self) -> None:
        if self.x == 13:
            raise LookupError("no such column")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (({"x": 1}, "two"), "argument 'times': Expected `int`, got `str`"),
        (({"y": 1}, 2), "argument 'point'"),
        (({"x": 13}, 2), "argument 'point': no such column"),
        (({"x": 1},), "missing a required argument: 'times'"),
        (({"x": 1}, 2, 3), "too many positional arguments"),
    ],
)
async def test_the_task_ends_with_the_arguments_name_and_no_retry(
    app: QueueTasks, args: tuple[object, ...], says: str
) -> None:
    sender = QueueTasks(app.name, "memory://")
    runs: list[Point] = []

    @app.task("draw", retry=5)
    async def draw(point: Point, times: int) -> None:
        runs.append(point)

    @sender.task("draw")
    async def as_the_sender_knows_it(*args): ...  # type: ignore[no-untyped-def]

    async with app.worker(), sender:
        task = await as_the_sender_knows_it.add_task(*args, timeout=120)
        assert (task.status, task.attempt, task.dead) == ("error", 1, "bad arguments")
        assert task.error is not None
        assert task.error.startswith("BadArguments: draw"), "as of any exception, once"
        assert says in task.error
        assert runs == []
        assert (await draw.add_task(Point(1), 2, timeout=120)).status == "success"


async def test_another_encoding_is_not_taken_for_the_own(app: QueueTasks) -> None:
    runs: list[object] = []

    @app.task("note")
    async def note(*numbers: object) -> None:
        runs.append(numbers)

    # As MessagePack it would be the number 91, and what follows.
    other = TaskMessage(uuid="u", task_name="note", args=b'["text"]', encoding="json")
    async with app.worker():
        await app.submit(other, None)
        sent = await app.get_task("u")
        assert sent is not None
        task = await sent.wait_result(timeout=120)
        assert (task.status, task.attempt, task.dead) == ("error", 1, "bad arguments")
        assert task.error is not None
        assert "are encoded as 'json', and this worker reads 'msgpack'" in task.error
        assert (await note.add_task(1, timeout=120)).status == "success"
    assert runs == [(1,)]


async def test_what_the_function_raises_itself_is_retried_as_ever(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(retry=1)
    async def odd(error: str) -> None:
        runs.append(1)
        raise TypeError(error) if error == "type" else SerializationError(error)

    async with app.worker():
        for error in ("type", "serialization"):
            task = await odd.add_task(error, timeout=120)
            assert (task.attempt, task.dead) == (2, "failed 2 times")
    assert len(runs) == 4
