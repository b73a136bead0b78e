"""The contract of an Executor: where a task's function runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any


class Executor(ABC):
    """Runs functions for a worker: on its loop, in threads, in processes."""

    @abstractmethod
    def start(self, concurrency: int) -> None:
        """Get ready to run `concurrency` functions at once."""

    @abstractmethod
    def bind(self, function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """Return a coroutine function that runs `function` here; called once a task."""

    @abstractmethod
    def stop(self) -> None:
        """Free what `start` took, without waiting for functions that still run."""
