"""The contract of a Balancer: which queues a worker asks next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping


class Balancer(ABC):
    """Shares a worker's free slots among its queues."""

    @abstractmethod
    def wanted(self, free: int, running: Mapping[str, int]) -> dict[str, int]:
        """Return how many deliveries to request from each queue, at most `free` from each.

        If more messages are ready than fit, brokers take them from the queues that are named first.
        `running` says how many tasks of each of its queues this worker runs, including zeros.
        """
