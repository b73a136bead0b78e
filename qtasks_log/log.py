"""The contract of a Log: what `LogStorage` asks of Kafka, RabbitMQ streams or the like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from msgspec import Struct

from qtasks_core import Guarantees


class Entry(Struct, frozen=True, gc=False):
    """One keyed record of a log. `value` None is a tombstone: the key is not needed any more.

    `partition_key` is the uuid it belongs to: entries of equal partition key keep their order.
    """

    partition_key: str
    key: str
    value: bytes | None


class Log(ABC):
    """An append-only, durable log of one namespace, read from its beginning by every process.

    Lives on one event loop. Raises `Unavailable` like a broker, and reconnects when called again;
    then reading goes on behind the last entry that was returned. It may compact, that is remove
    entries whose key comes again later, but not what a running reader is about to read.
    """

    @property
    @abstractmethod
    def guarantees(self) -> Guarantees:
        """What the log promises, as a storage's guarantees."""

    @property
    @abstractmethod
    def compacts(self) -> bool:
        """Whether it removes entries that have a later one under their key.

        Only then is a tombstone worth an append: writers send one for each proposal that lost or
        was superseded.
        """

    @abstractmethod
    async def start(self, namespace: str) -> None:
        """Connect, create the log where it is missing, and open it for reading from its start.

        From its start also if this object was started and stopped before.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Close connections. Idempotent."""

    @abstractmethod
    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        """Append entries in order; durable when it returns. Repeating it appends them again.

        For each entry: None, or why the log will never take it, for instance because of its size.
        One that is refused keeps none of the others from being appended.

        One call appends each entry once: a driver that sends again by itself must do it
        idempotently, since compaction would otherwise move a record behind its rivals. When it
        raises, of the entries of one partition key any first part may have been appended.
        """

    @abstractmethod
    async def read(self) -> list[Entry]:
        """Wait for at least one further entry and return what is there, in the log's order.

        One call at a time. Cancelling it skips nothing.
        """

    @abstractmethod
    async def mark(self) -> object:
        """Return a position behind every append that returned before this call began.

        Every `get` waits for one, so it must not queue behind a `read` that waits for entries.
        """

    @abstractmethod
    def reached(self, mark: object) -> bool:
        """Say whether `read` has returned everything in front of `mark`.

        May become true with a `read` that returns an empty list: the only time it does.
        """
