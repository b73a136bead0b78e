"""The contract of a Plugin: code around the runs of tasks."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from msgspec import Struct

from qtasks_core.schemas import TaskMessage


class Run(Struct, frozen=True):
    """One run of a task, as its plugins see it. New fields may be added, with a default."""

    message: TaskMessage

    @property
    def attempt(self) -> int:
        """1 for the first run of the task, plus 1 for each retry."""
        return self.message.attempt


class Again(Struct, frozen=True):
    """The decision to run the task once more, `after` seconds from now.

    Raises `ValueError` if `after` is negative or not finite.
    """

    after: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.after) and self.after >= 0):
            raise ValueError(f"Again(after={self.after}): it takes seconds, 0 or more")


class GiveUp(Struct, frozen=True):
    """The decision to finish the task with `error`. `reason` becomes the `dead` of its record."""

    reason: str


Decision: TypeAlias = Again | GiveUp
Proceed: TypeAlias = Callable[[Run], Awaitable[Any]]
"""Continues a run: calls the inner hooks, and finally the function. Returns its result."""


class Plugin:
    """Hooks around the runs of tasks, on the worker's loop. A hook costs nothing unless overridden.

    One object serves many runs at once, of a task, a router or an app. So keep the data of one run
    in local variables of a hook. The order is app, router, task, and within each the given order.
    The first plugin is outermost. A failure reaches the innermost plugin first, as any exception
    does.
    """

    async def around_execute(self, run: Run, proceed: Proceed) -> Any:
        """Return the result of the run. `await proceed(run)` executes it.

        A result from another process has been decoded by its annotation. It is None if the task
        stores no result.

        If this hook raises, or lets an error of `proceed` through, that error is the failure of the
        run. The arguments are decoded inside `proceed`, from the message of the run that it gets.
        """
        return await proceed(run)

    async def decide(self, run: Run, error: BaseException) -> Decision | None:
        """Decide what follows a run that raised `error`. None leaves it to the outer plugins.

        Not called after `qtasks.Reject`, or if the arguments do not fit. `qtasks.Retry` is an error
        like others here: the function asks for another run. If this method raises, the task
        finishes with `error`, which names both.
        """
        return None
