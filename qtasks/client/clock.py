"""One clock for the times that processes compare: the server's, as far as it tells it."""

from __future__ import annotations

import time

from qtasks_core import Broker, Storage

_FRESH = 60.0
"""Seconds after which the server is asked again, should a time be needed."""


class Clock:
    """What is added to this machine's clock to have that of the broker, else of the storage.

    Where neither has one it is this machine's own, which others' have to agree with.
    """

    def __init__(self, broker: Broker, storage: Storage) -> None:
        self._parts = (broker, storage)
        self._ahead = 0.0
        self._asked_at: float | None = None
        self.shared = False
        """Whether all processes of the app have this clock."""

    async def ask(self) -> None:
        """Ask for the server's time, unless that was done lately. Raises `Unavailable`."""
        if self._asked_at is not None and time.monotonic() - self._asked_at < _FRESH:
            return
        for part in self._parts:
            began = time.time()
            told = await part.clock()
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
