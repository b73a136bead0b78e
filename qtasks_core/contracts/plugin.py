"""The contract of a Plugin: what may be put around the runs of tasks."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from msgspec import Struct

from qtasks_core.schemas import TaskMessage


class Run(Struct, frozen=True):
    """One run of a task, as its plugins see it. Fields may be added, with a default."""

    message: TaskMessage

    @property
    def attempt(self) -> int:
        """1 for the first run of the task, one more with each retry."""
        return self.message.attempt


class Again(Struct, frozen=True):
    """The decision to run the task once more, `after` seconds from now.

    Raises `ValueError` for a number that is negative or not finite.
    """

    after: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.after) and self.after >= 0):
            raise ValueError(f"Again(after={self.after}): it takes seconds, 0 or more")


class GiveUp(Struct, frozen=True):
    """The decision to end the task in `error`; `reason` is what its record says as `dead`."""

    reason: str


Decision: TypeAlias = Again | GiveUp
Proceed: TypeAlias = Callable[[Run], Awaitable[Any]]
"""Goes on with a run: the hooks further in, at last the function. Returns what it returned."""


class Plugin:
    """Hooks around the runs of tasks, on the worker's loop. A hook that is not overridden is free.

    One object serves many runs at once, of one task, a router's or an app's: what belongs to one
    run belongs into a hook's local variables. The order is app, router, task, and within each the
    order given: the first is outermost. A failure meets the innermost first, as any exception does.
    """

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        """Return the result of the run, which `await proceed(run)` brings about.

        A result that comes from another process has been decoded by its annotation; it is None
        where the task keeps none.

        What is raised here, or passed on from there, is the failure of the run. The arguments are
        decoded within, from the message of the run that is proceeded with.
        """
        return await proceed(run)

    async def decide(self, run: Run, error: BaseException) -> Decision | None:
        """Say what follows a run that raised `error`; None leaves it to the plugins further out.

        Not asked after `qtasks.Reject` and about arguments that do not fit. `qtasks.Retry` is an
        error like others here: the function asks for another run. Should this raise, the task
        ends in `error`, which names both.
        """
        return None
