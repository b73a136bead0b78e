"""Running a worker: inside a host's loop, or as a process of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from qtasks.balancers import Greedy
from qtasks.engine.runner import Runner
from qtasks.engine.worker import Worker
from qtasks_core import Balancer, Guarantees

if TYPE_CHECKING:
    from qtasks.app import App

logger = logging.getLogger("qtasks")


class WorkerOptions(Struct, frozen=True, kw_only=True):
    """How a worker works; `App.worker` says what each means."""

    queues: Iterable[str] | None = None
    concurrency: int = 100
    grace: float | None = 30.0
    balancer: Balancer | None = None


class RunningWorker:
    """A worker while its block runs."""

    def __init__(self, id: str, runner: Runner, ended: asyncio.Task[None]) -> None:
        self.id = id
        self.ended = ended
        """Done early only if the worker failed."""
        self._runner = runner

    def give_back(self) -> None:
        """Cancel what runs and give it back to the queue at once."""
        self._runner.give_back()


@asynccontextmanager
async def working(
    app: App, options: WorkerOptions, start_timeout: float
) -> AsyncIterator[RunningWorker]:
    """Run a worker of `app` on this loop while the block runs."""
    await app.start(start_timeout)
    try:
        runner = Runner(app.definitions, options.concurrency)
        try:
            async with _receiving(app, runner, options) as running:
                yield running
        finally:
            runner.stop()
    finally:
        await app.stop()


@asynccontextmanager
async def _receiving(
    app: App, runner: Runner, options: WorkerOptions
) -> AsyncIterator[RunningWorker]:
    thread, client = await app.ready()
    known = app.definitions
    names = sorted(options.queues or {"default", *(d.options.queue for d in known.values())})

    async def build() -> Worker:
        balancer = options.balancer or Greedy()
        return Worker(client, runner, known.keys(), names, options.concurrency, balancer)

    worker = await thread.run(build)
    for part in app.guarantees():
        logger.info("%s", describe(part))
    logger.info(
        "worker %s of %r: queues %s, %d tasks at once, knows %s",
        worker.id,
        app.name,
        ", ".join(names),
        options.concurrency,
        ", ".join(sorted(known)) or "no task",
    )
    ended = asyncio.create_task(thread.run(worker.run))
    try:
        yield RunningWorker(worker.id, runner, ended)
    finally:
        await thread.run(worker.stop, options.grace)
        await ended


def serve(app: App, options: WorkerOptions) -> None:
    """Be a worker process until SIGTERM or SIGINT."""
    if not logging.getLogger().handlers:
        # Drivers are only heard when something is wrong.
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logger.setLevel(logging.INFO)
    # The two loops of this process hand over work many times a millisecond; with the
    # default of 5 ms each would wait for the other.
    sys.setswitchinterval(0.0005)
    asyncio.run(_until_signalled(app, options))


async def _until_signalled(app: App, options: WorkerOptions) -> None:
    signalled = asyncio.Event()
    on_signal = signalled.set

    def signal_arrived() -> None:
        on_signal()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signal_arrived)
    async with working(app, options, float("inf")) as worker:
        stopping = asyncio.create_task(signalled.wait())
        await asyncio.wait({stopping, worker.ended}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        on_signal = worker.give_back
        logger.info("worker %s stops: running tasks have %s s", worker.id, options.grace)


def describe(part: Guarantees) -> str:
    """Return a line for the log: the part, its server, what it survives and why."""
    server = f" on {part.server}" if part.server else ""
    return f"{part.part}{server}: survives {part.survives} ({part.durability})"
