"""An inbox in SQLite: a doorbell tells it which records to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Literal, Protocol, TypeAlias

from qtasks_core import Inbox, Task
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.receivers import Awaited
from qtasks_sqlite.connection import Database, Transaction, array
from qtasks_sqlite.doorbell import Bell

Which: TypeAlias = Literal["all", "begun", "final"]

_UNWATCH = """
DELETE FROM qtasks_watchers
WHERE namespace = ? AND uuid IN (SELECT value FROM json_each(?)) AND address = ?
"""


class Records(Protocol):
    """The methods of its storage that an inbox needs."""

    namespace: int

    def getting(
        self, uuids: Iterable[str], only: Which = "all"
    ) -> Callable[[Transaction], dict[str, Task]]:
        """Return the work that reads these records, or only some kind of them."""


class SqliteInbox(Inbox):
    """A bell whose letters name the records to read. The records themselves are in the file."""

    def __init__(
        self, storage: Records, database: Database, closed: Callable[[SqliteInbox], None]
    ) -> None:
        self._storage = storage
        self._database = database
        self._closed = closed
        """Called when the inbox closes."""
        self._bell = Bell(database.doorbell)
        self._awaited = Awaited()
        self._missed = False
        """A record may have been missed: read all awaited records."""
        self._open = True

    @property
    def address(self) -> str:
        return self._bell.address

    def expect(self, uuids: Iterable[str]) -> None:
        self._awaited.expect(uuids)

    async def watch(self, uuids: Sequence[str]) -> None:
        self._awaited.watch(uuids)
        try:
            await self._look(uuids)
        except Unavailable:
            self._missed = True
            raise
        finally:
            self._bell.wake()

    async def _look(self, watched: Iterable[str], others: Iterable[str] = ()) -> None:
        """Watch `watched`, and read them and `others`, in one transaction."""
        forgotten = list(self._awaited.to_unwatch)
        watch = self._watching(list(watched), forgotten)
        finals = self._storage.getting(others, "final")
        found = await self._database.write(lambda turn: watch(turn) | finals(turn))
        self._awaited.to_unwatch.difference_update(forgotten)
        self._awaited.arrive(found.values())

    def _watching(
        self, watched: Sequence[str], forgotten: Sequence[str]
    ) -> Callable[[Transaction], dict[str, Task]]:
        namespace, address = self._storage.namespace, self.address
        rows = [(namespace, uuid, address) for uuid in watched]
        finals = self._storage.getting(watched, "final")

        def watch(turn: Transaction) -> dict[str, Task]:
            into = "OR IGNORE INTO qtasks_watchers (namespace, uuid, address)"
            turn.insert(into, rows)
            found = finals(turn)
            over = [*found, *forgotten]
            if over:
                turn.execute(_UNWATCH, (namespace, array(over), address))
            return found

        return watch

    def forget(self, uuids: Iterable[str]) -> None:
        self._awaited.forget(uuids)

    async def receive(self) -> list[Task]:
        while self._open:
            if arrived := self._awaited.take():
                return arrived
            if self._missed or self._bell.flooded:
                await self._read_all()
            elif self._bell.letters:
                await self._read_named()
            else:
                await self._bell.wait()
        raise Closed("the inbox is closed")

    async def _read_all(self) -> None:
        """Read all awaited records, under the lock.

        If the ring of a writer was lost, that writer has committed by then.
        """
        self._missed, self._bell.flooded = True, False
        named = self._bell.letters.copy()
        await self._look(self._awaited.watched, self._awaited.expected)
        self._missed = False
        self._bell.letters -= named

    async def _read_named(self) -> None:
        """Read the records that letters name. Use the lock only for records that are missing."""
        named = self._bell.letters & self._awaited.uuids
        self._bell.letters &= named
        for attempt in (self._database.read, self._database.write):
            missing = named & self._awaited.uuids
            if missing:
                found = await attempt(self._storage.getting(missing, "final"))
                self._awaited.arrive(found.values())
        # If a record is still missing, the transaction that rang for it did not finish.
        self._bell.letters -= named

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._bell.wake()
        self._bell.close()
        self._closed(self)
        if self._awaited.watched or self._awaited.to_unwatch:
            # The next start deletes a row that stays: its address is gone.
            with suppress(Unavailable):
                await self._database.write(self._leaving())

    def _leaving(self) -> Callable[[Transaction], None]:
        def leave(turn: Transaction) -> None:
            turn.execute("DELETE FROM qtasks_watchers WHERE address = ?", (self.address,))

        return leave
