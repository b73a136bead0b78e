"""The contract of an Executor: where a task's function runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from qtasks_core.schemas import TaskMessage


class Encoded(msgspec.Struct, frozen=True):
    """A result that came as bytes from where the function ran, ready to be stored."""

    data: bytes


class Runnable(Protocol):
    """What an executor is given of a task."""

    name: str
    function: Callable[..., Any]
    """As its author wrote it."""
    is_async: bool
    max_time: float | None
    """Seconds one run may take."""

    def invoke(self, message: TaskMessage, /) -> Any:
        """Decode the arguments and call the function, here and now; of an async one, to be awaited.

        Raises `BadArguments`, and what the function raises. A process that the function forks
        and comes back in ends here.
        """


class Executor(ABC):
    """Runs functions for the workers of a process: on their loops, in threads, in processes.

    It is given messages, not arguments: so decoding happens where the function runs, and an
    executor may take its work elsewhere without decoding it at all.
    """

    @abstractmethod
    def accept(self, task: Runnable) -> None:
        """Raise `ConfigurationError` for a task that cannot run here; called at registration."""

    @abstractmethod
    def bind(self, task: Runnable) -> Callable[[TaskMessage], Awaitable[Any]]:
        """Return what runs a message of this task. Called on the loop of a worker, once a task.

        Awaited, it gives the function's result, or `Encoded`; it raises what the function raised,
        `BadArguments`, `UnstorableResult`, and `TimeoutError` when the function has taken more
        than `max_time`, the wait for its turn not counted. Cancelled, it ends at once, and stops
        the function where that can be done. Raises `ConfigurationError`.
        """

    @abstractmethod
    def stop(self) -> None:
        """Free what is idle: a worker on this loop has ended. Others may go on, or come."""
