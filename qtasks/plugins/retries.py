"""The plugin that runs failed tasks again. It is named `Retries`: `qtasks.Retry` is the signal."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from msgspec import Struct

from qtasks.signals import Retry
from qtasks_core.contracts.plugin import Again, Decision, GiveUp, Plugin, Run
from qtasks_core.errors import ConfigurationError


class Backoff(Struct, frozen=True):
    """How often a failed task is retried, and how long it waits before each retry.

        Backoff(5, first=2.0)  # five retries, after at most 2, 4, 8, 16 and 32 seconds

    Before retry n it waits a random time from 0 to `first * factor ** (n - 1)` seconds, and never
    more than `longest` (exponential backoff with full jitter). Jitter over the whole range spreads
    the load of many clients best: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture
    Blog, 2015. Raises `ConfigurationError` for a number that is out of range.
    """

    retries: int
    """How many runs may follow the first."""
    first: float = 1.0
    """Seconds: the longest wait before the first retry."""
    factor: float = 2.0
    """By how much the longest wait grows with each retry."""
    longest: float = 300.0
    """Seconds: the limit of every wait."""

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigurationError(f"retries={self.retries}: it must be 0 or more")
        for name, least in (("first", 0), ("factor", 1), ("longest", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ConfigurationError(f"{name}={value}: it must be a number of {least} or more")

    def most(self, attempt: int) -> float:
        """Return the longest wait in seconds after this attempt (1 for the first run)."""
        try:
            return min(self.longest, self.first * self.factor ** (attempt - 1))
        except OverflowError:
            return self.longest if self.first else 0.0

    def delay(self, attempt: int) -> float:
        """Return a random wait in seconds after this attempt (1 for the first run)."""
        return random.uniform(0.0, self.most(attempt))

    def decide(self, run: Run, error: BaseException) -> Decision:
        """Decide what follows a run that raised `error`."""
        if isinstance(error, Retry):
            return Again(self.delay(run.attempt) if error.after is None else error.after)
        if run.attempt <= self.retries:
            return Again(max(self.delay(run.attempt), _retry_after(error)))
        tries = run.attempt
        return GiveUp(f"failed {tries} times" if tries > 1 else "no retry is configured")


class Retries(Plugin):
    """Runs a task again after an exception.

        Retries(3, on={ConnectionError: Backoff(10), ValueError: 0})

    `otherwise` is a `Backoff`, or the number of retries. None: exceptions that `on` does not name
    are left to the next plugin. `on` sets the backoff for classes of exceptions; the most specific
    class counts. All runs of the task count, whatever exception each of them raised.

    If the exception has an attribute `retry_after`, a number of seconds, the wait is at least that
    long. A function that raises `qtasks.Retry` always runs again, however often it has run.
    Without `after=` it waits for the backoff that applies to `Retry`.
    """

    def __init__(
        self,
        otherwise: int | Backoff | None = 3,
        on: Mapping[type[BaseException], int | Backoff] | None = None,
    ) -> None:
        self._otherwise = None if otherwise is None else _backoff(otherwise)
        self._on = {kind: _backoff(given) for kind, given in (on or {}).items()}

    def backoff(self, error: BaseException) -> Backoff | None:
        """Return the backoff for an exception; None if this plugin does not decide about it."""
        nearest = (self._on[kind] for kind in type(error).__mro__ if kind in self._on)
        return next(nearest, self._otherwise)

    async def decide(self, run: Run, error: BaseException) -> Decision | None:
        """Decide to run the task again after the backoff, or to give up if no retry is left."""
        backoff = self.backoff(error)
        return None if backoff is None else backoff.decide(run, error)


def _backoff(given: int | Backoff) -> Backoff:
    return given if isinstance(given, Backoff) else Backoff(given)


def _retry_after(error: BaseException) -> float:
    """Return the seconds in the exception's `retry_after`, or 0 if it has none."""
    seconds = getattr(error, "retry_after", None)
    if isinstance(seconds, int | float) and math.isfinite(seconds):
        return max(0.0, seconds)
    return 0.0
