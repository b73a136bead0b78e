"""The clock that processes share, and the retention of records.

If a message is delivered again, its final record stops it. So some records are kept for longer
than the user has asked for.
"""

from __future__ import annotations

import time

from qtasks_core import Broker, Storage, Task

LEASES = 2.0
"""Least retention of a final record, in leases.

A message that was not settled is delivered again within one lease, and a worker soon receives it.
"""
_CANCELLED = 86_400.0
"""Seconds after its due time for which a cancelled task's message may wait in its queue."""


class Clock:
    """The clock of the broker or the storage, as a difference from this machine's clock.

    If neither has a clock, it is this machine's clock. The clocks of other machines must then
    agree with it.
    """

    def __init__(self, broker: Broker, storage: Storage) -> None:
        self._servers = (broker, storage)
        self._ahead = 0.0
        self._asked_at: float | None = None
        self.shared = False
        """Whether all processes of the app use this clock: it is a server's."""
        self.fresh = 60.0
        """Seconds for which the server's time counts as known. 0, if the server's clock jumps."""

    async def ask(self) -> None:
        """Ask for the server's time, unless it is known. Raises `Unavailable`."""
        if self._asked_at is not None and time.monotonic() - self._asked_at < self.fresh:
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
        """Convert a time of this machine's clock to this clock. Both are Unix times in seconds."""
        return local + self._ahead

    def now(self) -> float:
        """Return the current Unix time of this clock, in seconds."""
        return self.shown_at(time.time())


def kept_for(asked: float | None, default: float | None, least: float) -> float | None:
    """Return the retention to record, in seconds: `asked`, or `least` if that is longer.

    `default` is the storage's retention. It is compared with `least` if `asked` is None.
    """
    keep = default if asked is None else asked
    return asked if keep is None or keep >= least else least


def cancelled_kept_for(record: Task, default: float | None) -> float | None:
    """Return the retention of a task that is cancelled now, in seconds.

    Its message is still in the queue, so the record has to be kept until the message is received.
    """
    wait = max(0.0, record.due_at - time.time()) if record.due_at is not None else 0.0
    return kept_for(record.retention, default, wait + _CANCELLED)
