"""The cost of the I/O thread, compared with the same engine on one event loop.

    python -m benchmarks.io_thread --backend memory|sqlite|redis [--tasks 20000] [--rounds 3]

The engine runs in two arrangements: with client and worker on the I/O thread, as in an app, and
with everything on the caller's loop, so that nothing crosses between threads. Rows: enqueue by 200
concurrent callers, process, and a round trip, with and without another thread that computes. Each
is measured with Python's default switch interval of 5 ms and with 0.5 ms, which `run_forever` sets.
Rates are tasks per second: the best of all rounds, then the range. `CPU` is the time that all
threads of the process use per task; a busy machine changes it less than the rates.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from uuid import uuid4

from benchmarks.served import BACKENDS, served
from benchmarks.tasks import nothing, router
from qtasks.asyncio import QueueTasks
from qtasks.balancers import Greedy
from qtasks.bridge.crossing import Reply, io_thread
from qtasks.client.client import Client, Waiter
from qtasks.declare.tasks import message_of
from qtasks.worker.limits import Limits
from qtasks.worker.runner import Runner
from qtasks.worker.worker import Worker
from qtasks_core import Task, TaskMessage

CALLERS = 200
CONCURRENCY = 512
ROUND_TRIPS = 500
CROSSINGS = 5000
TRIPS = ("round trip", "computing")

Submit = Callable[[TaskMessage, bool], Awaitable[Task | None]]


class Row:
    """The rates of several rounds, and the CPU time per task of the best one."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.cpu = 0.0

    def add(self, count: int, seconds: float, cpu: float) -> None:
        """Add a round of `count` tasks, with its wall time and CPU time in seconds."""
        rate = count / seconds
        if not self.rates or rate > max(self.rates):
            self.cpu = cpu / count * 1e6
        self.rates.append(rate)

    def __str__(self) -> str:
        best, worst = max(self.rates), min(self.rates)
        return f"{best:10,.0f}/s ({worst:,.0f} to {best:,.0f})  CPU {self.cpu:6.1f} µs"


class Stopwatch:
    """Measures the wall time and the CPU time of a block, in seconds."""

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._begin[0]
        self.cpu = time.process_time() - self._begin[1]


@asynccontextmanager
async def on_the_io_thread(app: QueueTasks) -> AsyncIterator[tuple[Submit, Callable[..., object]]]:
    """Submit to a client on the I/O thread, as an app does."""

    async def submit(message: TaskMessage, wait: bool) -> Task | None:
        return await app.submit(message, 60.0 if wait else None)

    async with app:
        yield submit, lambda: app.worker(concurrency=CONCURRENCY)


@asynccontextmanager
async def on_one_loop(app: QueueTasks) -> AsyncIterator[tuple[Submit, Callable[..., object]]]:
    """Run the client and the worker on the caller's loop. Each result still wakes the loop once."""
    client = Client(app.name, app.broker, app.storage)
    await client.start(asyncio.get_running_loop().time() + 10)

    async def submit(message: TaskMessage, wait: bool) -> Task | None:
        deadline = time.monotonic() + 60
        if wait:
            waiter = Waiter(io_thread(), client, message.uuid, 60.0, deadline, message)
            client.submit_and_wait(message, waiter)
            return await waiter
        reply: Reply[Task] = Reply()
        client.submit(message, deadline, reply)
        return await reply

    @asynccontextmanager
    async def worker() -> AsyncIterator[None]:
        runner = Runner(app.definitions, app.max_payload)
        known = app.definitions.keys()
        worker = Worker(
            client, runner, known, ["default"], CONCURRENCY, Greedy(), Limits(None, None)
        )
        running = asyncio.create_task(worker.run())
        yield
        await worker.stop(5.0)
        await running
        runner.stop()

    try:
        yield submit, worker
    finally:
        await client.stop()


ARRANGEMENTS = {"one loop": on_one_loop, "I/O thread": on_the_io_thread}


async def measure(
    url: str, arrangement: str, tasks: int, rows: dict[str, Row]
) -> tuple[float, float]:
    """Add a round to the rows; return the mean round trip in seconds, without and with another
    thread that computes.
    """
    app = QueueTasks(f"io-{uuid4().hex[:8]}", url)
    app.include_router(router)
    definition = app.definitions[nothing.name]

    async with ARRANGEMENTS[arrangement](app) as (submit, worker):
        await submit(message_of(app, definition, (), {}), False)

        async def caller(times: int) -> None:
            for _ in range(times):
                await submit(message_of(app, definition, (), {}), False)

        with Stopwatch() as watch:
            await asyncio.gather(*(caller(tasks // CALLERS) for _ in range(CALLERS)))
        rows["enqueue"].add(tasks, watch.wall, watch.cpu)
        with Stopwatch() as watch:
            async with worker():  # type: ignore[attr-defined]
                await submit(message_of(app, definition, (), {}), True)
        rows["process"].add(tasks, watch.wall, watch.cpu)
        async with worker():  # type: ignore[attr-defined]

            async def trip() -> None:
                await submit(message_of(app, definition, (), {}), True)

            quiet = await mean(trip, ROUND_TRIPS)
            with computing():
                return quiet, await mean(trip, ROUND_TRIPS)


async def mean(call: Callable[[], Awaitable[object]], times: int) -> float:
    """Return the mean seconds of a call. A median would hide the rare waits for the GIL."""
    begin = time.perf_counter()
    for _ in range(times):
        await call()
    return (time.perf_counter() - begin) / times


@contextmanager
def computing() -> Iterator[None]:
    """Run a thread that computes in Python during the block, as a task's function may."""
    stopped = threading.Event()

    def compute() -> None:
        while not stopped.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    yield
    stopped.set()
    thread.join()


async def crossing() -> float:
    """Return the mean seconds of an empty call to the I/O thread and back."""

    thread = io_thread()

    async def cross() -> None:
        reply: Reply[None] = Reply()
        thread.post(reply.set, None)
        await reply

    return await mean(cross, CROSSINGS)


async def crossings_at_once() -> float:
    """Return the mean seconds of such a call when 200 callers make it at once."""

    thread = io_thread()

    async def cross() -> None:
        reply: Reply[None] = Reply()
        thread.post(reply.set, None)
        await reply

    begin = time.perf_counter()
    for _ in range(CROSSINGS // CALLERS):
        await asyncio.gather(*(cross() for _ in range(CALLERS)))
    return (time.perf_counter() - begin) / CROSSINGS


def print_rows(backend: str, url: str, tasks: int, rounds: int) -> None:
    """Measure all arrangements in turns, several rounds, and print them."""
    print(f"\n{backend}: {tasks} no-op tasks, client and worker in one process", flush=True)
    cases = [(name, interval) for interval in (0.005, 0.0005) for name in ARRANGEMENTS]
    found = {case: {"enqueue": Row(), "process": Row()} for case in cases}
    trips: dict[tuple[str, float], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for name, interval in cases:
            sys.setswitchinterval(interval)
            trip = asyncio.run(measure(url, name, tasks, found[name, interval]))
            trips[name, interval].append(trip)
    for (name, interval), rows in found.items():
        print(f"  {name}, switch interval {interval * 1000:g} ms")
        for label, row in rows.items():
            print(f"    {label:12}{row}")
        for label, took in zip(TRIPS, zip(*trips[name, interval], strict=True), strict=True):
            best, worst = min(took) * 1000, max(took) * 1000
            print(f"    {label:12}{best:10.3f} ms ({best:.3f} to {worst:.3f})")
    for interval in (0.005, 0.0005):
        sys.setswitchinterval(interval)
        alone, many = asyncio.run(crossing()), asyncio.run(crossings_at_once())
        print(
            f"  a crossing and its answer, switch interval {interval * 1000:g} ms: "
            f"{alone * 1e6:.0f} µs alone, {many * 1e6:.1f} µs of 200 at once"
        )


def main() -> None:
    """Measure one backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", default="memory", choices=BACKENDS)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with served(options.backend) as url:
        print_rows(options.backend, url, options.tasks, options.rounds)


if __name__ == "__main__":
    main()
