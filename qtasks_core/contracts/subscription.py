"""The contract of a Subscription: how one receiver holds its deliveries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from qtasks_core.schemas import Delivery, Outcome, Settlement


class Subscription(ABC):
    """Receives deliveries, and holds each of them under a lease until it is settled.

    Only one `receive` runs at a time. `settle` and `extend` may run beside it and beside each
    other.

    The lease belongs to the receiver, not to the queue: another receiver of the queue may have a
    longer one. If a receiver dies, or is stopped for longer than the lease, others get its
    deliveries within the lease. A receiver that runs but does not extend may keep them: a lease can
    last as long as the connection.
    """

    @abstractmethod
    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        """Wait for at least one delivery, and return those that are available.

        Messages of the queues that `wanted` names first come first. So they do not wait for the
        backlog of another queue. Returns at most `wanted[queue]` deliveries of each queue, and
        `limit` in total. These limits also hold after a cancelled call that asked for more: the
        rest stays for a later call.

        Waits without polling the server. Cancelling a call loses no delivery: if the server has
        handed it over, the next call returns it or `close` releases it. Raises `Unavailable`; the
        next call reconnects.
        """

    @abstractmethod
    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Acknowledge, retry or release deliveries. Return an outcome for each.

        A settlement is `refused` if the lease was lost. Then nothing is changed, even if the server
        lets any old holder acknowledge (`docs/backends.md` has the recipe). A lease is lost once
        another receiver has the delivery; until then, an overdue settle may be `done`. `unknown`
        means that the server gives no answer.

        Repeating a recent settlement of this subscription is `done`, even if the first call was
        cancelled. If two settlements of a delivery differ, only one takes effect, and the other is
        not `done`.

        A retry never loses the message. Without `atomic_retries` in the guarantees, the new message
        exists before the old one is removed. A crash or a cancel in between leaves both. Each
        further try that is cut off may add one.
        """

    @abstractmethod
    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        """Renew leases. Return each delivery while this subscription holds it, None for a lost one.

        May return a replacement with a new fence. Settling the old delivery then settles the
        replacement.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop receiving, and release the deliveries that `receive` has not returned yet.

        A waiting `receive` raises `Closed`. Returned deliveries may still be settled and extended
        until the broker stops. When the last of them is settled, the subscription's resources are
        freed. Idempotent.
        """
