"""The one task that reads a log, and the callers that wait for its entries."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from qtasks_core.errors import Closed, Unavailable
from qtasks_log.log import Entry, Log, Replaced

logger = logging.getLogger("qtasks.log")

STALLED = 5.0
"""After this many seconds without any entry, callers that wait for one get `Unavailable`."""

T = TypeVar("T")


class Reader:
    """Passes the entries of a log to `take` in the log's order, those of one `Log.read` at once.

    If reading fails, all waiting callers get the error. The next caller that waits starts it again,
    and it continues at its position. If `take` fails, or the log has been replaced, then it first
    calls `restart`, which forgets what was taken and seeks the beginning of the log.
    """

    def __init__(
        self,
        log: Log,
        take: Callable[[list[Entry]], Awaitable[None]],
        restart: Callable[[], Awaitable[None]],
    ) -> None:
        self._log = log
        self._take = take
        self._restart = restart
        self._lost = False
        """Whether what was taken is of no use any more."""
        self._task: asyncio.Task[None] | None = None
        self._open = True
        self._reads = 0
        self._waiting: set[Future[Any]] = set()
        self._marks: list[tuple[object, Future[None]]] = []
        self._marking = asyncio.Lock()
        self._gathering: asyncio.Task[None] | None = None
        self._catching_up: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Stop reading. Waiting callers get `Closed`."""
        self._open = False
        self._fail_waiting(Closed("LogStorage was stopped"))
        tasks = [*self._catching_up, *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    @property
    def all_taken(self) -> bool:
        """Whether everything that was read has been taken, and something was read."""
        return self._reads > 0 and not self._lost

    def keep_reading(self) -> None:
        """Start the reading task, or restart it if it has failed."""
        if not self._open:
            raise Closed("LogStorage was stopped")
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read())
            self._task.add_done_callback(self._ended)

    def lose(self, error: BaseException) -> None:
        """Read the log anew at the next call: what was taken is lost."""
        self._lost = True
        self._fail_waiting(error)
        if self._task is not None:
            self._task.cancel()

    async def _read(self) -> None:
        while True:
            if self._lost:
                await self._restart()
                self._reads += 1
                self._lost = False
                self._notice_marks()
            try:
                entries = await self._log.read()
            except Replaced as replaced:
                logger.warning("reading the log anew: %s", replaced)
                self._lost = True
                self._fail_waiting(Unavailable(f"the log is being read anew: {replaced}"))
                continue
            self._reads += 1
            self._lost = True  # unless all of them are taken
            await self._take(entries)
            self._lost = False
            self._notice_marks()
            # A log with many entries may return them without ever suspending.
            await asyncio.sleep(0)

    def _notice_marks(self) -> None:
        for mark, reached in self._marks:
            if not reached.done() and self._log.reached(mark):
                reached.set_result(None)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            # Who calls while the server is away says so.
            level = logging.DEBUG if isinstance(error, Unavailable) else logging.WARNING
            logger.log(level, "reading the log ended, the next call goes on: %s", error)
            self._fail_waiting(error)
        elif self._lost and self._waiting and self._open:
            self.keep_reading()

    def _fail_waiting(self, error: BaseException) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(error)

    async def wait(self, waiter: Future[T], *, idle: bool = False) -> T:
        """Wait for a future that an entry will set.

        Raises `Unavailable` if reading fails. Unless the log may be `idle`, it also raises if
        nothing is read for `STALLED` seconds.
        """
        self.keep_reading()
        self._waiting.add(waiter)
        try:
            while True:
                reads = self._reads
                await asyncio.wait({waiter}, timeout=None if idle else STALLED)
                if waiter.done():
                    return waiter.result()
                if self._reads == reads:
                    raise Unavailable(f"nothing could be read from the log for {STALLED} s")
        finally:
            self._waiting.discard(waiter)

    async def catch_up(self) -> None:
        """Wait until all entries are read that were durable when this call began.

        One mark serves all calls that begin while an earlier mark is on its way. Raises
        `Unavailable`.
        """
        self.keep_reading()
        if self._gathering is None:
            self._gathering = asyncio.create_task(self._reach_next_mark())
            self._catching_up.add(self._gathering)
            self._gathering.add_done_callback(self._caught_up)
        gathering = self._gathering
        # Do not await the task itself: other callers share it when this call is cancelled.
        await asyncio.wait({gathering})
        if gathering.cancelled():
            raise Closed("LogStorage was stopped")
        gathering.result()

    async def _reach_next_mark(self) -> None:
        async with self._marking:
            self._gathering = None
            mark = await self._log.mark()
        if not self._lost and self._log.reached(mark):
            return
        reached: Future[None] = asyncio.get_running_loop().create_future()
        self._marks.append((mark, reached))
        try:
            await self.wait(reached)
        finally:
            self._marks.remove((mark, reached))

    def _caught_up(self, task: asyncio.Task[None]) -> None:
        self._catching_up.discard(task)
        if self._gathering is task:
            self._gathering = None
        if not task.cancelled():
            # Retrieve the error even if every caller was cancelled meanwhile.
            task.exception()
