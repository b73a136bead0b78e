"""Servers that are out of reach: who repeats a call, when, and what the log says meanwhile.

Clients and workers repeat by the same function, `retry`. The log has one line an outage a minute,
whatever drivers log: one that says so at each attempt, or warns of what it mends by itself, would
bury that. A driver whose loggers the user has set is left as it is.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from math import inf
from typing import TypeVar, overload

from qtasks_core.errors import Unavailable

logger = logging.getLogger("qtasks")
T = TypeVar("T")

_AGAIN = 60.0
"""Seconds until the log says again that a server is out of reach, or passes on another error of a
driver. Attempts follow each other faster: an outage of an hour would be thousands of lines."""
_FRESH = 10.0
"""Seconds for which a failure counts. A `receive` that waits says nothing, but if it had lost its
server it would have failed again by then."""
_SERVER = re.compile(r".*?\w://[^\s,;]+")
"""Where an error says which server it is: an outage has many errors, as each call sees it."""


class Backoff:
    """How long to wait before each attempt: doubles from `first` to `most` seconds, with jitter.

    A wait is between a tenth of that and all of it. See "Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015.
    """

    def __init__(self, first: float = 0.05, most: float = 2.0) -> None:
        self._first = first
        self._most = most
        self._ceiling = first

    def next(self) -> float:
        """Return how many seconds to wait now."""
        ceiling, self._ceiling = self._ceiling, min(self._ceiling * 2, self._most)
        return ceiling * random.uniform(0.1, 1.0)

    def reset(self) -> None:
        """Start again at `first`: the server has answered."""
        self._ceiling = self._first


class Outage:
    """The failures of one caller, and what the log says of them: once a minute, and their end."""

    def __init__(self, caller: str = "") -> None:
        self._prefix = f"{caller}: " if caller else ""
        self._told: dict[str, float] = {}
        self.failed_at: float | None = None
        """When the last call failed, on the monotonic clock; None: it was answered."""

    def failed(self, error: Unavailable) -> None:
        """Log an error, unless it, or another one of the same server, was logged lately."""
        text, now = str(error), time.monotonic()
        self.failed_at = now
        server = _SERVER.match(text)
        trouble = server[0] if server else text
        self._told = {known: at for known, at in self._told.items() if now - at < _AGAIN}
        if trouble not in self._told:
            self._told[trouble] = now
            logger.warning("%s%s; trying again", self._prefix, text)

    def over(self) -> None:
        """Log that the server answers again, if it was logged that it does not."""
        if self._told:
            self._told.clear()
            logger.warning("%sthe server answers again", self._prefix)


@overload
async def retry(
    call: Callable[[], Awaitable[T]], *, deadline: float = inf, outage: Outage | None = None
) -> T: ...
@overload
async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    until: asyncio.Event | None,
    deadline: float = inf,
    outage: Outage | None = None,
) -> T | None: ...
async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    until: asyncio.Event | None = None,
    deadline: float = inf,
    outage: Outage | None = None,
) -> T | None:
    """Repeat `call`, with backoff, while it raises `Unavailable`; return what it returns.

    Returns None when `until` is set between two attempts. Raises the last `Unavailable` where the
    next attempt would come after `deadline` (loop time, in seconds). `outage` logs the failures.
    """
    backoff: Backoff | None = None
    while True:
        try:
            with no_stray_cancel():
                answer = await call()
        except Unavailable as error:
            backoff = backoff or Backoff()
            pause = backoff.next()
            if asyncio.get_running_loop().time() + pause > deadline:
                raise
            if outage is not None:
                outage.failed(error)
        else:
            if outage is not None:
                outage.failed_at = None
                if backoff is not None:  # else the server that failed may be another one
                    outage.over()
            return answer
        if until is None:
            await asyncio.sleep(pause)
            continue
        try:
            async with asyncio.timeout(pause):
                await until.wait()
                return None
        except TimeoutError:
            continue


class Retrying:
    """The calls of one worker: retried with backoff. Knows whether the servers answered lately."""

    def __init__(self) -> None:
        self._outage = Outage("worker")

    @property
    def fine(self) -> bool:
        """Whether the last calls were answered."""
        failed_at = self._outage.failed_at
        return failed_at is None or time.monotonic() - failed_at > _FRESH

    async def call(
        self, call: Callable[[], Awaitable[T]], until: asyncio.Event | None = None
    ) -> T | None:
        """Retry `call` while the server is out of reach; None once `until` is set meanwhile."""
        return await retry(call, until=until, outage=self._outage)


@contextmanager
def no_stray_cancel() -> Iterator[None]:
    """Raise `RuntimeError` for a `CancelledError` that no cancellation of this task has caused.

    Drivers raise one when a connection is closed under them. A task that ends by it is missed by
    nobody, and what it did for others would never be done.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("a driver raised CancelledError, and nobody had cancelled it") from error


_filters: dict[str, _Quiet] = {}
_users: Counter[str] = Counter()


def quiet_drivers(names: Iterable[str]) -> None:
    """Quiet drivers by the names of their loggers, with all below them, until `release_drivers`."""
    for name in names:
        _users[name] += 1
        with suppress(ImportError):
            import_module(name)  # mostly that of its package, which makes its loggers
    quiet_late_loggers()


def quiet_late_loggers() -> None:
    """Quiet loggers below them that were made since: drivers import some of their modules late."""
    for name in +_users:
        added = _filters.setdefault(name, _Quiet(name))
        for each in _loggers(name):
            each.addFilter(added)  # once, however often it is added


def release_drivers(names: Iterable[str]) -> None:
    """Let drivers speak again, with the last that quieted them."""
    for name in names:
        _users[name] -= 1
        if _users[name] <= 0 and (added := _filters.pop(name, None)) is not None:
            for each in _loggers(name):
                each.removeFilter(added)


def _loggers(name: str) -> list[logging.Logger]:
    known = list(logging.root.manager.loggerDict.items())
    below = [
        each
        for other, each in known
        if isinstance(each, logging.Logger) and other.startswith(f"{name}.")
    ]
    return [logging.getLogger(name), *below]


class _Quiet(logging.Filter):
    """Passes on an error a minute; the rest goes to QTasks' own logger, for debugging."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._top = name
        self._told: float | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if self._is_set(record.name):
            return True
        now = time.monotonic()
        if record.levelno >= logging.ERROR and (self._told is None or now - self._told >= _AGAIN):
            self._told = now
            return True
        logger.debug("%s: %s", record.name, record.getMessage())
        return False

    def _is_set(self, name: str) -> bool:
        """Say whether the user has set this logger, or one between it and the driver's own."""
        each: logging.Logger | None = logging.getLogger(name)
        while each is not None and (each.name == self._top or each.name.startswith(self._top)):
            if each.level != logging.NOTSET or each.handlers or not each.propagate:
                return True
            each = each.parent
        return False
