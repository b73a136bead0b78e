"""Work that blocks, on a thread of its own that also serves a process that is exiting.

`asyncio.to_thread` and the pools of `concurrent.futures` take no work any more when the callbacks
of `atexit` run. An app may connect and disconnect there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class JobThread:
    """Runs jobs one after the other. The thread starts with the first job, and ends at `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Run a job; the future of the running loop gets its result or its error.

        A job whose future is cancelled runs all the same.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                answer = partial(_set, future, job())
            except Exception as error:  # noqa: BLE001  # whoever awaits the future raises it
                answer = partial(_fail, future, error)
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(answer)

        self._jobs.put(run)
        return future

    def close(self) -> None:
        """End the thread after the jobs that it has."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _set(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


async def in_thread(job: Callable[[], T]) -> T:
    """Run one job on a thread of its own, and return its result."""
    thread = JobThread("qtasks-job")
    try:
        return await thread.submit(job)
    finally:
        thread.close()
