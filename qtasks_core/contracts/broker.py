"""The contract of a Broker: it moves messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from qtasks_core.contracts.subscription import Subscription
from qtasks_core.errors import NotSupported
from qtasks_core.schemas import Command, Guarantees, Outcome, QueueDepth, TaskMessage

if TYPE_CHECKING:
    from qtasks_core.contracts.composition import Composition
    from qtasks_core.contracts.storage import Storage


class Broker(ABC):
    """Moves messages from publishers to receivers, each message to one receiver at a time.

    A broker lives on one event loop, from `start` to `stop`; outside of that its methods raise
    `Closed`. They may run concurrently, and one that is cancelled has had its effect or not, harms
    no other and may be called again. Every broker's constructor takes `lease=` (seconds).

    Each call that needs an answer, `publish` included, raises `Unavailable` within a few seconds
    while the server is away; a frozen server is away. A call made when the server is back succeeds:
    it reconnects, or waits for the reconnect, within its own timeout. Repeating and backing off is
    the engine's.

    Namespaces and queues have names of `qtasks_core.names`, which the engine has checked;
    a uuid or an address is 1 to 200 characters of any script (`is_id`), up to 800 bytes.
    A fork's child never touches a broker that its parent has started: it builds another, and the
    engine has cut the connections that it inherited. What else must not cross a fork, such as the
    locks of an open file, the part itself gives up in the child.
    """

    driver_loggers: ClassVar[tuple[str, ...]] = ()
    """The names of the driver's loggers: the engine keeps them quiet while it is used."""

    @property
    @abstractmethod
    def guarantees(self) -> Guarantees:
        """What this instance promises; what only the server knows is filled in by `start`."""

    @abstractmethod
    async def start(self, namespace: str) -> None:
        """Connect and create what the server must have. May be called again after it raised.

        Brokers of different namespaces on one server share nothing. Raises `Unavailable`,
        `ConfigurationError`, `MissingDriver`, `ServerTooOld`.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Close all subscriptions and connections. Idempotent."""

    @abstractmethod
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        """Enqueue messages and return an outcome for each, durable when it returns.

        A message becomes receivable `message.delay` seconds after the server has it, however long
        the delay. Where the server has no timer, it keeps the message with the time at which it is
        due, and any receiver may move it then: the publisher may be gone.

        With `transaction` it becomes durable and visible at its commit; a part whose guarantees say
        that it cannot join one raises `NotSupported`. Publishing the same uuid again is safe: at
        worst it is delivered twice. A broker may drop the repeat only where the `submission` is the
        same too.
        """

    @abstractmethod
    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        """Open a subscription to `queues`, each with the most that is wanted of it at once.

        These numbers are no limits on what may be held: a broker may use them to size what it
        fetches ahead. The limits are those of each `receive`.
        """

    async def clock(self) -> float | None:
        """Return the server's Unix time, in seconds; None where it does not tell.

        All processes of an app ask the same servers, so by this they compare times that one of
        them has set, whatever their own clocks show. Raises `Unavailable`.
        """
        return None

    async def depth(self, queue: str) -> QueueDepth:
        """Count what is in a queue, as far as the transport knows; a queue never used is empty."""
        raise NotSupported(f"{type(self).__name__} cannot tell the depth of a queue yet")

    async def purge(self, queue: str) -> int:
        """Drop what is in a queue and not in flight, delayed messages included.

        Returns how many, -1 where unknown. What is published meanwhile may stay or go.
        """
        raise NotSupported(f"{type(self).__name__} cannot purge a queue yet")

    async def broadcast(self, command: Command) -> None:
        """Send a command to every worker of the namespace that listens when this is called."""
        raise NotSupported(f"{type(self).__name__} has no control channel yet")

    def commands(self) -> AsyncIterator[Command]:
        """Iterate over the commands that are broadcast from about the first step on, in order.

        Each call listens for itself. A cancelled step ends the iteration, which frees what it held;
        a step raises `Unavailable`, after which one listens anew, and `Closed` when the broker
        stops.
        """
        raise NotSupported(f"{type(self).__name__} has no control channel yet")

    async def migrate(self, namespace: str) -> list[str]:
        """Create or update what the server must have for a namespace, before workers use it.

        Returns what was created or changed, in words for an operator; empty: nothing had to be.

        Works on a broker that is not started, which stays so, and on a started one, whatever
        namespace that has: with its own connection, which is closed again. Afterwards
        `start(namespace)` has nothing to add. Idempotent, and safe while others migrate or work.
        Raises what `start` does.
        """
        raise NotSupported(f"{type(self).__name__} has nothing to migrate yet")

    def join(self, storage: Storage) -> Composition | None:
        """Return a joint composition with `storage`, if this broker has one with it.

        Each of its steps is one transaction of a server that both are on. Without one, None, the
        engine uses both halves in an order that loses nothing: see `qtasks_core.separate`.
        """
        return None
