"""The CPU time of an idle worker.

    python -m benchmarks.idle --backend sqlite [--seconds 60]

One worker process runs 1,000 tasks to warm up. Then its CPU time is read before and after some
seconds without work.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.served import BACKENDS, served
from benchmarks.tasks import nothing, router
from qtasks.asyncio import QueueTasks

NAME = "idle"


def cpu_time(pid: int) -> float:
    """Return the CPU seconds that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, backend: str, seconds: float, pid: int) -> None:
    """Measure the worker process `pid`, and print the row."""
    app = QueueTasks(NAME, url)
    app.include_router(router)
    async with app:
        tasks = await nothing.using(app).map([()] * 1000)
        await asyncio.gather(*(task.wait_result() for task in tasks))
    await asyncio.sleep(2.0)
    before = cpu_time(pid)
    await asyncio.sleep(seconds)
    used = cpu_time(pid) - before
    print(f"{backend}: an idle worker took {used:.2f} s in {seconds:g} s, {used / seconds:.3%}")


def main() -> None:
    """Measure one backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", default="sqlite", choices=BACKENDS[1:])
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with served(options.backend) as url:
        measure_worker(url, options.backend, options.seconds)


def measure_worker(url: str, backend: str, seconds: float) -> None:
    """Start a worker process and measure it."""
    command = [sys.executable, "-m", "benchmarks.tasks", url, NAME, "100", "0"]
    with subprocess.Popen(command) as worker:
        try:
            asyncio.run(measure(url, backend, seconds, worker.pid))
        finally:
            worker.terminate()


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    main()
