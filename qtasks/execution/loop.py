"""Coroutine functions on the worker's own loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from qtasks.execution.limited import limited
from qtasks_core import Executor, Runnable, TaskMessage
from qtasks_core.errors import ConfigurationError


class LoopExecutor(Executor):
    """Runs coroutine functions on the worker's loop; the default for them."""

    def accept(self, task: Runnable) -> None:
        """Refuse plain functions, which would block the loop."""
        if not task.is_async:
            raise ConfigurationError(
                f"task {task.name}: a plain function would block the loop; it runs in a "
                "ThreadExecutor or a ProcessExecutor"
            )

    def bind(self, task: Runnable) -> Callable[[TaskMessage], Awaitable[Any]]:
        """Return `task.invoke`; after `max_time` the call is cancelled."""
        return limited(task.invoke, task.max_time)

    def stop(self) -> None:
        """Free nothing: it holds nothing."""
