"""What a cancelled `receive` leaves behind: deliveries for the next call, or to be released."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

from qtasks_core.schemas import Delivery


class Leftovers:
    """Deliveries that the server handed over and that no call of `receive` has returned yet.

    A call adds what it fetched and takes what it may return. If it is cancelled in between, the
    next call finds the deliveries here. `close` takes all of them, to release them.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[float, Delivery]] = []

    def add(self, deliveries: Iterable[Delivery], until: float = inf) -> None:
        """Keep deliveries whose lease holds until this time, by any clock of the caller's."""
        self._kept += [(until, delivery) for delivery in deliveries]

    def take(self, wanted: Mapping[str, int], limit: int, now: float = 0.0) -> list[Delivery]:
        """Return what a call of `receive` may have; the rest stays, without expired leases.

        An expired delivery may be with another receiver, so it is dropped.
        """
        kept, self._kept = self._kept, []
        quota = dict(wanted)  # how many deliveries of each queue this call may still have
        taken: list[Delivery] = []
        for until, delivery in kept:
            if until <= now:
                continue
            if len(taken) < limit and quota.get(delivery.queue, 0) > 0:
                quota[delivery.queue] -= 1
                taken.append(delivery)
            else:
                self._kept.append((until, delivery))
        return taken

    def take_all(self) -> list[Delivery]:
        """Return all deliveries, to be released."""
        kept, self._kept = self._kept, []
        return [delivery for _, delivery in kept]

    def __bool__(self) -> bool:
        return bool(self._kept)
