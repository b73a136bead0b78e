"""An inbox on Postgres: a channel on which the storage sends notifications."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

from uuid_utils import uuid7

from qtasks_core import Inbox, Task
from qtasks_core.errors import Closed, Unavailable, WireError
from qtasks_core.receivers import Awaited, Shielded
from qtasks_core.records import FIRST_FINAL, RANKS
from qtasks_core.wire import decode_task
from qtasks_postgres.batches import slices
from qtasks_postgres.connection import Database, Listener, storable

ADDRESS = "qtasks:"
"""The start of every inbox's address. The address is also the name of its channel."""

# This writes into the row that a save of the task must lock. So either the save sees the watcher,
# or the read that follows sees the save. Before the first save, it creates a row without a record.
# Every save may replace such a row.
WATCH = f"""
    INSERT INTO qtasks.records AS stored (namespace, uuid, progress, created_at, watchers)
    SELECT $1, uuid, 0, extract(epoch FROM clock_timestamp()), ARRAY[$3::text]
    FROM unnest($2::text[]) AS watched (uuid)
    ON CONFLICT (namespace, uuid) DO UPDATE SET watchers = array_append(stored.watchers, $3)
    WHERE stored.progress & {RANKS - 1} < {FIRST_FINAL}
        AND NOT $3 = ANY(coalesce(stored.watchers, '{{}}'))
"""
# If a task was never saved and nobody waits for it any more, its row is deleted.
UNWATCH = """
    UPDATE qtasks.records SET watchers = array_remove(watchers, $3)
    WHERE namespace = $1 AND uuid = ANY($2::text[]) AND record IS NULL
"""
CLEAR = """
    DELETE FROM qtasks.records
    WHERE namespace = $1 AND uuid = ANY($2::text[]) AND record IS NULL
        AND coalesce(cardinality(watchers), 0) = 0
"""


class PostgresInbox(Inbox):
    """A channel of this inbox on the storage's listening connection."""

    HEARTBEAT = 3.0
    """Seconds of silence after which a waiting inbox checks that the server still answers."""

    READ_AGAIN = 5.0
    """Seconds after which it reads all records that it waits for.

    A process may have saved a record and died before it could push it. If reading takes long, the
    pause is twenty times as long as it took.
    """

    def __init__(
        self,
        finals: Callable[[Sequence[str]], Awaitable[list[Task | None]]],
        database: Database,
        listener: Listener,
        namespace: str,
    ) -> None:
        self._finals = finals
        self._database = database
        self._listener = listener
        self._namespace = namespace
        self._address = ADDRESS + str(uuid7())
        self._awaited = Awaited()
        self._large: list[str] = []
        self._missed = False
        self._loop = asyncio.get_running_loop()
        self._read_at = self._loop.time() + self.READ_AGAIN
        self._bell = asyncio.Event()
        self._catching_up: Shielded[None] = Shielded()
        self._open = True

    async def open(self) -> None:
        """Listen to the address. Raises `Unavailable`."""
        await self._listener.listen([self._address], self._heard)

    @property
    def address(self) -> str:
        return self._address

    def expect(self, uuids: Iterable[str]) -> None:
        self._awaited.expect(uuids)

    async def watch(self, uuids: Sequence[str]) -> None:
        self._awaited.watch(uuids)
        try:
            await self._listener.ensure()
            await self._register(uuids)
        except BaseException:
            self._missed = True
            raise
        finally:
            self._bell.set()

    async def _register(self, uuids: Sequence[str]) -> None:
        """Make saves of these tasks push their records to this inbox, then read once."""
        keys = sorted({storable(uuid) for uuid in uuids})
        for some in slices(keys):
            await self._database.fetch(WATCH, self._namespace, some, self._address)
        await self._read(uuids)

    def forget(self, uuids: Iterable[str]) -> None:
        self._awaited.forget(uuids)
        if self._awaited.to_unwatch:
            self._bell.set()

    async def receive(self) -> list[Task]:
        while self._open:
            await self._catching_up.run(self._catch_up)
            if arrived := self._awaited.take():
                return arrived
            if not self._open:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(self.HEARTBEAT if self._awaited.uuids else None):
                    await self._bell.wait()
        raise Closed("the inbox is closed")

    async def _catch_up(self) -> None:
        """Make sure to be connected, and read the records that no notification has brought."""
        told = self._bell.is_set()
        self._bell.clear()
        await self._listener.ensure()
        await self._unwatch()
        if self._missed:
            self._missed = False
            try:
                await self._register(list(self._awaited.watched))
                await self._read(list(self._awaited.expected))
            except BaseException:
                self._missed = True
                raise
        elif self._large:
            await self._read(self._large[:])
        elif not told and self._awaited.uuids:
            await self._listener.ping()
        if self._loop.time() >= self._read_at:
            await self._read_again()

    async def _read_again(self) -> None:
        begun = self._loop.time()
        await self._read(list(self._awaited.uuids))
        now = self._loop.time()
        self._read_at = now + max(self.READ_AGAIN, 20 * (now - begun))

    async def _read(self, uuids: Sequence[str]) -> None:
        self._awaited.arrive(await self._finals(uuids))
        read = set(uuids)
        self._large = [uuid for uuid in self._large if uuid not in read]

    async def close(self) -> None:
        self._open = False
        self._bell.set()
        await self._catching_up.finish()
        self._awaited.forget(self._awaited.watched)
        with suppress(Closed, Unavailable):  # the remaining rows are few and small
            await self._unwatch()
        await self._listener.forget([self._address], self._heard)

    async def _unwatch(self) -> None:
        """Remove what `watch` has written for tasks that nobody waits for any more."""
        left = sorted(self._awaited.to_unwatch)
        for some in slices(sorted({storable(uuid) for uuid in left})):
            await self._database.fetch(UNWATCH, self._namespace, some, self._address)
            await self._database.fetch(CLEAR, self._namespace, some)
        self._awaited.to_unwatch.difference_update(left)
        # A task that was watched again meanwhile may have lost its row.
        self._missed = self._missed or not self._awaited.watched.isdisjoint(left)

    def _heard(self, payload: str | None) -> None:
        if payload is None:
            self._missed = True
        elif payload.startswith("="):
            try:
                self._awaited.arrive([decode_task(b64decode(payload[1:]))])
            except WireError:
                self._missed = True  # so that it reads all: the uuid is unreadable too
        else:
            self._large.append(payload[1:])
        self._bell.set()
