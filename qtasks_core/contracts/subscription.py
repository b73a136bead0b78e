"""The contract of a Subscription: one receiver's hold on its deliveries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from qtasks_core.schemas import Delivery, Outcome, Settlement


class Subscription(ABC):
    """Receives deliveries, each held under a lease until it is settled.

    One call of `receive` at a time; `settle` and `extend` may run beside it and each other.
    The lease is the receiver's, not the queue's: another on the same queue may have a longer one.
    A receiver that dies, or is stopped for longer, loses its deliveries to others within the lease.
    One that runs and does not extend may keep them: a lease can be that of its connection.
    """

    @abstractmethod
    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        """Wait for at least one delivery and return what is there.

        What is there of a queue that `wanted` names first comes first: none has to wait for the
        backlog of another. At most `wanted[queue]` of each queue and `limit` in all, also when an
        earlier call that asked for more was cancelled: what is over stays for a later call. Waits
        without polling the server. Cancelling it strands nothing: what the server has handed over
        by then is returned by the next call, or released by `close`. Raises `Unavailable`; the next
        call reconnects.
        """

    @abstractmethod
    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Acknowledge, retry or release deliveries; an outcome for each.

        `refused` when the lease was lost: then nothing is changed, also where the server lets any
        old holder acknowledge (`docs/backends.md` has the recipe). It is lost once another receiver
        has the delivery: an overdue settle may be `done` until then. `unknown` where the server
        gives no answer. Settling again what this subscription settled lately is `done`, also when
        the call was cancelled. Of two that differ only one is obeyed, and the other is not `done`.
        A retry never loses the message. Where the guarantees do not say `atomic_retries`, a crash
        or a cancel between the new one and the end of the old leaves both, and each further try
        that is cut off may add one.
        """

    @abstractmethod
    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        """Renew leases. For each: the delivery while it is still mine, None when it is lost.

        May hand back a replacement with a new fence; settling the old one then follows it.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop receiving; what the server handed over and `receive` has not returned is released.

        A waiting `receive` raises `Closed`. What was returned may still be settled and extended,
        until the broker stops; with the last of it the subscription's resources are freed.
        Idempotent.
        """
