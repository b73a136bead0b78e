"""The times of tasks: the clock that processes share, and how long records are kept.

A final record is also what stops its message, should that be delivered again. So some records
are kept longer than was asked for.
"""

from __future__ import annotations

import time

from qtasks_core import Broker, Storage, Task

LEASES = 2.0
"""A message that was not settled comes back within one lease, and soon finds a worker."""
_CANCELLED = 86_400.0
"""Seconds from when it is due that a cancelled task's message may have to wait in its queue."""
_FRESH = 60.0
"""Seconds after which the server is asked for its time again, when a time is needed."""


class Clock:
    """The broker's clock, or the storage's, as a difference from this machine's.

    Where neither has one it is this machine's own; those of other machines have to agree with it.
    """

    def __init__(self, broker: Broker, storage: Storage) -> None:
        self._servers = (broker, storage)
        self._ahead = 0.0
        self._asked_at: float | None = None
        self.shared = False
        """Whether all processes of the app have this clock."""

    async def ask(self) -> None:
        """Ask for the server's time, unless that was done lately. Raises `Unavailable`."""
        if self._asked_at is not None and time.monotonic() - self._asked_at < _FRESH:
            return
        for server in self._servers:
            began = time.time()
            told = await server.clock()
            if told is not None:
                self._ahead = told - (began + time.time()) / 2
                self.shared = True
                break
        self._asked_at = time.monotonic()

    def shown_at(self, local: float) -> float:
        """Return what it shows when this machine's clock shows `local`; Unix times, in seconds."""
        return local + self._ahead

    def now(self) -> float:
        """Return the Unix time by this clock, in seconds."""
        return self.shown_at(time.time())


def kept_for(asked: float | None, default: float | None, least: float) -> float | None:
    """Return the retention to record, in seconds: what was asked for, `least` where that is less.

    `default` is the storage's, which counts where nothing was asked for.
    """
    keep = default if asked is None else asked
    return asked if keep is None or keep >= least else least


def cancelled_kept_for(record: Task, default: float | None) -> float | None:
    """Return the retention of a task that is cancelled now: its message is still in the queue."""
    wait = max(0.0, record.due_at - time.time()) if record.due_at is not None else 0.0
    return kept_for(record.retention, default, wait + _CANCELLED)
