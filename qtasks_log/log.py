"""The contract of a Log: what `LogStorage` needs from Kafka, RabbitMQ streams or similar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from msgspec import Struct

from qtasks_core import Guarantees


class Entry(Struct, frozen=True, gc=False):
    """One keyed record of a log. `value` None is a tombstone: the key is not needed any more.

    `partition_key` is what the entry belongs to: a uuid, or the key of a value or claim. Entries
    with the same partition key keep their order.
    """

    partition_key: str
    key: str
    value: bytes | None


class Replaced(Exception):
    """`Log.read` cannot go on: entries that it has not returned are gone, or it is another log."""


class Log(ABC):
    """An append-only, durable log of one namespace. Every process reads it from its beginning.

    A process that has kept what it read before goes on at its old position.

    A log lives on one event loop. It raises `Unavailable` like a broker, and reconnects when it is
    called again. Then reading continues after the last returned entry. A log may compact: it
    removes entries whose key comes again later. It must not remove entries that a running reader is
    about to read: `read` raises `Replaced` if that may have happened. It removes nothing else,
    whatever its age: a reader that starts later needs it.
    """

    @property
    @abstractmethod
    def guarantees(self) -> Guarantees:
        """What the log promises, as the guarantees of a storage."""

    @property
    @abstractmethod
    def compacts(self) -> bool:
        """Whether the log removes entries that have a later entry with the same key.

        Only then is a tombstone worth an append. Writers send one for each proposal that lost or
        was superseded.
        """

    @abstractmethod
    async def migrate(self, namespace: str) -> list[str]:
        """Create or update what the log of a namespace needs, as `Storage.migrate` says."""

    @abstractmethod
    async def start(self, namespace: str) -> None:
        """Connect, create the log if it is missing, and open it for reading from its beginning.

        Reading starts at the beginning even if this object was started and stopped before.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Close connections. Idempotent."""

    @abstractmethod
    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        """Append entries in order. They are durable when it returns. A retry appends them again.

        Returns for each entry None, or why the log will never accept it, for example because of its
        size. A refused entry does not prevent the others from being appended.

        One call appends each entry once. If a driver resends by itself, it must do so idempotently:
        otherwise compaction would move a record behind its rivals. After an error, some entries may
        have been appended: for each partition key, any number from the first on.
        """

    @abstractmethod
    async def read(self) -> list[Entry]:
        """Wait for at least one more entry. Return the available entries in the log's order.

        At most some 2,000 at a time: the caller keeps them in memory. One call at a time.
        Cancelling it skips nothing. Raises `Replaced` if the caller has to forget all that it has
        read, and must `seek`.
        """

    @property
    @abstractmethod
    def position(self) -> bytes:
        """The position after the last entry that `read` has returned, for `seek`.

        Some hundred bytes. It also says which log it belongs to.
        """

    @abstractmethod
    async def seek(self, position: bytes | None) -> bool:
        """Go on reading at a position of this log, perhaps of another process; None: its beginning.

        Return whether that is possible. It is not if the position is of another log, or if a reader
        there would miss entries or tombstones. Then reading goes on at the beginning.
        """

    @abstractmethod
    async def mark(self) -> object:
        """Return a position after every entry that some reader has returned before this call began.

        Every other call that writes reads its own entries back before it returns.

        Every `get` waits for a mark. So this call must not queue behind a `read` that waits for
        entries.
        """

    @abstractmethod
    def reached(self, mark: object) -> bool:
        """Say whether `read` has returned every entry before `mark`.

        It may become true when `read` returns an empty list. `read` returns one for no other
        reason.
        """
