"""The contract of a RoutePolicy: the queue of each call of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar


class RoutePolicy(ABC):
    """Chooses a queue for each call of a task, where the call is made. A retry keeps its queue.

    Its methods are called from any thread.
    """

    reads_depths: ClassVar[bool] = False
    """Whether `choose` looks at the depths. They cost a question to the server now and then."""

    @property
    @abstractmethod
    def queues(self) -> Sequence[str]:
        """All queues that `choose` may return. A worker of the app receives from each of them."""

    def check(self, parameters: Collection[str]) -> None:
        """Raise `ConfigurationError` if `choose` needs a parameter that the function lacks.

        Called once, when the task is declared. By default any function fits.
        """
        return

    @abstractmethod
    def choose(self, arguments: Mapping[str, Any], depths: Mapping[str, int]) -> str:
        """Return the queue of a call.

        `arguments`: the call's arguments by the names of the function's parameters, with defaults.
        `depths`: how many messages wait in each of `queues` and may run. It was read about a second
        ago, and what this process has enqueued since is added. A queue that was not read yet has 0.
        Without `reads_depths` it is empty.
        """
