"""Run tasks on SQLite and print the project's files that each of them has reached, one a line."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import qtasks
from qtasks.asyncio import QueueTasks

if TYPE_CHECKING:
    from _typeshed import TraceFunction

HOUSE = Path(qtasks.__file__).parent.parent
WITHIN = str(HOUSE / "qtasks")
TIMES = 30

reached: set[str] = set()


def note(frame: FrameType, event: str, _: object) -> TraceFunction | None:
    """Note the file of each line that runs, on any thread.

    Of a coroutine that only passes on to another coroutine what wakes that one up, no line runs.
    """
    if event == "line":
        reached.add(frame.f_code.co_filename)
    return note if frame.f_code.co_filename.startswith(WITHIN) else None


async def main(directory: str) -> None:
    """Enqueue, run and await one task after the other; print what all of them have reached."""
    app = QueueTasks("way", f"sqlite:///{directory}/way.db")

    @app.task()
    async def add(x: int, y: int) -> int:
        return x + y

    always: set[str] = set()
    async with app, app.worker():
        for at in range(TIMES):
            reached.clear()
            task = await add.add_task(1, at, timeout=60)
            assert task.returning == 1 + at
            # A timer of the worker may have reached others: those are not of the task's way.
            always = reached & always if at else set(reached)
    for file in sorted(always):
        path = Path(file)
        if path.is_relative_to(HOUSE) and path != Path(__file__):
            print(path.relative_to(HOUSE).as_posix())


if __name__ == "__main__":
    threading.settrace(note)
    sys.settrace(note)
    asyncio.run(main(sys.argv[1]))
