"""A worker inside the loop of a program: a web application, or a worker process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol

from msgspec import Struct

from qtasks.balancers import Greedy
from qtasks.bridge.crossing import IOThread, io_thread
from qtasks.client.client import Client
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.execution.definition import TaskDefinition, declared_queues
from qtasks.worker.limits import Limits
from qtasks.worker.runner import Runner
from qtasks.worker.worker import Worker
from qtasks_core import Balancer, Guarantees, Plugin
from qtasks_core.errors import ConfigurationError

logger = logging.getLogger("qtasks")


class App(Protocol):
    """The app, as far as a worker needs it."""

    name: str
    max_payload: int
    plugins: tuple[Plugin, ...]
    definitions: dict[str, TaskDefinition]

    async def ready(self) -> tuple[IOThread, Client]:
        """Return the I/O thread and the client on it. Raises `Closed` if the app is not started."""

    async def start_async(self, timeout: float) -> None:
        """Connect the broker and the storage. Nested starts are counted. Raises `Unavailable`."""

    async def stop_async(self) -> None:
        """Disconnect, once it was called as often as `start_async`."""

    def guarantees(self) -> tuple[Guarantees, Guarantees]:
        """Return the guarantees of the broker and the storage."""


class WorkerOptions(Struct, frozen=True, kw_only=True):
    """The options of a worker. `App.worker` and `App.run_forever` explain them."""

    queues: tuple[str, ...] | None = None
    concurrency: int = 100
    grace: float | None = 30.0
    balancer: Balancer | None = None
    max_tasks: int | None = None
    max_memory: int | None = None
    health: tuple[str, int] | None = None


class HostedWorker:
    """One worker with its runner: the runner lives on this loop, the worker on the I/O thread."""

    def __init__(self, worker: Worker, runner: Runner, thread: IOThread) -> None:
        self.worker = worker
        self._runner = runner
        self._thread = thread
        self._run = asyncio.create_task(thread.run(worker.run))
        self._stop: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, app: App, options: WorkerOptions) -> HostedWorker:
        """Start a worker on this loop."""
        thread, client = await app.ready()
        runner = Runner(app.definitions, app.max_payload, app.plugins)
        known = app.definitions
        declared = declared_queues(known.values())
        queues = list(dict.fromkeys(options.queues or sorted(declared)))

        async def build() -> Worker:
            return Worker(
                client,
                runner,
                known.keys(),
                queues,
                options.concurrency,
                options.balancer or Greedy(),
                Limits(options.max_tasks, options.max_memory),
            )

        worker = await thread.run(build)
        logger.info(
            "worker %s of %r: queues %s, %d tasks at once, knows %s",
            worker.id,
            app.name,
            ", ".join(queues),
            options.concurrency,
            ", ".join(sorted(known)) or "no task",
        )
        if not known:
            logger.warning(
                "the app %r has no tasks, so each that comes is put back, and dead in the end: "
                "include_router(…) brings a router's tasks into the app",
                app.name,
            )
        return cls(worker, runner, thread)

    def stop(self, grace: float | None) -> set[asyncio.Task[None]]:
        """Start to stop the worker in order. When the returned tasks are done, it has ended."""
        if self._stop is None:
            self._stop = asyncio.create_task(self._thread.run(self.worker.stop, grace))
        return {self._run, self._stop}

    def result(self) -> Exception | None:
        """Free its resources after it has ended. Return the error with which it failed, or None."""
        self._runner.stop()
        if self._stop is not None and (error := self._stop.exception()) is not None:
            raise error
        error = self._run.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        return error


class RunningWorker:
    """A worker while its block runs. In a host's loop, a failed worker is replaced."""

    def __init__(self, hosted: HostedWorker, thread: IOThread) -> None:
        self.hosted = hosted
        """The current worker."""
        self.failed = asyncio.create_task(thread.run(hosted.worker.failed))
        """Done once a broker or a storage has raised an error that a retry cannot fix.

        The end of the block raises that error, unless the worker was replaced before.
        """
        self._thread = thread

    @property
    def id(self) -> str:
        return self.engine.id

    @property
    def engine(self) -> Worker:
        """The current worker's object on the I/O thread."""
        return self.hosted.worker

    @property
    def ready(self) -> bool:
        """Whether it receives, and its servers answer and guarantee what tasks require."""
        return self.engine.ready

    def release(self) -> None:
        """Cancel running functions and release their messages at once, also while it stops."""
        self._thread.post(self.engine.release)


Replace = Callable[[App, WorkerOptions, RunningWorker], Coroutine[Any, Any, None]]
"""Replaces each worker that fails, until it is cancelled."""


@asynccontextmanager
async def working(
    app: App,
    options: WorkerOptions,
    start_timeout: float = START_TIMEOUT,
    replace: Replace | None = None,
) -> AsyncIterator[RunningWorker]:
    """Run a worker of `app` on this loop while the block runs. Raises `ConfigurationError`.

    Without `replace`, a failed worker is not replaced.
    """
    if options.concurrency < 1:
        raise ConfigurationError(f"concurrency={options.concurrency} is below 1")
    await app.start_async(start_timeout)
    try:
        for guarantees in app.guarantees():
            logger.info("%s", _describe(guarantees))
        running = RunningWorker(await HostedWorker.start(app, options), io_thread())
        replacing = None if replace is None else asyncio.create_task(replace(app, options, running))
        try:
            yield running
        finally:
            running.failed.cancel()
            try:
                if replacing is not None:
                    replacing.cancel()
                    await _until_done({replacing}, running)
            finally:
                await _until_done(running.hosted.stop(options.grace), running)
                if (error := running.hosted.result()) is not None:
                    raise error
    finally:
        await app.stop_async()


async def _until_done(tasks: set[asyncio.Task[None]], running: RunningWorker) -> None:
    """Wait for tasks that stop a worker. A cancellation meanwhile skips the grace period."""
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
            running.release()
    if cancelled is not None:
        raise cancelled


def _describe(part: Guarantees) -> str:
    """Return a log line: the broker or storage, its server, and the failures it survives."""
    server = f" on {part.server}" if part.server else ""
    return f"{part.part}{server}: survives {part.survives} ({part.durability})"
