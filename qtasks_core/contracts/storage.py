"""The contract of a Storage: it remembers tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

from msgspec import UNSET, UnsetType

from qtasks_core.contracts.inbox import Inbox
from qtasks_core.errors import NotSupported
from qtasks_core.schemas import Claim, Guarantees, Outcome, Task, TaskPage, TaskQuery


class Storage(ABC):
    """Keeps the newest record of each task, and tells inboxes when one is final.

    Lives on one event loop like a broker, with the same rules for `Unavailable`, names and forks.
    The key of a value, and the key and the owner of a claim, are 1 to 200 characters of any script;
    `qtasks_core.names.checked_id` refuses others. The constructor of one that supports `expire`
    takes `retention=` (seconds, None for ever), for records that do not say it.
    """

    driver_loggers: ClassVar[tuple[str, ...]] = ()
    """As those of a `Broker`."""

    @property
    @abstractmethod
    def guarantees(self) -> Guarantees:
        """What this instance promises; what only the server knows is filled in by `start`."""

    @abstractmethod
    async def start(self, namespace: str) -> None:
        """Connect and create what the server must have. May be called again after it raised."""

    @abstractmethod
    async def stop(self) -> None:
        """Close all inboxes and connections. Idempotent."""

    @abstractmethod
    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        """Save records in order and return an outcome for each, durable when it returns.

        Which are taken is the order of records (`qtasks_core.records.judge`), decided atomically
        for each record: a first record never replaces another. `refused` carries what is there. A
        final record that is taken is pushed to its `reply_to` and to every inbox that watches its
        uuid, after it is durable. Should the saver die between the two, they hear all the same:
        from the server, or because an inbox reads again now and then. A `reply_to` that is no
        address of this storage is passed over.
        """

    @abstractmethod
    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        """Return the newest record of each uuid, None where there is none.

        Sees every save that returned before this call began, from any process. A record whose bytes
        cannot be read hides no other: it is what `qtasks_core.records.unreadable` makes of what is
        known beside them. In a log, which knows nothing beside them, it never was.
        """

    @abstractmethod
    async def inbox(self) -> Inbox:
        """Open an inbox; its address is ready to be used in messages."""

    async def clock(self) -> float | None:
        """Return the server's Unix time, in seconds; None where it does not tell.

        All processes of an app ask the same servers, so by this they compare times that one of
        them has set, whatever their own clocks show. Raises `Unavailable`.
        """
        return None

    async def query(self, query: TaskQuery) -> TaskPage:
        """List records, newest (`created_at`, then uuid) first, a page at a time.

        A page is full unless it is the last. Following the cursor shows each record that was there
        at the first page, and still fits, once, whatever is saved meanwhile. Raises `Refused` for a
        cursor that is none.
        """
        raise NotSupported(f"{type(self).__name__} cannot list records yet")

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        """Hold `key` for `ttl` seconds; None while another owner holds it.

        The owner itself claims again to hold it for `ttl` seconds from then on.
        """
        raise NotSupported(f"{type(self).__name__} has no claims yet")

    async def release(self, claim: Claim) -> None:
        """Let go of a claim's key; harmless when its owner has lost it."""
        raise NotSupported(f"{type(self).__name__} has no claims yet")

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        """Set a small shared value (None deletes) if it is `expect` now; say whether it was.

        Compared and set in one step among all processes. `expect=None`: if there is none now;
        without `expect`: whatever is there.
        """
        raise NotSupported(f"{type(self).__name__} has no shared values yet")

    async def get_value(self, key: str) -> bytes | None:
        """Return a shared value, None where there is none."""
        raise NotSupported(f"{type(self).__name__} has no shared values yet")

    async def values(self, prefix: str) -> dict[str, bytes]:
        """Return the shared values whose key starts with `prefix`, by key."""
        raise NotSupported(f"{type(self).__name__} has no shared values yet")

    def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        """Iterate over a shared value: as it is now, then as it is after a change.

        Of changes in quick succession only the last is sure to be seen. Steps are cancelled and
        fail as those of `Broker.commands`.
        """
        raise NotSupported(f"{type(self).__name__} has no shared values yet")

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        """Append progress or streamed results to a task, in order and all at once.

        They are kept apart from the record, which need not be there yet, and are deleted with it.
        """
        raise NotSupported(f"{type(self).__name__} keeps no streams yet")

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        """Return the appended items behind position `after`, with their positions.

        Positions are 1 or more and rise in the order of appending, so 0 asks for all. They need not
        be dense.
        """
        raise NotSupported(f"{type(self).__name__} keeps no streams yet")

    async def delete(self, uuids: Sequence[str]) -> int:
        """Delete records, whatever their status, and what was appended to them.

        Returns how many there were.
        """
        raise NotSupported(f"{type(self).__name__} cannot delete records yet")

    async def expire(self) -> int:
        """Delete the final records whose retention has passed; return how many.

        That is the record's own, else the storage's, in seconds from `finished_at`
        (`qtasks_core.records.expiry_of`). Where there is an `expire`, such a record counts as gone
        from then on, whether it has been called since or not: at most 10 s later `get` does not
        find it, and a first record may take its place.
        """
        raise NotSupported(f"{type(self).__name__} cannot expire records yet")

    async def migrate(self, namespace: str) -> list[str]:
        """Create or update what the server must have for a namespace, before workers use it.

        Returns what was created or changed, in words for an operator; empty: nothing had to be.

        Works on a storage that is not started, which stays so, and on a started one, whatever
        namespace that has: with its own connection, which is closed again. Afterwards
        `start(namespace)` has nothing to add. Idempotent, and safe while others migrate or work.
        Raises what `start` does.
        """
        raise NotSupported(f"{type(self).__name__} has nothing to migrate yet")
