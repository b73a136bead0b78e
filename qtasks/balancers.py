"""How a worker shares its free slots among queues."""

from __future__ import annotations

from collections.abc import Mapping

from qtasks_core import Balancer


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
