"""Whether tasks stay as fast while many come and go: PostgreSQL, steadily enqueued and worked off.

    python -m benchmarks.churn [--tasks 1000000] [--retention 20]

One process enqueues no-op tasks and runs them; a few thousand are waiting at any time. Records
expire meanwhile, after `--retention` seconds, and are deleted. For each tenth of the tasks it
prints the rate, the CPU time of this process and of the server per task, and what the tables hold.
Other work on the machine makes all CPU times longer. So a short loop is timed again and again, and
the last line compares the CPU times as multiples of that of the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import asyncpg

from benchmarks.served import served
from benchmarks.tasks import nothing, router
from qtasks.asyncio import QueueTasks
from qtasks.worker import retention
from qtasks_core import Completion, Outcome, Subscription
from qtasks_core.records import FINAL

CHUNK = 500
AHEAD = 5000
"""Tasks that are enqueued ahead of the worker."""
CONCURRENCY = 512
TABLES = """
    SELECT relname, n_live_tup AS live, n_dead_tup AS dead,
           pg_total_relation_size(relid) / 1048576.0 AS size
    FROM pg_stat_user_tables WHERE relname IN ('messages', 'records') ORDER BY relname
"""


class Part(NamedTuple):
    """A tenth of the tasks: their rate, and CPU microseconds per task and per loop."""

    rate: float
    process: float
    server: float
    loop: float

    @property
    def cost(self) -> float:
        """The CPU time of a task, in loops."""
        return (self.process + self.server) / self.loop


def main() -> None:
    """Start a server, work the tasks off, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--retention", type=float, default=20.0, help="seconds")
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)
    # Workers delete expired records every few minutes, which is long here.
    retention.PERIOD = options.retention
    with served("postgres") as url:
        # A record is kept for two leases at least.
        more = f"?lease={options.retention / 2}&retention={options.retention}"
        asyncio.run(churn(url, url + more, options.tasks))


async def churn(bare: str, url: str, tasks: int) -> None:
    """Work the tasks off, and print a row for each tenth."""
    app = QueueTasks("churn", url)
    app.include_router(router)
    connection = await asyncpg.connect(bare)
    print(f"\npostgres: {tasks:,} no-op tasks, enqueued and run at the same time")
    print(f"{'tasks':>12}{'tasks/s':>10}{'process µs':>12}{'server µs':>11}{'loop µs':>9}")
    parts: list[Part] = []
    async with app:
        finished = Finished(app)
        async with app.worker(concurrency=CONCURRENCY):
            begin, took = time.perf_counter(), cpu(connection)
            enqueued = 0
            for tenth in range(1, 11):
                loops: list[float] = []
                while enqueued < tasks * tenth // 10:
                    await nothing.map([()] * CHUNK)
                    enqueued += CHUNK
                    await finished.at_least(enqueued - AHEAD)
                    loops.append(timed_loop() * 1e6)
                now, taken = time.perf_counter(), cpu(connection)
                count = tasks // 10
                process, server = ((b - a) / count * 1e6 for a, b in zip(took, taken, strict=True))
                parts.append(Part(count / (now - begin), process, server, sum(loops) / len(loops)))
                begin, took = now, taken
                await show(connection, enqueued, parts[-1])
            await finished.at_least(enqueued)
    await connection.close()
    first, last = parts[0], parts[-1]
    print(
        f"the last tenth: {last.rate / first.rate:.0%} of the rate of the first, "
        f"{first.cost / last.cost:.0%} of its speed by CPU time"
    )


class Finished:
    """Counts the tasks that the worker has completed."""

    def __init__(self, app: QueueTasks) -> None:
        self._count = 0
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        composition = app.client.composition
        complete = composition.complete

        async def counted(
            subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            outcomes = await complete(subscription, completions)
            done = sum(1 for c in completions if c.task is not None and c.task.status in FINAL)
            self._loop.call_soon_threadsafe(self._add, done)
            return outcomes

        composition.complete = counted  # type: ignore[method-assign]

    def _add(self, count: int) -> None:
        self._count += count
        self._changed.set()

    async def at_least(self, count: int) -> None:
        """Wait until this many tasks are completed."""
        while self._count < count:
            self._changed.clear()
            await self._changed.wait()


def cpu(connection: asyncpg.Connection) -> tuple[float, float]:
    """Return the CPU seconds of this process and of the server, which runs on this machine."""
    postmaster = _stat(connection.get_server_pid())[1]
    ticks = sum(map(int, _stat(int(postmaster))[11:15]))
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                found = _stat(int(process.name))
            except OSError:
                continue  # it has ended
            if found[1] == postmaster:
                ticks += int(found[11]) + int(found[12])
    return time.process_time(), ticks / os.sysconf("SC_CLK_TCK")


def timed_loop() -> float:
    """Return the CPU seconds that this thread needs for a fixed loop."""
    begin = time.thread_time()
    for _ in range(5000):
        pass
    return time.thread_time() - begin


def _stat(pid: int) -> list[str]:
    """Return the fields of a process after its name: the state, the parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


async def show(connection: asyncpg.Connection, enqueued: int, part: Part) -> None:
    """Print a row, and what the tables hold."""
    rows = await connection.fetch(TABLES)
    tables = "".join(
        f"   {row['relname']} {row['live']:,} live, {row['dead']:,} dead, {row['size']:.0f} MiB"
        for row in rows
    )
    figures = f"{part.rate:>10,.0f}{part.process:>12.1f}{part.server:>11.1f}{part.loop:>9.0f}"
    print(f"{enqueued:>12,}{figures}{tables}", flush=True)


if __name__ == "__main__":
    main()
