"""How a worker shares its free slots among queues."""

from __future__ import annotations

from collections.abc import Mapping

from qtasks_core import Balancer


class Greedy(Balancer):
    """Asks every queue for all free slots: whatever is there first is taken."""

    def wanted(self, free: int, running: Mapping[str, int]) -> dict[str, int]:
        """Return `free` for each queue."""
        return dict.fromkeys(running, free)
