"""The contract of a Balancer: which queues a worker asks next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping


class Balancer(ABC):
    """Shares a worker's free slots among its queues."""

    @abstractmethod
    def wanted(self, free: int, running: Mapping[str, int]) -> dict[str, int]:
        """Return how many deliveries to ask of each queue, at most `free` each.

        Where there is more than fits, brokers take from the first ones named. `running` counts what
        this worker runs of each of its queues, zeros included.
        """
