"""What drivers log, within the policy for outages, unless the user has set their loggers.

QTasks says itself that a server is away, and its errors reach callers. A driver that says so at
each attempt, or warns of what it mends by itself, would bury that.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module

logger = logging.getLogger("qtasks")

_AGAIN = 60.0
"""Seconds between two errors of one driver that are passed on."""

_filters: dict[str, _Quiet] = {}
_users: Counter[str] = Counter()


def quiet(names: Iterable[str]) -> None:
    """Quiet drivers by the names of their loggers, with all below; counted until `release`."""
    for name in names:
        _users[name] += 1
        with suppress(ImportError):
            import_module(name)  # mostly that of its package, which makes its loggers
    cover()


def cover() -> None:
    """Cover loggers below them that have come into being since: drivers import parts late."""
    for name in +_users:
        added = _filters.setdefault(name, _Quiet(name))
        for each in _loggers(name):
            each.addFilter(added)  # once, however often it is added


def release(names: Iterable[str]) -> None:
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
