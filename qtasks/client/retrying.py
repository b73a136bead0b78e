"""Servers that do not answer: retries with backoff, and the log lines about an outage.

Clients and workers retry by the same function, `retry`. The log gets one line per outage and
minute. Drivers would hide that line: some log each attempt, or warn about errors that they fix
themselves. So their loggers are filtered, except loggers that the user has configured.
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
"""Seconds until an outage is logged again, and until a driver's next error is passed on.

Attempts are more frequent: without this limit, an outage of an hour would log thousands of lines.
"""
_FRESH = 10.0
"""Seconds for which a failure counts.

A waiting `receive` does not report success. If its server was still away, it would have failed
again by then.
"""
_SERVER = re.compile(r"\w+://[^\s,;]+")
"""Finds the server in an error. One outage causes many errors; they share the server."""


class Backoff:
    """The wait before each attempt: it doubles from `first` to `most` seconds, with jitter.

    With jitter, a wait is between 10 % and 100 % of that. See "Exponential Backoff And Jitter",
    AWS Architecture Blog, 2015.
    """

    def __init__(self, first: float = 0.05, most: float = 2.0) -> None:
        self._first = first
        self._most = most
        self._ceiling = first

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        ceiling, self._ceiling = self._ceiling, min(self._ceiling * 2, self._most)
        return ceiling * random.uniform(0.1, 1.0)

    def reset(self) -> None:
        """Start again at `first`, because the server has answered."""
        self._ceiling = self._first


class Outage:
    """Logs the failures of one caller: once a minute, and when the server answers again."""

    def __init__(self, caller: str = "") -> None:
        self._prefix = f"{caller}: " if caller else ""
        self._told: dict[str, float] = {}
        self.failed_at: float | None = None
        """When the last call failed (seconds, monotonic clock); None if it succeeded."""

    def failed(self, error: Unavailable) -> None:
        """Log an error, unless an error of the same server was logged in the last 60 seconds."""
        text, now = str(error), time.monotonic()
        self.failed_at = now
        server = _SERVER.search(text)
        trouble = server[0].rstrip(":/") if server else text
        self._told = {known: at for known, at in self._told.items() if now - at < _AGAIN}
        if trouble not in self._told:
            self._told[trouble] = now
            logger.warning("%s%s; trying again", self._prefix, text)

    def over(self) -> None:
        """Log that the server answers again, if its outage was logged."""
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
    """Retry `call` with backoff while it raises `Unavailable`, and return its result.

    Returns None if `until` is set between two attempts. Raises the last `Unavailable` if the next
    attempt would start after `deadline` (loop time, in seconds). `outage` logs the failures.
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
                if backoff is not None:  # otherwise another server may have failed
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
    """Retries the calls of one worker, and knows whether the servers have answered recently."""

    def __init__(self) -> None:
        self._outage = Outage("worker")

    @property
    def healthy(self) -> bool:
        """Whether the last call succeeded, or failed more than 10 seconds ago."""
        failed_at = self._outage.failed_at
        return failed_at is None or time.monotonic() - failed_at > _FRESH

    async def call(
        self, call: Callable[[], Awaitable[T]], until: asyncio.Event | None = None
    ) -> T | None:
        """Retry `call` while the server does not answer; None if `until` is set meanwhile."""
        return await retry(call, until=until, outage=self._outage)


@contextmanager
def no_stray_cancel() -> Iterator[None]:
    """Raise `RuntimeError` for a `CancelledError` although this task was not cancelled.

    Some drivers raise one when their connection is closed. The task would then stop silently, as
    after a real cancellation, and its work would never be done.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError(
            "a driver raised CancelledError although this call was not cancelled"
        ) from error


_filters: dict[str, _Quiet] = {}
_users: Counter[str] = Counter()


def quiet_drivers(names: Iterable[str]) -> None:
    """Filter the loggers of drivers, and all loggers below them, until `release_drivers`.

    `names` are the names of the loggers.
    """
    for name in names:
        _users[name] += 1
        with suppress(ImportError):
            import_module(name)  # the name is usually a package, whose import makes the loggers
    quiet_late_loggers()


def quiet_late_loggers() -> None:
    """Filter new loggers below the filtered ones: drivers import some of their modules late."""
    for name in +_users:
        added = _filters.setdefault(name, _Quiet(name))
        for each in _loggers(name):
            each.addFilter(added)  # adding a filter again has no effect


def release_drivers(names: Iterable[str]) -> None:
    """Remove the filters, once every caller of `quiet_drivers` has released them."""
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
    """Passes on one error a minute. The rest goes to the logger `qtasks`, at level DEBUG."""

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
        """Return whether the user has configured this logger, or one between it and `_top`."""
        each: logging.Logger | None = logging.getLogger(name)
        while each is not None and (each.name == self._top or each.name.startswith(self._top)):
            if each.level != logging.NOTSET or each.handlers or not each.propagate:
                return True
            each = each.parent
        return False
