"""Run by test_hostile.py in a process of its own: tasks that misbehave, then one that does not."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from qtasks.asyncio import QueueTasks
from qtasks.plugins import Backoff, Plugin, Proceed, Retries, Run

app = QueueTasks("hostile", "memory://?lease=1")
told = os.fdopen(os.dup(2), "w", buffering=1)
"""Where this says how it went, whatever becomes of stderr."""


@app.task()
def fork_thread() -> str:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return "parent" if child else "child"


@app.task()
def statuses() -> list[int]:
    """Leave forked processes in the ways in which Python is left."""
    found = []
    for way_out in (SystemExit(3), SystemExit(), SystemExit("why"), ValueError("in a child")):
        child = os.fork()
        if not child:
            raise way_out
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return found


class Tells(Plugin):
    """Says that a run is over: in a worker, never in a child that a function forked."""

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        try:
            return await proceed(run)
        finally:
            told.write("over\n")


@app.task(plugins=[Tells()])
async def fork() -> str:
    child = os.fork()
    if child:
        os.waitpid(child, 0)  # noqa: ASYNC222
    return "parent" if child else "child"


@app.task()
def close_stdout() -> None:
    print("about to close", flush=True)
    sys.stdout.close()
    os.close(1)


@app.task()
def use_closed() -> None:
    print("nobody hears this")


@app.task()
def close_stderr() -> None:
    sys.stderr.close()


@app.task()
async def fail() -> None:
    raise ValueError("nobody hears of this")


@app.task(plugins=[Retries(Backoff(1, first=0))])
async def again() -> None:
    raise ValueError("twice")


@app.task()
async def fine() -> str:
    return "fine"


async def main() -> None:
    async with app.worker():
        for task in (
            fork_thread, statuses, fork, close_stdout, use_closed, close_stderr, fail, again, fine,
        ):  # fmt: skip
            ended = await task.add_task(timeout=120)
            said = ended.error or ended.returning
            told.write(f"{task.__name__} {ended.status} {said}\n")


if __name__ == "__main__":
    asyncio.run(main())
