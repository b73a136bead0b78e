"""Throughput and round trips of one backend, compared with its bare driver in the same run.

    python -m benchmarks.throughput --backend redis [--tasks 20000]

One worker process runs no-op tasks and stores their results. The server is started for the run, or
taken from `QTASKS_TEST_…_URL`. Rows: enqueue by concurrent callers, enqueue in bulk, process, round
trips, and how often a task waits for an answer of the server. Beside them: the rates of the bare
driver, and the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from uuid import uuid4

from benchmarks.served import BACKENDS, served
from benchmarks.tasks import nothing, router, work_off
from benchmarks.waits import Waits
from qtasks.asyncio import QueueTasks
from qtasks_core import Ack, Completion, Task, TaskMessage
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_core.separate import compose

CALLERS = 200
ROUND_TRIPS = 1000
BATCH = 100
"""The engine's batch size for a worker that runs 100 tasks at once, the default."""

Rates = dict[str, float]


def main() -> None:
    """Measure one backend and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", required=True, choices=BACKENDS)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=512, help="of the worker")
    options = parser.parse_args()
    with served(options.backend) as url:
        measure(options.backend, url, options.tasks, options.concurrency)


def measure(backend: str, url: str, tasks: int, concurrency: int) -> None:
    """Run all measurements on the server at `url` and print them."""
    # `QueueTasks.run_forever` sets the same in a worker process.
    sys.setswitchinterval(0.0005)
    ours = asyncio.run(engine(backend, url, tasks, concurrency))
    bare: Rates = {}
    if backend != "memory":  # memory has no driver
        bare = asyncio.run(import_module(f"benchmarks.bare.{backend}").run(url, tasks))
    waits = {} if backend in ("memory", "sqlite") else asyncio.run(count_waits(url))
    cores = os.cpu_count()
    print(f"\n{backend}: {tasks} no-op tasks, worker concurrency {concurrency}, {cores} cores")
    for name, unit in (("enqueue", "/s"), ("bulk", "/s"), ("process", "/s"),
                       ("p50", " ms"), ("p99", " ms")):  # fmt: skip
        if name not in ours:
            continue
        line = f"  {LABELS[name]:44}{ours[name]:12,.2f}{unit}"
        if name in bare:
            line += f"   bare {bare[name]:12,.2f}{unit}   ratio {ours[name] / bare[name]:6.1%}"
        print(line)
    if waits:
        shown = ", ".join(f"{phase} {count:.4f}" for phase, count in waits.items())
        print(f"  {'waits for the server per task':44}{shown}")


LABELS = {
    "enqueue": f"enqueue, {CALLERS} concurrent callers",
    "bulk": "enqueue in bulk",
    "process": "process, one worker process",
    "p50": "round trip, one at a time, median",
    "p99": "round trip, one at a time, 99th percentile",
}


async def engine(backend: str, url: str, tasks: int, concurrency: int) -> Rates:
    """Measure QTasks: enqueue in this process, run the worker in another one."""
    name = f"bench-{uuid4().hex[:8]}"
    app = QueueTasks(name, url)
    app.include_router(router)
    rates: Rates = {}
    async with app:
        await nothing.add_task()  # creates the queue: on some servers that takes a second
        few = tasks // 4
        begin = time.perf_counter()
        await asyncio.gather(*(caller(few // CALLERS) for _ in range(CALLERS)))
        rates["enqueue"] = (few // CALLERS) * CALLERS / (time.perf_counter() - begin)
        begin = time.perf_counter()
        await nothing.map([()] * tasks)
        rates["bulk"] = tasks / (time.perf_counter() - begin)
        queued = 1 + tasks + (few // CALLERS) * CALLERS
        if backend == "memory":
            rates["process"] = await work_off(app, queued, concurrency)  # memory is per process
            async with app.worker(concurrency=concurrency):
                return {**rates, **await round_trips()}
        rates["process"] = await asyncio.to_thread(process, url, name, queued, concurrency)
        with worker(url, name, concurrency, 0) as running:
            await nothing.add_task(timeout=60)
            rates |= await round_trips()
            running.terminate()
    return rates


async def caller(times: int) -> None:
    """Enqueue tasks one after the other."""
    for _ in range(times):
        await nothing.add_task()


async def round_trips() -> Rates:
    """Enqueue a task and wait for its result, one at a time; return p50 and p99 in ms."""
    took = []
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter()
        await nothing.add_task(timeout=30)
        took.append((time.perf_counter() - begin) * 1000)
    return {"p50": statistics.median(took), "p99": sorted(took)[int(ROUND_TRIPS * 0.99) - 1]}


def worker(url: str, name: str, concurrency: int, count: int) -> subprocess.Popen[str]:
    """Start a worker process that exits after `count` tasks (0: never)."""
    arguments = [url, name, str(concurrency), str(count)]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.tasks", *arguments], stdout=subprocess.PIPE, text=True
    )


def process(url: str, name: str, count: int, concurrency: int) -> float:
    """Run all queued tasks in one worker process; return tasks per second."""
    with worker(url, name, concurrency, count) as running:
        output, _ = running.communicate(timeout=600)
    return float(json.loads(output)["rate"])


async def count_waits(url: str) -> Rates:
    """Run tasks through the contracts, phase by phase; return the waits per task in each phase."""
    waits, rounds = Waits(), 20
    waits.install()
    broker, storage = resolve_broker(url), resolve_storage(url)
    name = f"waits-{uuid4().hex[:8]}"
    await broker.start(name)
    await storage.start(name)
    composition = compose(broker, storage)
    counts: Rates = {}

    async def counted(phase: str, call: Callable[[], Awaitable[object]]) -> None:
        before = waits.count
        await call()
        counts[phase] = counts.get(phase, 0.0) + (waits.count - before) / (rounds * BATCH)

    subscription = await broker.subscribe({"default": BATCH})
    for turn in range(rounds + 1):
        if turn == 1:
            counts.clear()  # the first round creates queues and prepares statements
        messages = [TaskMessage(uuid=str(uuid4()), task_name="nothing") for _ in range(BATCH)]
        await counted("publish", lambda: composition.submit(messages))  # noqa: B023
        left = BATCH
        while left:
            deliveries = []

            async def receive() -> None:
                deliveries.extend(await subscription.receive({"default": left}, left))  # noqa: B023

            await counted("receive", receive)
            left -= len(deliveries)
            await counted("admit", lambda: composition.admit(deliveries))  # noqa: B023
            ends = [
                Completion(Ack(d), Task(uuid=d.message.uuid, task_name="nothing", status="success",
                                        execution=str(uuid4())))
                for d in deliveries if isinstance(d.message, TaskMessage)
            ]  # fmt: skip
            await counted("complete", lambda: composition.complete(subscription, ends))  # noqa: B023
    await subscription.close()
    await broker.stop()
    await storage.stop()
    return counts


if __name__ == "__main__":
    # The worker process must find this package wherever the command is run.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    main()
