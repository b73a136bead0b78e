"""Run tasks on SQLite and print the project's files that each of them has reached, one a line."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import FrameType

import qtasks
from qtasks.asyncio import QueueTasks

HOUSE = Path(qtasks.__file__).parent.parent
TIMES = 5

reached: set[str] = set()


def note(frame: FrameType, event: str, _: object) -> None:
    """Note the file of each function that is called, on any thread."""
    if event == "call":
        reached.add(frame.f_code.co_filename)


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
    threading.setprofile(note)
    sys.setprofile(note)
    asyncio.run(main(sys.argv[1]))
