"""Whether the servers still guarantee what tasks require: their settings can change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from qtasks_core import Broker, Storage
from qtasks_core.errors import Unavailable

FRESH = 5.0
"""Seconds for which an answer of the servers counts."""
PERIOD = 10.0
"""Seconds between two questions of a worker."""


class Requirements:
    """What tasks require, compared with the servers again and again. Costs nothing without any."""

    def __init__(
        self,
        broker: Broker,
        storage: Storage,
        required: Callable[[], bool] = lambda: False,
        compare: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """`required` returns whether a task requires anything.

        `compare` returns the tasks whose requirements the guarantees do not meet now, each with an
        error text. It logs what has changed.
        """
        self._parts = (broker, storage)
        self.required = required
        self._compare = compare
        self.asked_at: float | None = None
        """When the servers were asked (monotonic clock). None: they must be asked again."""
        self.missing: Mapping[str, str] = {}
        """The tasks whose requirements are not met, by name, each with an error text."""

    def forget(self) -> None:
        """Ask again before the next task: the server may have been replaced or restarted."""
        self.asked_at = None

    async def ask(self) -> None:
        """Ask the servers and compare, unless that was done just now. Raises `Unavailable`."""
        if self.asked_at is not None and time.monotonic() - self.asked_at < FRESH:
            return
        began = time.monotonic()
        for part in self._parts:
            await part.refresh()
        self.missing = self._compare()
        self.asked_at = began

    async def watch(self) -> None:
        """Ask for a worker until cancelled. Returns at once if nothing is required."""
        while self.required():
            self.forget()
            with suppress(Unavailable):  # those who receive and save say so
                await self.ask()
            await asyncio.sleep(PERIOD)
