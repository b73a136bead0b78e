"""A worker process: it works until a signal, a limit or its supervisor stops it."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from qtasks.bridge.crossing import io_thread
from qtasks.bridge.stop_signals import StopSignals
from qtasks.execution.child import is_child
from qtasks.execution.threads import busy_threads
from qtasks.worker import supervised
from qtasks.worker.health import answer_probes
from qtasks.worker.hosted import App, WorkerOptions, working
from qtasks.worker.leaving import Leaving, leave
from qtasks.worker.supervisor import Supervisor
from qtasks.worker.worker import Worker
from qtasks_core.errors import ConfigurationError

logger = logging.getLogger("qtasks")


def serve(app: App, options: WorkerOptions, processes: int | None) -> None:
    """Run a worker in this process, or supervise several, until SIGTERM or SIGINT."""
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
        # At the default level WARNING, drivers only log when something is wrong.
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
    """Runs one worker in this process until it is told to stop.

    The I/O thread handles signals, limits and the connection to the supervisor, and stops the
    worker. So a task that blocks its loop does not delay that.
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
        """Start the app. Return False if the process was told to stop before it had started."""
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
        """Wait for a reason to stop, and stop the worker."""
        self._worker = worker
        if self._line is not None:
            self._line.say(supervised.READY)
        told = asyncio.create_task(self._told.wait())
        failed = asyncio.create_task(worker.failed())
        limit = asyncio.create_task(worker.limits.reached())
        reasons: set[asyncio.Task[Any]] = {told, failed, limit}
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        reason = limit.result() if limit.done() and not told.done() else self._reason
        for task in reasons:
            task.cancel()
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
        # Not by the entry queue: this thread may hold its lock right now.
        self._thread.loop.call_soon_threadsafe(self._tell, name)

    def _tell(self, reason: str) -> None:
        if not self._told.is_set():
            self._reason = reason
            self._told.set()
        elif self._line is None:  # otherwise the supervisor counts the signals
            self._release()

    def _release(self) -> None:
        if self._worker is not None:
            logger.info("worker %s releases its running tasks", self._worker.id)
            self._worker.release()

    def _ready(self) -> bool:
        return self._worker is not None and self._worker.ready

    @asynccontextmanager
    async def _probed(self) -> AsyncIterator[None]:
        """Answer health probes, from the start of the process."""
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
        """Answer the supervisor, if there is one, and stop when it is gone."""
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
        await line.answer(self._ready, self._release)
        if not self._told.is_set():
            self._tell("its supervisor is gone")


def _leave_threads_behind(status: int) -> None:
    """End the process although functions still run in threads: their grace period is over.

    An interpreter that is finalized while such threads run may crash.
    """
    deadline = time.monotonic() + 1.0
    while busy_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    if stuck := busy_threads():
        logger.warning("%d functions still run in threads; the process ends without them", stuck)
        if status:
            traceback.print_exc()
        leave(status)
