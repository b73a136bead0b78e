"""Which queue a call goes to, if a task has several.

@app.task(queue=KeyHash("customer", ["orders-0", "orders-1"]))
async def order(customer: str, item: str) -> None: ...
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from qtasks_core import RoutePolicy
from qtasks_core.errors import ConfigurationError, SignatureMismatch
from qtasks_core.names import checked_name
from qtasks_core.rendezvous import chosen


class _Queues(RoutePolicy):
    """Chooses among the queues that it was given."""

    def __init__(self, queues: Iterable[str]) -> None:
        self._queues = tuple(dict.fromkeys(checked_name(queue, "a queue") for queue in queues))
        if not self._queues:
            raise ConfigurationError(f"{type(self).__name__} has no queue to choose")

    @property
    def queues(self) -> Sequence[str]:
        """The queues, in the order in which they were given."""
        return self._queues


class KeyHash(_Queues):
    """Sends all calls with the same value of a parameter to the same queue.

        @app.task(queue=KeyHash("customer", ["orders-0", "orders-1"]))
        async def order(customer: str, item: str) -> None: ...

    The value is a text, a whole number, bytes or a UUID. Values are spread evenly. If a queue is
    added, it gets its share of the values, and the others stay where they were.
    (https://en.wikipedia.org/wiki/Rendezvous_hashing)

    A call raises `SignatureMismatch` for a value of another type. Raises `ConfigurationError` for a
    wrong name of a queue, and when it is declared for a function without this parameter.
    """

    def __init__(self, parameter: str, queues: Iterable[str]) -> None:
        super().__init__(queues)
        self._parameter = parameter
        self._by_name = {queue.encode(): queue for queue in self._queues}

    def check(self, parameters: Collection[str]) -> None:
        """Raise `ConfigurationError` if the function has no such parameter."""
        if self._parameter not in parameters:
            raise ConfigurationError(
                f"KeyHash({self._parameter!r}, …): the function has no such parameter, but "
                f"{', '.join(parameters) or 'none'}"
            )

    def choose(self, arguments: Mapping[str, Any], depths: Mapping[str, int]) -> str:
        """Return the queue of the parameter's value."""
        value = arguments[self._parameter]
        if not isinstance(value, str | int | bytes | UUID):
            raise SignatureMismatch(
                f"KeyHash({self._parameter!r}, …): {type(value).__name__} is no text, whole "
                "number, bytes or UUID, by which a queue can be chosen"
            )
        key = value if isinstance(value, bytes) else str(value).encode()
        return self._by_name[chosen(self._by_name, key)]


class RoundRobin(_Queues):
    """Sends the calls that a process makes to each queue in turn."""

    def __init__(self, queues: Iterable[str]) -> None:
        super().__init__(queues)
        self._turns = itertools.cycle(self._queues)

    def choose(self, arguments: Mapping[str, Any], depths: Mapping[str, int]) -> str:
        """Return the queue whose turn it is."""
        return next(self._turns)


class LeastDepth(_Queues):
    """Sends each call to the queue in which the fewest messages wait.

    For queues with workers of their own, of which some may be slower. The numbers are read again at
    most once a second, and only while calls are made. In between, the process counts its own calls.
    """

    reads_depths = True

    def __init__(self, queues: Iterable[str]) -> None:
        super().__init__(queues)
        self._turns = RoundRobin(self._queues)

    def choose(self, arguments: Mapping[str, Any], depths: Mapping[str, int]) -> str:
        """Return the queue with the lowest number, in turns if there are several."""
        first = self._turns.choose(arguments, depths)
        return min(self._queues, key=lambda queue: (depths[queue], queue != first))
