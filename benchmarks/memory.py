"""The memory of a worker over many tasks, and whether the oldest results can still be read.

    python -m benchmarks.memory [--tasks 200000]

One worker process on SQLite runs a tenth of the tasks, then the rest. Its resident memory is read
after each. Then the 1,000 oldest records are read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.served import served
from benchmarks.tasks import nothing, router
from qtasks.asyncio import QueueTasks

NAME = "memory"
CHUNK = 10_000


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def run_tasks(app: QueueTasks, count: int) -> list[str]:
    """Enqueue `count` tasks and wait until all have finished; return the first 1,000 uuids."""
    first: list[str] = []
    for _ in range(count // CHUNK):
        tasks = await nothing.using(app).map([()] * CHUNK)
        first += [task.uuid for task in tasks[: 1000 - len(first)]]
        await asyncio.gather(*(task.wait_result() for task in tasks))
    return first


async def measure(url: str, tasks: int, pid: int) -> None:
    """Measure the worker process `pid`, and print the rows."""
    app = QueueTasks(NAME, url)
    app.include_router(router)
    async with app:
        oldest = await run_tasks(app, tasks // 10)
        before = resident(pid)
        await run_tasks(app, tasks - tasks // 10)
        after = resident(pid)
        found = await read(app, oldest)
    mebi = 2**20
    print(f"  after {tasks // 10:7,} tasks {before / mebi:8.1f} MiB")
    print(f"  after {tasks:7,} tasks {after / mebi:8.1f} MiB   {(after - before) / mebi:+.1f} MiB")
    print(f"  of the oldest {len(oldest):,} tasks {found:,} can be read, with their results")


async def read(app: QueueTasks, uuids: list[str]) -> int:
    """Return how many of these tasks have a record with status `success`."""
    handles = await asyncio.gather(*(app.get_task(uuid) for uuid in uuids))
    return sum(handle is not None and handle.status == "success" for handle in handles)


def main() -> None:
    """Start a worker and measure it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, default=200_000)
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)
    with served("sqlite") as url:
        command = [sys.executable, "-m", "benchmarks.tasks", url, NAME, "100", "0"]
        with subprocess.Popen(command) as worker:
            try:
                print(f"\nsqlite: the memory of a worker, {options.tasks:,} no-op tasks")
                asyncio.run(measure(url, options.tasks, worker.pid))
            finally:
                worker.terminate()


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    main()
