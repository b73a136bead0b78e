"""The contract of an Executor: where a task's function runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from qtasks_core.schemas import TaskMessage


class Encoded(msgspec.Struct, frozen=True):
    """A result that arrives as bytes from where the function ran, ready to be stored."""

    data: bytes


class Runnable(Protocol):
    """A task, as an executor sees it."""

    name: str
    function: Callable[..., Any]
    """The function, as its author wrote it."""
    is_async: bool
    max_time: float | None
    """Seconds that one run may take."""

    def invoke(self, message: TaskMessage, /) -> Any:
        """Decode the arguments and call the function here and now.

        If the function is async, await the result. Raises `BadArguments`, and every error of the
        function. If the function forks and the child returns from it, that child process exits
        here.
        """


class Executor(ABC):
    """Runs functions for the workers of a process: on their loops, in threads, in processes.

    An executor gets messages, not arguments. So the arguments are decoded where the function runs.
    An executor may send a message elsewhere without decoding it at all.
    """

    @abstractmethod
    def accept(self, task: Runnable) -> None:
        """Raise `ConfigurationError` for a task that cannot run here. Called at registration."""

    @abstractmethod
    def bind(self, task: Runnable) -> Callable[[TaskMessage], Awaitable[Any]]:
        """Return a callable that runs a message of this task.

        The worker calls `bind` on its loop, once for each task. `bind` raises `ConfigurationError`.

        Awaiting a call of the callable returns the function's result, or `Encoded`. It raises the
        function's error, `BadArguments` or `UnstorableResult`. It raises `TimeoutError` if the
        function takes more than `max_time`; waiting for its turn does not count. When it is
        cancelled, it finishes at once and stops the function if that is possible.
        """

    @abstractmethod
    def stop(self) -> None:
        """Free idle resources, because a worker on this loop has stopped.

        Other workers may keep running, or start later.
        """
