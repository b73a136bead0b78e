"""The plugin that runs failed tasks again. Its name keeps apart from `qtasks.Retry`, the signal."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from msgspec import Struct

from qtasks.signals import Retry
from qtasks_core.contracts.plugin import Again, Decision, GiveUp, Plugin, Run
from qtasks_core.errors import ConfigurationError


class Backoff(Struct, frozen=True):
    """How often a task may run again, and how long it waits before: exponential, full jitter.

    Before run n + 1 it waits a random time from 0 to `first * factor ** (n - 1)` seconds, at most
    `longest`. Jitter over the whole range is what clears up a crowd of clients soonest: Marc
    Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    Raises `ConfigurationError`.
    """

    retries: int
    """How many runs may follow the first."""
    first: float = 1.0
    factor: float = 2.0
    longest: float = 300.0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigurationError(f"retries={self.retries} is below 0")
        for name, least in (("first", 0), ("factor", 1), ("longest", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ConfigurationError(f"{name}={value} is not a number from {least} on")

    def most(self, attempt: int) -> float:
        """Return the seconds that the wait after this attempt, 1 for the first, takes at most."""
        try:
            return min(self.longest, self.first * self.factor ** (attempt - 1))
        except OverflowError:
            return self.longest if self.first else 0.0

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait after this attempt."""
        return random.uniform(0.0, self.most(attempt))

    def decide(self, run: Run, error: BaseException) -> Decision:
        """Say what follows a run that raised `error`."""
        if isinstance(error, Retry):
            return Again(self.delay(run.attempt) if error.after is None else error.after)
        if run.attempt <= self.retries:
            return Again(max(self.delay(run.attempt), _asked(error)))
        tries = run.attempt
        return GiveUp(f"failed {tries} times" if tries > 1 else "no retry is configured")


class Retries(Plugin):
    """Runs a task again after an exception.

    `otherwise` is a `Backoff`, or how many runs may follow the first; None leaves what `on` does
    not name to the plugins further out. `on` says what holds for some exceptions: the nearest
    class in the exception's own order of classes counts. How many runs there were is counted for
    the task, whatever each of them raised.

    An exception whose attribute `retry_after` is a number of seconds is waited for no shorter than
    that. A function that raises `qtasks.Retry` runs again however often it did before, without
    `after=` by the backoff that holds for `Retry`.
    """

    def __init__(
        self,
        otherwise: int | Backoff | None = 3,
        on: Mapping[type[BaseException], int | Backoff] | None = None,
    ) -> None:
        self._otherwise = None if otherwise is None else _backoff(otherwise)
        self._on = {kind: _backoff(given) for kind, given in (on or {}).items()}

    def backoff(self, error: BaseException) -> Backoff | None:
        """Return what holds for an exception, None where this plugin leaves it to others."""
        nearest = (self._on[kind] for kind in type(error).__mro__ if kind in self._on)
        return next(nearest, self._otherwise)

    async def decide(self, run: Run, error: BaseException) -> Decision | None:
        """Run the task again after the backoff, or give it up when it ran often enough."""
        backoff = self.backoff(error)
        return None if backoff is None else backoff.decide(run, error)


def _backoff(given: int | Backoff) -> Backoff:
    return given if isinstance(given, Backoff) else Backoff(given)


def _asked(error: BaseException) -> float:
    """Return the seconds that an exception asks to wait, 0 where it does not say."""
    asked = getattr(error, "retry_after", None)
    if isinstance(asked, int | float) and math.isfinite(asked):
        return max(0.0, asked)
    return 0.0
