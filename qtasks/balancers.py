"""How a worker shares its free slots among queues.

app.run_forever(queues=["paid", "free"], balancer=WeightedFair({"paid": 3, "free": 1}))
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qtasks_core import Balancer
from qtasks_core.errors import ConfigurationError


class Greedy(Balancer):
    """Asks every queue for all free slots, each time starting with another queue.

    A broker receives from the queues in that order, so no queue waits for the backlog of another.
    """

    def __init__(self) -> None:
        self._turn = 0

    def wanted(self, free: int, running: Mapping[str, int]) -> dict[str, int]:
        """Return `free` for each queue."""
        self._turn = (self._turn + 1) % len(running)
        queues = list(running)
        return dict.fromkeys(queues[self._turn :] + queues[: self._turn], free)


class Strict(Balancer):
    """Takes tasks from a queue only if those before it are empty, in the order of the worker.

        app.run_forever(queues=["urgent", "usual"], balancer=Strict())

    A backlog of the first queue stops all others. Tasks that run are not interrupted. On RabbitMQ
    and Kafka, which fetch messages of all queues ahead, tasks of other queues can come in between.
    """

    def wanted(self, free: int, running: Mapping[str, int]) -> dict[str, int]:
        """Return `free` for each queue, in the order of the worker's queues."""
        return dict.fromkeys(running, free)


class WeightedFair(Balancer):
    """Shares the worker's slots in proportion to the weights of its queues.

        app.run_forever(queues=["paid", "free"], balancer=WeightedFair({"paid": 3, "free": 1}))

    While both queues have a backlog, `paid` has three quarters of the slots. What a queue does not
    need, the others use. So after a flood in one queue, a task of another queue waits only until
    the next slot is free. A queue without a weight has the weight 1.

    Raises `ConfigurationError` if a weight is not positive.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        for queue, weight in self._weights.items():
            if not 0 < weight < math.inf:
                raise ConfigurationError(
                    f"the weight of {queue!r} is {weight!r}: it must be above 0"
                )
        self._passed: dict[str, float] = {}
        """Where each queue is in the turns: the queue that is furthest behind comes next."""

    def wanted(self, free: int, running: Mapping[str, int]) -> dict[str, int]:
        """Return a share of the free slots for each queue, in the order of their turns.

        It is stride scheduling: with each turn, a queue passes on by the inverse of its weight.
        (Waldspurger and Weihl, "Stride Scheduling", MIT 1995.) Tasks of one queue may take longer
        than those of another, so a queue waits while it has a slot more than its share.
        """
        weights = {queue: self._weights.get(queue, 1.0) for queue in running}
        slots = (free + sum(running.values())) / sum(weights.values())
        taken = dict(running)
        wanted: dict[str, int] = {}
        passed = {queue: self._passed.get(queue, 0.0) for queue in running}
        for _ in range(free):
            queue = min(
                (queue for queue in running if taken[queue] < weights[queue] * slots + 1),
                key=passed.__getitem__,
            )
            passed[queue] += 1 / weights[queue]
            taken[queue] += 1
            wanted[queue] = wanted.get(queue, 0) + 1
        last = min(passed.values())
        self._passed = {queue: at - last for queue, at in passed.items()}
        # The others get what these leave.
        return wanted | dict.fromkeys(running.keys() - wanted.keys(), 1)
