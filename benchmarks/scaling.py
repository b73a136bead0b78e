"""How throughput grows with the number of worker processes, for tasks that sleep 10 ms.

    python -m benchmarks.scaling --backend redis [--tasks 2000]

1, 2 and 4 supervised processes run 10 tasks at once each. So one process runs at most 1,000 tasks a
second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

from benchmarks.served import BACKENDS, served
from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks
from qtasks.control import workers

SECONDS = 0.01
CONCURRENCY = 10
PROCESSES = (1, 2, 4)

router = AsyncRouter()


@router.task(name="sleep")
async def sleep() -> None:
    """Wait, as for a call of another service."""
    await asyncio.sleep(SECONDS)


async def rate(url: str, tasks: int, processes: int) -> float:
    """Return tasks per second while all processes are busy."""
    name = f"scaling-{uuid4().hex[:8]}"
    app = QueueTasks(name, url)
    app.include_router(router)
    arguments = json.dumps({"url": url, "name": name, "processes": processes})
    async with app:
        await sleep.using(app).add_task()
        command = [sys.executable, "-m", "benchmarks.scaling", "--worker", arguments]
        with subprocess.Popen(command) as supervisor:  # noqa: ASYNC220  # measured, not awaited
            try:
                await all_up(app, processes)
                handles = await sleep.using(app).map([()] * tasks * processes)
                finished = await asyncio.gather(*(handle.wait_result() for handle in handles))
            finally:
                supervisor.terminate()
    times = sorted(task.finished_at or 0.0 for task in finished)
    # Without the first and the last tenth, when not all processes have enough tasks.
    low, high = len(times) // 10, len(times) * 9 // 10
    return (high - low) / (times[high] - times[low])


async def all_up(app: QueueTasks, processes: int) -> None:
    """Wait until all workers are in the registry; without a registry, wait for 4 seconds."""
    if "values" in app.storage.guarantees.unsupported:
        await asyncio.sleep(4.0)
        return
    deadline = time.monotonic() + 30
    while len(await app.control(workers)) < processes and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


def work(arguments: str) -> None:
    """Run the worker processes of a measurement."""
    options = json.loads(arguments)
    app = QueueTasks(options["name"], options["url"])
    app.include_router(router)
    app.run_forever(concurrency=CONCURRENCY, processes=options["processes"])


def main() -> None:
    """Measure one backend and print a row for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", default="sqlite", choices=BACKENDS[1:])
    parser.add_argument("--tasks", type=int, default=3000, help="for each process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    with served(options.backend) as url:
        print_rows(url, options.backend, options.tasks)


def print_rows(url: str, backend: str, tasks: int) -> None:
    """Measure with 1, 2 and 4 processes."""
    print(f"\n{backend}: tasks that sleep 10 ms, {CONCURRENCY} at once a process", flush=True)
    alone = 0.0
    for processes in PROCESSES:
        found = asyncio.run(rate(url, tasks, processes))
        alone = alone or found
        print(f"  {processes} processes {found:10,.0f}/s   {found / alone:5.2f} times", flush=True)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    main()
