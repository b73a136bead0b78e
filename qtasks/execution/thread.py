"""Plain functions in threads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial
from typing import Any

from qtasks.execution.limited import limited
from qtasks.execution.threads import in_thread
from qtasks_core import Executor, Runnable, TaskMessage
from qtasks_core.errors import ConfigurationError


class ThreadExecutor(Executor):
    """Runs plain functions in daemon threads; the default for them.

    A thread cannot be stopped. After a run is cancelled or takes too long, its function keeps
    running in its thread and its result is discarded.
    """

    async def elsewhere(self, call: Callable[[], Any]) -> Any:
        """Make a call in a thread, and return its result."""
        return await in_thread(call)

    def accept(self, task: Runnable) -> None:
        """Refuse coroutine functions."""
        if task.is_async:
            raise ConfigurationError(
                f"task {task.name}: a coroutine function runs on the loop (LoopExecutor), not in a "
                "thread; make it a plain function, or leave executor= out"
            )

    def bind(self, task: Runnable) -> Callable[[TaskMessage], Awaitable[Any]]:
        """Return a coroutine function that awaits the function in a thread."""
        call = partial(_call, task.invoke)

        async def run(message: TaskMessage) -> Any:
            return await self.elsewhere(partial(copy_context().run, call, message))

        return limited(run, task.max_time)

    def stop(self) -> None:
        """Free nothing: threads without work end by themselves."""


def _call(invoke: Callable[[TaskMessage], Any], message: TaskMessage) -> Any:
    try:
        return invoke(message)
    except (StopIteration, GeneratorExit) as error:
        # A future cannot hold a StopIteration, and in a coroutine a GeneratorExit means that its
        # loop was closed.
        raise RuntimeError(f"the function raised {error!r}") from error
