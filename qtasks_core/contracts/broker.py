"""The contract of a Broker: it moves messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qtasks_core.contracts.subscription import Subscription
from qtasks_core.schemas import Command, Guarantees, Outcome, QueueDepth, TaskMessage

if TYPE_CHECKING:
    from qtasks_core.contracts.composition import Composition
    from qtasks_core.contracts.storage import Storage


class Broker(ABC):
    """Moves messages from publishers to receivers. A message has one receiver at a time.

    A broker lives on one event loop, from `start` to `stop`. Before and after that, its methods
    raise `Closed`. The methods may run concurrently. A cancelled call may or may not have had its
    effect. It does not harm other calls, and the caller may make it again. Every broker's
    constructor takes `lease=` (seconds).

    A method that the transport cannot do raises `NotSupported`, and `guarantees.unsupported` names
    it. Only `start`, `stop`, `publish` and `subscribe` must work everywhere.

    Each call that needs an answer, including `publish`, raises `Unavailable` within a few seconds
    while the server is away. A frozen server counts as away. A call made when the server is back
    succeeds: it reconnects, or waits for the reconnect, within its own timeout. The engine does the
    retries and the backoff.

    Namespaces and queues have names as `qtasks_core.names` allows them. The engine has checked
    them. A uuid or an address has 1 to 200 characters of any script (`is_id`), up to 800 bytes.

    The child of a fork never uses a broker that its parent has started. It builds a new one. The
    engine has cut the connections that the child inherited. Some other resources must not cross a
    fork either, such as the locks of an open file. The broker itself gives these up in the child.
    """

    driver_loggers: tuple[str, ...] = ()
    """The names of the driver's loggers. The engine keeps them quiet while the broker is in use."""

    @property
    @abstractmethod
    def guarantees(self) -> Guarantees:
        """What this instance promises. `start` fills in the facts that only the server knows.

        `refresh` reads them again.
        """

    @abstractmethod
    async def start(self, namespace: str) -> None:
        """Connect, and create on the server everything that the broker needs.

        May be called again after it raised. Brokers of different namespaces on one server share
        nothing. Raises `Unavailable`, `ConfigurationError`, `MissingDriver`, `ServerTooOld`.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Close all subscriptions and connections. Idempotent."""

    @abstractmethod
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        """Enqueue messages and return an outcome for each.

        The messages are durable when the call returns. A message becomes receivable `message.delay`
        seconds after the server receives it. The delay can be of any length. A server without a
        timer keeps the message with its due time. Any receiver may move the message then, because
        the publisher may be gone.

        With `transaction`, the messages become durable and visible when the transaction commits. A
        broker whose guarantees say that it cannot join a transaction raises `NotSupported`.

        Publishing the same uuid again is safe: at worst the message is delivered twice. A broker
        may drop the second message only if its `submission` is the same too.
        """

    @abstractmethod
    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        """Open a subscription to `queues`. A number is the most that is wanted of a queue at once.

        The numbers do not limit how many deliveries may be held. A broker may use them to size its
        prefetch. The arguments of each `receive` are the limits.
        """

    async def clock(self) -> float | None:
        """Return the server's Unix time, in seconds. None: the server does not tell it.

        All processes of an app ask the same servers. So they use this clock to compare times that
        one of them has set, whatever their own clocks show. Raises `Unavailable`.
        """
        return None

    async def refresh(self) -> None:
        """Read again what `guarantees` depends on: a server's settings may change after `start`.

        By default it does nothing, for guarantees that no setting changes. Raises `Unavailable`.
        """
        return

    @abstractmethod
    async def depth(self, queue: str) -> QueueDepth:
        """Count the messages in a queue, as far as the transport knows. A new queue is empty."""

    @abstractmethod
    async def purge(self, queue: str) -> int:
        """Drop the messages of a queue that are not in flight, including delayed messages.

        Returns the number of dropped messages, or -1 if it is unknown. Messages that are published
        during the call may stay or be dropped.
        """

    @abstractmethod
    async def broadcast(self, command: Command) -> None:
        """Send a command to every worker of the namespace that listens at the time of the call."""

    @abstractmethod
    def commands(self) -> AsyncIterator[Command]:
        """Iterate in order over the commands that are broadcast from about the first step on.

        Each call listens independently. Cancelling a step finishes the iteration and frees its
        resources. A step raises `Unavailable`; the caller then calls `commands` again. A step
        raises `Closed` when the broker stops.
        """

    @abstractmethod
    async def migrate(self, namespace: str) -> list[str]:
        """Create or update everything that a namespace needs on the server, before workers use it.

        Returns a line for each thing that was created or changed, in words for an operator. The
        list is empty if nothing had to change.

        The broker may be started or not, and stays so. A started broker may have any namespace. The
        call uses its own connection and closes it again. Afterwards `start(namespace)` has nothing
        to add. Idempotent, and safe while other processes migrate or work. Raises the same errors
        as `start`.
        """

    def join(self, storage: Storage) -> Composition | None:
        """Return a joint composition with `storage`, or None if this broker has none with it.

        Each step of a joint composition is one transaction on the server that both use. Without
        one, the engine writes to the broker and the storage in an order that loses nothing. See
        `qtasks_core.separate`.
        """
        return None
