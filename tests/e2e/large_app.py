"""Workers whose task returns what it got and notes each run: `python -m tests.e2e.large_app`.

One line a run: the length of the text and the process that runs it.
"""

from __future__ import annotations

import os

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks

router = AsyncRouter()


@router.task(name="echo")
async def echo(text: str) -> str:
    descriptor = os.open(os.environ["LARGE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{len(text)} {os.getpid()}\n".encode())
    os.close(descriptor)
    return text


def main() -> None:
    app = QueueTasks()
    app.include_router(router)
    app.run_forever(processes=2, concurrency=4)


if __name__ == "__main__":
    main()
