"""Running a worker: inside a host's loop, or as a process of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from qtasks.balancers import Greedy
from qtasks.bridge.io_thread import IOThread, io_thread
from qtasks.bridge.stop_signals import StopSignals
from qtasks.client.backoff import Backoff
from qtasks.client.client import Client
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.execution.child import is_child
from qtasks.execution.definition import TaskDefinition
from qtasks.execution.threads import busy_threads
from qtasks.worker import supervised
from qtasks.worker.health import answer_probes
from qtasks.worker.leaving import Leaving, leave
from qtasks.worker.limits import Limits
from qtasks.worker.runner import Runner
from qtasks.worker.supervisor import Supervisor
from qtasks.worker.worker import Worker
from qtasks_core import Balancer, Guarantees, Plugin
from qtasks_core.errors import Closed, ConfigurationError, NotSupported

logger = logging.getLogger("qtasks")


_LEAST_PAUSE = 1.0
"""Seconds, at least, until a worker beside a host is replaced."""
_AGAIN = 60.0
"""Seconds after which a failure is told again, and one that follows begins anew."""


class App(Protocol):
    """What a worker needs of its app."""

    name: str
    max_payload: int
    plugins: tuple[Plugin, ...]
    definitions: dict[str, TaskDefinition]

    async def ready(self) -> tuple[IOThread, Client]:
        """Return the I/O thread and the client on it. Raises `Closed` when nothing is started."""

    async def start_async(self, timeout: float) -> None:
        """Connect broker and storage; nested starts count. Raises `Unavailable`."""

    async def stop_async(self) -> None:
        """Disconnect with the last of nested stops."""

    def guarantees(self) -> tuple[Guarantees, Guarantees]:
        """Return what the broker and the storage promise."""


class WorkerOptions(Struct, frozen=True, kw_only=True):
    """How a worker works; `App.worker` says what each means."""

    queues: tuple[str, ...] | None = None
    concurrency: int = 100
    grace: float | None = 30.0
    balancer: Balancer | None = None
    max_tasks: int | None = None
    max_memory: int | None = None
    health: tuple[str, int] | None = None


class RunningWorker:
    """A worker while its block runs. Beside a host, another follows it when it has failed."""

    def __init__(self, one: _One, thread: IOThread) -> None:
        self.one = one
        self.failed = asyncio.create_task(thread.run(one.worker.failed))
        """Done when a part has failed in a way that no repeating mends, for the first time.

        The end of the block raises that error, unless another worker has followed by then.
        """
        self._thread = thread

    @property
    def id(self) -> str:
        return self.engine.id

    @property
    def engine(self) -> Worker:
        """What lives on the I/O thread."""
        return self.one.worker

    @property
    def ready(self) -> bool:
        """Whether it receives, and its servers answer."""
        return self.engine.ready

    def give_back(self) -> None:
        """Cancel what runs and give it back to the queue at once, also once it stops."""
        self._thread.post(self.engine.give_back)


class _One:
    """One worker with its runner, from its begin to its end."""

    def __init__(self, worker: Worker, runner: Runner, thread: IOThread) -> None:
        self.worker = worker
        self._runner = runner
        self._thread = thread
        self._ended = asyncio.create_task(thread.run(worker.run))
        self._stopping: asyncio.Task[None] | None = None

    def stop(self, grace: float | None) -> set[asyncio.Task[None]]:
        """Begin its orderly end; return what is done then."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._thread.run(self.worker.stop, grace))
        return {self._ended, self._stopping}

    def close(self) -> Exception | None:
        """Free what it had, after its end; return how it failed."""
        self._runner.stop()
        if self._stopping is not None and (error := self._stopping.exception()) is not None:
            raise error
        error = self._ended.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        return error


async def _begin(app: App, options: WorkerOptions) -> _One:
    thread, client = await app.ready()
    runner = Runner(app.definitions, app.max_payload, app.plugins)
    known = app.definitions
    names = sorted(options.queues or {"default", *(d.options.queue for d in known.values())})

    async def build() -> Worker:
        balancer = options.balancer or Greedy()
        limits = Limits(options.max_tasks, options.max_memory)
        return Worker(client, runner, known.keys(), names, options.concurrency, balancer, limits)

    worker = await thread.run(build)
    logger.info(
        "worker %s of %r: queues %s, %d tasks at once, knows %s",
        worker.id,
        app.name,
        ", ".join(names),
        options.concurrency,
        ", ".join(sorted(known)) or "no task",
    )
    if not known:
        logger.warning(
            "the app %r has no tasks, so each that comes is put back, and dead in the end: "
            "include_router(…) brings a router's tasks into the app",
            app.name,
        )
    return _One(worker, runner, thread)


@asynccontextmanager
async def working(
    app: App,
    options: WorkerOptions,
    start_timeout: float = START_TIMEOUT,
    *,
    is_replaced: bool = False,
) -> AsyncIterator[RunningWorker]:
    """Run a worker of `app` on this loop while the block runs. Raises `ConfigurationError`.

    With `is_replaced` another follows one that has failed.
    """
    if options.concurrency < 1:
        raise ConfigurationError(f"concurrency={options.concurrency} is below 1")
    await app.start_async(start_timeout)
    try:
        for part in app.guarantees():
            logger.info("%s", describe(part))
        running = RunningWorker(await _begin(app, options), io_thread())
        replacing = asyncio.create_task(_replace(app, options, running)) if is_replaced else None
        try:
            yield running
        finally:
            running.failed.cancel()
            if replacing is not None:
                replacing.cancel()
                await _all_done({replacing}, running)
            await _all_done(running.one.stop(options.grace), running)
            if (error := running.one.close()) is not None:
                raise error
    finally:
        await app.stop_async()


async def _replace(app: App, options: WorkerOptions, running: RunningWorker) -> None:
    """Have another worker follow one that has failed: its host goes on, and nobody restarts that.

    An error of the configuration would only come again; it is told again each minute.
    """
    thread, backoff = io_thread(), Backoff(first=1.0, most=30.0)
    while True:
        begun = time.monotonic()
        await thread.run(running.engine.failed)
        error = running.engine.failure
        if error is None:
            return
        while isinstance(error, ConfigurationError | NotSupported | Closed):
            await asyncio.sleep(_AGAIN)
            logger.error("nothing is received, since worker %s failed: %s", running.id, error)
        if time.monotonic() - begun > _AGAIN:
            backoff.reset()
        pause = _LEAST_PAUSE + backoff.next()
        logger.warning("another worker follows %s in %.1f s", running.id, pause)
        await asyncio.sleep(pause)
        await asyncio.wait(running.one.stop(options.grace))
        running.one.close()
        try:
            running.one = await _begin(app, options)
        except Exception as error:  # told, and the next attempt follows in its time
            logger.error("no worker could follow: %s", error, exc_info=error)


async def _all_done(ends: set[asyncio.Task[None]], running: RunningWorker) -> None:
    """Wait for the orderly end; who is cancelled meanwhile only has it come at once."""
    cancelled: asyncio.CancelledError | None = None
    while not all(end.done() for end in ends):
        try:
            await asyncio.wait(ends)
        except asyncio.CancelledError as error:
            cancelled = error
            running.give_back()
    if cancelled is not None:
        raise cancelled


def serve(app: App, options: WorkerOptions, processes: int | None) -> None:
    """Be a worker process until SIGTERM or SIGINT, or the supervisor of several."""
    if is_child():
        raise ConfigurationError(
            "a worker would start in a child process that imports this module for its functions; "
            'start it under: if __name__ == "__main__":'
        )
    if threading.current_thread() is not threading.main_thread():
        raise ConfigurationError(
            "run_forever answers signals, which only the main thread of a process can; "
            "a worker elsewhere is: async with app.worker():"
        )
    if not logging.getLogger().handlers:
        # Drivers are only heard when something is wrong.
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logger.setLevel(logging.INFO)
    if processes is not None and not supervised.is_supervised():
        if status := asyncio.run(Supervisor(processes, options.grace).run(options.health)):
            raise SystemExit(status)
        return
    if supervised.is_supervised():
        options = replace(options, health=None)  # the supervisor answers for all
    # The two loops of this process hand over work many times a millisecond; with the
    # default of 5 ms each would wait for the other.
    sys.setswitchinterval(0.0005)
    leaving = Leaving()
    try:
        asyncio.run(Service(app, options, leaving).run())
    except Exception:
        leaving.come_back(1)
        _leave_threads_behind(1)
        raise
    leaving.come_back(0)
    _leave_threads_behind(0)


class Service:
    """A worker that is a process: told to stop by signals, by limits, by its supervisor's end.

    It hears of them on the I/O thread, and ends the worker there: a task that blocks its loop
    holds up neither.
    """

    def __init__(self, app: App, options: WorkerOptions, leaving: Leaving) -> None:
        self._app = app
        self._options = options
        self._leaving = leaving
        self._thread = io_thread()
        self._worker: Worker | None = None
        self._line: supervised.Line | None = None
        self._told = asyncio.Event()
        self._reason = "it failed"

    async def run(self) -> None:
        """Serve until told to stop."""
        signals = StopSignals(self._signal_arrived)
        signals.listen()
        try:
            async with self._probed(), self._supervised():
                if not await self._started():
                    logger.info("stopped before the servers could be reached")
                    return
                try:
                    async with working(self._app, self._options) as running:
                        await self._thread.run(self._serve, running.engine)
                    logger.info("worker %s has stopped", running.id)
                finally:
                    await self._app.stop_async()
        finally:
            self._thread.post(self._told.set)
            signals.leave()

    async def _started(self) -> bool:
        """Start the app; say whether that was before the end."""
        told = asyncio.create_task(self._thread.run(self._told.wait))
        starting = asyncio.create_task(self._app.start_async(float("inf")))
        either: set[asyncio.Task[Any]] = {told, starting}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return False
        await starting
        return True

    async def _serve(self, worker: Worker) -> None:
        """Let a worker work until it is time to stop, and stop it."""
        self._worker = worker
        if self._line is not None:
            self._line.say(supervised.READY)
        told = asyncio.create_task(self._told.wait())
        failed = asyncio.create_task(worker.failed())
        worn = asyncio.create_task(worker.limits.reached())
        ends: set[asyncio.Task[Any]] = {told, failed, worn}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        reason = worn.result() if worn.done() and not told.done() else self._reason
        for end in ends:
            end.cancel()
        grace = self._options.grace
        if self._line is not None:
            self._line.say(supervised.STOPS)
        logger.info(
            "worker %s stops (%s); running tasks have %s",
            worker.id, reason, "all the time" if grace is None else f"{grace:g} s",
        )  # fmt: skip
        await worker.stop(grace)
        if self._line is not None:
            self._line.say(supervised.OVER)
        self._leaving.begin(0 if worker.failure is None else 1)

    def _signal_arrived(self, name: str) -> None:
        # Not by the entry queue, whose lock this very thread may hold.
        self._thread.loop.call_soon_threadsafe(self._tell, name)

    def _tell(self, reason: str) -> None:
        if not self._told.is_set():
            self._reason = reason
            self._told.set()
        elif self._line is None:  # else the supervisor counts the signals
            self._give_back()

    def _give_back(self) -> None:
        if self._worker is not None:
            logger.info("worker %s gives back what runs", self._worker.id)
            self._worker.give_back()

    def _ready(self) -> bool:
        return self._worker is not None and self._worker.ready

    @asynccontextmanager
    async def _probed(self) -> AsyncIterator[None]:
        """Answer probes, from the start on."""
        if self._options.health is None:
            yield
            return

        async def ready() -> bool:
            return self._ready()

        probe = await self._thread.run(answer_probes, *self._options.health, ready)
        try:
            yield
        finally:
            self._thread.post(probe.close)

    @asynccontextmanager
    async def _supervised(self) -> AsyncIterator[None]:
        """Answer the supervisor, if there is one, and end when it has."""
        self._line = await self._thread.run(supervised.connect)
        if self._line is None:
            yield
            return
        answering = asyncio.create_task(self._thread.run(self._answer, self._line))
        try:
            yield
        finally:
            answering.cancel()
            self._thread.post(self._line.say, supervised.OVER)
            self._thread.post(self._line.close)

    async def _answer(self, line: supervised.Line) -> None:
        await line.answer(self._ready, self._give_back)
        if not self._told.is_set():
            self._tell("its supervisor is gone")


def _leave_threads_behind(status: int) -> None:
    """End the process although functions still run in threads: their grace is over.

    An interpreter that is finalized under running threads may not survive it.
    """
    deadline = time.monotonic() + 1.0
    while busy_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    if stuck := busy_threads():
        logger.warning("%d functions still run in threads; the process ends without them", stuck)
        if status:
            traceback.print_exc()
        leave(status)


def describe(part: Guarantees) -> str:
    """Return a line for the log: the part, its server, what it survives and why."""
    server = f" on {part.server}" if part.server else ""
    return f"{part.part}{server}: survives {part.survives} ({part.durability})"
