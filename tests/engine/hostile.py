"""Run by test_hostile.py in a process of its own: tasks that misbehave, then one that does not."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from qtasks.asyncio import QueueTasks
from qtasks.plugins import Plugin, Proceed, Run

app = QueueTasks("hostile", "memory://?lease=1")


@app.task()
def fork_thread() -> str:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return "parent" if child else "child"


class Tells(Plugin):
    """Says that a run is over: in a worker, never in a child that a function forked."""

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        try:
            return await proceed(run)
        finally:
            sys.stderr.write("over\n")


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
async def fine() -> str:
    return "fine"


async def main() -> None:
    async with app.worker():
        for task in (fork_thread, fork, close_stdout, use_closed, fine):
            ended = await task.add_task(timeout=10)
            said = ended.error or ended.returning
            sys.stderr.write(f"{task.__name__} {ended.status} {said}\n")


if __name__ == "__main__":
    asyncio.run(main())
