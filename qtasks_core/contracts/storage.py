"""The contract of a Storage: it remembers tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from msgspec import UNSET, UnsetType

from qtasks_core.contracts.inbox import Inbox
from qtasks_core.schemas import Claim, Guarantees, Outcome, Task, TaskPage, TaskQuery


class Storage(ABC):
    """Keeps the newest record of each task, and notifies inboxes when a record is final.

    A storage lives on one event loop, like a broker. The same rules hold for `Unavailable`,
    `NotSupported`, names and forks. Only `start`, `stop`, `save`, `get` and `inbox` must work
    everywhere. The key of a value has 1 to 200 characters of any script. The same holds for the key
    and owner of a claim. `qtasks_core.names.checked_id` refuses others. If a storage supports
    `expire`, its constructor takes `retention=` (seconds, None means for ever). That applies to
    records without a retention.
    """

    driver_loggers: tuple[str, ...] = ()
    """The same as for a `Broker`."""

    @property
    @abstractmethod
    def guarantees(self) -> Guarantees:
        """What this instance promises. `start` fills in the facts that only the server knows.

        `refresh` reads them again.
        """

    @abstractmethod
    async def start(self, namespace: str) -> None:
        """Connect, and create on the server everything that the storage needs.

        May be called again after it raised.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Close all inboxes and connections. Idempotent."""

    @abstractmethod
    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        """Save records in order and return an outcome for each.

        The records are durable when the call returns. The order of records
        (`qtasks_core.records.judge`) decides which of them are accepted, atomically for each
        record. A first record never replaces another. `refused` carries the existing record.

        An accepted final record is made durable. Then it is pushed to its `reply_to` and to every
        inbox that watches its uuid. If the saving process dies between the two, the inboxes still
        get the record: from the server, or because an inbox reads again now and then. A `reply_to`
        that is not an address of this storage is ignored.
        """

    @abstractmethod
    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        """Return the newest record of each uuid, or None if it has none.

        Sees every save that returned before this call began, from any process.

        A record with unreadable bytes does not hide other records. In its place, `get` returns the
        result of `qtasks_core.records.unreadable`, made of the data that is stored beside the
        bytes. A log stores nothing beside them, so there such a record counts as never saved.
        """

    @abstractmethod
    async def inbox(self) -> Inbox:
        """Open an inbox. Its address is ready to be used in messages."""

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
    async def query(self, query: TaskQuery) -> TaskPage:
        """List records, newest first (by `created_at`, then uuid), one page at a time.

        Each page is full, except the last. Following the cursor shows each record once, if it
        existed at the first page and still matches. Saves in the meantime do not change that.
        Raises `Refused` if the cursor is invalid.
        """

    @abstractmethod
    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        """Hold `key` for `ttl` seconds. Return None while another owner holds it.

        When the same owner claims again, it holds the key for `ttl` seconds from then on.
        """

    @abstractmethod
    async def release(self, claim: Claim) -> None:
        """Release a claim's key. Harmless if its owner has lost it."""

    @abstractmethod
    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        """Set a small shared value if it is `expect` now, and return whether it was.

        `value=None` deletes. Comparing and setting are one step among all processes. With
        `expect=None`, the key must have no value now. Without `expect`, the current value does not
        matter.
        """

    @abstractmethod
    async def get_value(self, key: str) -> bytes | None:
        """Return a shared value, or None if there is none."""

    @abstractmethod
    async def values(self, prefix: str) -> dict[str, bytes]:
        """Return the shared values whose key starts with `prefix`, by key."""

    @abstractmethod
    def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        """Iterate over a shared value: its current value, then its new value after a change.

        If changes follow in quick succession, only the last one is certain to be seen. Steps are
        cancelled and fail as those of `Broker.commands`.
        """

    @abstractmethod
    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        """Append progress or streamed results to a task, in order and all at once.

        The items are kept apart from the record and are deleted with it. The record need not exist
        yet.
        """

    @abstractmethod
    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        """Return the appended items after position `after`, with their positions.

        Positions are 1 or more and rise in the order of appending, so 0 asks for all items. They
        may have gaps.
        """

    @abstractmethod
    async def delete(self, uuids: Sequence[str]) -> int:
        """Delete records of any status, and the items that were appended to them.

        Returns how many of the records existed.
        """

    @abstractmethod
    async def expire(self) -> int:
        """Delete the final records whose retention has passed, and return their number.

        The retention is that of the record, or else that of the storage, in seconds from
        `finished_at` (`qtasks_core.records.expiry_of`). If a storage supports `expire`, such a
        record counts as deleted from then on. It does not matter whether `expire` was called since.
        At most 10 s later, `get` does not find the record, and a first record may take its place.
        """

    @abstractmethod
    async def migrate(self, namespace: str) -> list[str]:
        """Create or update everything that a namespace needs on the server, before workers use it.

        Returns a line for each thing that was created or changed, in words for an operator. The
        list is empty if nothing had to change.

        The storage may be started or not, and stays so. A started storage may have any namespace.
        The call uses its own connection and closes it again. Afterwards `start(namespace)` has
        nothing to add. Idempotent, and safe while other processes migrate or work. Raises the same
        errors as `start`.
        """
