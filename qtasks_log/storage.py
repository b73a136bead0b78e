"""A storage on an append-only log: a save is a proposal, and reading it back decides who won."""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import Future
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TypeAlias

from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks_core import (
    DONE,
    Claim,
    Guarantees,
    Inbox,
    Outcome,
    Storage,
    Task,
    TaskPage,
    TaskQuery,
)
from qtasks_core.errors import Closed, Refused, Unavailable, WireError
from qtasks_core.names import checked_id
from qtasks_core.options import checked_retention
from qtasks_core.records import FINAL, RETENTION, expiry_of, refused_by, retention_note
from qtasks_core.transactions import refuse_transaction
from qtasks_log import listing, shared
from qtasks_log.entries import Content, Deletion, Items, Setting, decode, encode
from qtasks_log.inbox import Inboxes, LogInbox
from qtasks_log.log import Entry, Log
from qtasks_log.reader import Reader
from qtasks_log.store import MEMORY, Store
from qtasks_log.sweeper import Sweeper
from qtasks_log.table import Table
from qtasks_log.view import Change, Judged, View

logger = logging.getLogger("qtasks.log")

GRACE = 3600.0
"""Seconds after which `expire` discards deleted values and claims that are over, if the log
compacts. A proposal that follows such an entry arrives before: no call waits that long."""
_AT_ONCE = 1000
"""Deletions in one append."""
_NOTES = (
    "every process reads the whole log at its start; with `directory=`, only what came after its "
    "last stop",
    "a process has recent records in memory, and the others in a file of its own",
    "do not limit the age or the size of the log: it would lose records, values and claims",
    "the time of a claim counts from when a process reads it in the log, so the clocks of machines "
    "need not agree; a process that was just started may wait for the whole time before it takes "
    "over the claim of a dead owner",
)
_COMPACTS = "the log is compacted: deleted, expired and superseded records leave it after a while"
_GROWS = (
    "deleted and expired records leave memory and file, but not the log: it grows until it is "
    "deleted"
)


Append: TypeAlias = Callable[[Sequence[Entry]], Awaitable[list[str | None]]]
"""Appends entries, and returns why the log will never accept some of them, as `Log.append`."""


class LogStorage(Storage):
    """Keeps records in a log. Every process reads it from its beginning into its own view.

    Recent records stay in memory, up to `memory` bytes; the others are in a file. `directory` keeps
    that file, so that the next start goes on where this one has stopped. It belongs to one process
    at a time; others on the machine start with a copy. None: a temporary file.

    `retention` is in seconds, None means for ever. It applies to final records without a retention.
    All processes of an app must have the same one.
    """

    def __init__(
        self,
        log: Log,
        *,
        retention: float | None = RETENTION,
        directory: str | Path | None = None,
        memory: int = MEMORY,
    ) -> None:
        self._log = log
        self._retention = checked_retention(retention)
        self._directory = None if directory is None else Path(directory)
        self._memory = memory
        self._namespace = ""
        self._open = False
        self._reset()

    def _reset(self) -> None:
        self._store = self._new_store()
        self._reader = Reader(self._log, self._take, self._read_anew)
        self._inboxes = Inboxes(self._reader, self._records)
        self._watchers = shared.Watchers(self._reader)
        self._sweeper = Sweeper(self._log)
        self._saves: dict[str, tuple[Save, int, Task]] = {}
        self._changes: dict[str, Future[bool]] = {}
        """By key: the proposals, apart from saves, that are on their way through the log."""
        self.undecodable = 0
        """How many entries of the log were skipped because this release cannot read them."""

    def _new_store(self) -> Store:
        # Each proposal has a unique key. With one key for all repeats of a save, compaction would
        # keep the last repeat. A loser before that one would then win. When the log is read anew,
        # the keys begin anew too: what a half compacted log makes of old proposals is no reason to
        # write tombstones.
        self._writer = f"{uuid7().hex}."
        self._sequence = count()
        name = f"{self._log.guarantees.part}-{self._namespace}"
        table = Table(self._directory, name, f"{name} {self._retention}")
        return Store(table, retention=self._retention, memory=self._memory, failed=self._lose)

    @property
    def guarantees(self) -> Guarantees:
        told = self._log.guarantees
        return replace(
            told,
            retention=self._retention,
            notes=(
                *told.notes,
                retention_note(self._retention),
                *_NOTES,
                _COMPACTS if self._log.compacts else _GROWS,
            ),
        )

    async def start(self, namespace: str) -> None:
        """Connect and read the log to its end. From here on, this view judges as all others do."""
        self._namespace = namespace
        self._reset()
        self._open = True
        try:
            await self._log.start(namespace)
            position = await self._store.open()
            if position is not None and not await self._log.seek(position):
                logger.info("what was kept of the log is of no use, the log is read anew")
                await self._read_anew()
            await self._reader.catch_up()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._open:
            self._open = False
            await self._inboxes.close()
            await self._reader.stop()
            if self._reader.all_taken:
                # The end of the log may have been reached after the last entry was taken.
                self._store.reached(self._log.position)
            await self._store.close()
            await self._sweeper.stop()
        await self._log.stop()

    def _lose(self, error: BaseException) -> None:
        logger.warning("reading the log anew: %s", error)
        self._reader.lose(error)

    async def _read_anew(self) -> None:
        """Forget all that was read, and seek the beginning of the log."""
        error = Unavailable("the log is being read anew; try again")
        for save, _, _ in self._saves.values():
            save.fail(error)
        for change in self._changes.values():
            if not change.done():
                change.set_exception(error)
        self._saves.clear()
        self._changes.clear()
        await self._store.close(damaged=True)
        self._store = self._new_store()
        await self._store.open()
        await self._log.seek(None)

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        """Append a proposal for each task, and wait until all are read back and judged."""
        if transaction is not None:
            self._started()
            refuse_transaction(self)
        return await self.save_by(tasks, self._log.append)

    async def save_by(self, tasks: Sequence[Task], append: Append) -> list[Outcome]:
        """Save tasks, and let `append` append their proposals, for instance in a transaction.

        It gets an entry for each task, in order, and does what `Log.append` does.
        """
        self._started()
        outcomes: dict[int, Outcome] = {}
        missing: Mapping[int, Deletion | None] = dict.fromkeys(range(len(tasks)))
        while missing:
            save = await self._save(tasks, missing, append)
            append = self._log.append
            outcomes |= save.outcomes
            # What an expired record refused is saved again, behind the deletion of that record.
            missing = {at: save.expired[at] for at in sorted(save.expired)}
        return [outcomes[at] for at in range(len(tasks))]

    async def _save(
        self, tasks: Sequence[Task], missing: Mapping[int, Deletion | None], append: Append
    ) -> Save:
        save = Save(missing)
        entries: list[Entry] = []
        places: list[int | None] = []
        for at, deletion in missing.items():
            task = tasks[at]
            if deletion is not None:
                entries.append(self._entry(task.uuid, deletion))
                places.append(None)
            entry = self._entry(task.uuid, task)
            entries.append(entry)
            places.append(at)
            self._saves[entry.key] = save, at, task
        try:
            for place, refused in zip(places, await append(entries), strict=True):
                if refused is not None and place is not None:
                    save.set(place, Outcome("refused", refused))
            await self._reader.wait(save.judged)
            return save
        finally:
            for entry in entries:
                self._saves.pop(entry.key, None)

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        self._started()
        if uuids:
            await self._reader.catch_up()
        return await self._records(uuids)

    async def _records(self, uuids: Sequence[str]) -> list[Task | None]:
        """Return the records of uuids, as far as the log has been read."""
        records = (store := self._store).records
        await store.load(uuids, records)
        return [listing.record_of(records.get(uuid)) for uuid in uuids]

    async def inbox(self) -> Inbox:
        self._started()
        return LogInbox(self._inboxes)

    async def query(self, query: TaskQuery) -> TaskPage:
        store = await self._caught_up()
        return await store.page(query)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        checked_id(key, "the key of a claim")
        checked_id(owner, "the owner of a claim")
        claims = (store := await self._caught_up()).claims
        await store.load([key], claims)
        while (claiming := shared.claiming(claims, key, owner, ttl)) is not None:
            began = time.time()
            if await self._propose(key, claiming):
                return Claim(key, owner, began + ttl)
            await store.load([key], claims)
        return None

    async def release(self, claim: Claim) -> None:
        claims = (store := await self._caught_up()).claims
        await store.load([claim.key], claims)
        while (releasing := shared.releasing(claims, claim)) is not None:
            if await self._propose(claim.key, releasing):
                return
            await store.load([claim.key], claims)

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        checked_id(key, "the key of a value")
        values = (store := await self._caught_up()).values
        await store.load([key], values)
        while isinstance(setting := shared.setting(values, key, value, expect), Setting):
            if await self._propose(key, setting):
                return True
            await store.load([key], values)
        return setting

    async def get_value(self, key: str) -> bytes | None:
        checked_id(key, "the key of a value")
        store = await self._caught_up()
        return await self._value(store, key)

    async def _value(self, store: Store, key: str) -> bytes | None:
        await store.load([key], store.values)
        return shared.getting(store.values, key)

    async def values(self, prefix: str) -> dict[str, bytes]:
        store = await self._caught_up()
        return await store.values_beginning(prefix)

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        checked_id(key, "the key of a value")
        watchers = self._watchers  # a later start makes others
        await self._caught_up()
        seen: bytes | UnsetType | None = UNSET
        while True:
            rings = watchers.rings
            value = await self._value(self._store, key)
            if watchers is not self._watchers:
                raise Closed("LogStorage was stopped")
            if value != seen:
                seen = value
                yield value
            elif watchers.rings == rings:
                await watchers.wait(key)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        self._started()
        checked_id(uuid, "a uuid")
        if items:
            # Read back: behind an open transaction, an entry is durable before others can read it.
            await self._propose(uuid, Items(tuple(items), time.time()))

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        store = await self._caught_up()
        await store.load([uuid], store.records)
        items = [item for some in store.records.stream(uuid) for item in some.items]
        return list(enumerate(items, 1))[max(after, 0) :]

    async def delete(self, uuids: Sequence[str]) -> int:
        store = await self._caught_up()
        count = 0
        unique = list(dict.fromkeys(uuids))
        for at in range(0, len(unique), _AT_ONCE):
            some = unique[at : at + _AT_ONCE]
            await store.load(some, store.records)
            existing = [
                uuid
                for uuid in some
                if listing.exists(store.records.get(uuid)) or store.records.stream(uuid)
            ]
            count += await self._delete(dict.fromkeys(existing, Deletion()))
        return count

    async def expire(self) -> int:
        store = await self._caught_up()
        count = 0
        async for uuids in store.due(store.records, time.time()):
            count += await self._delete(listing.deletions(store.records, uuids, self._retention))
            if self._log.compacts:
                # Whoever deleted these has died before it could write the tombstones.
                for uuid in listing.deleted(store.records, uuids):
                    self._sweeper.discard(uuid, store.records.needless(uuid))
        if self._log.compacts:
            for view in (store.values, store.claims):
                async for subjects in store.due(view, time.time() - GRACE):
                    before = time.monotonic() - GRACE
                    for key, needless in listing.spent(view, subjects, before).items():
                        self._sweeper.discard(key, needless)
        return count

    async def migrate(self, namespace: str) -> list[str]:
        return await self._log.migrate(namespace)

    async def _delete(self, deletions: Mapping[str, Deletion]) -> int:
        """Delete records and streams. Return how many of the records existed."""
        return sum(await self._propose_all(list(deletions.items()))) if deletions else 0

    async def _propose(self, subject: str, content: Content) -> bool:
        """Propose a change, and return whether it won."""
        (won,) = await self._propose_all([(subject, content)])
        return won

    async def _propose_all(self, contents: Sequence[tuple[str, Content]]) -> list[bool]:
        """Propose changes, and wait until all are read back and judged."""
        entries = [self._entry(subject, content) for subject, content in contents]
        loop = asyncio.get_running_loop()
        changes: list[Future[bool]] = [loop.create_future() for _ in entries]
        self._changes.update(zip((entry.key for entry in entries), changes, strict=True))
        try:
            await self._append(entries)
            return await self._reader.wait(asyncio.gather(*changes))
        finally:
            for entry in entries:
                self._changes.pop(entry.key, None)

    async def _append(self, entries: Sequence[Entry]) -> None:
        for refused in await self._log.append(entries):
            if refused is not None:
                raise Refused(refused)

    def _entry(self, subject: str, content: Content) -> Entry:
        return Entry(subject, f"{self._writer}{next(self._sequence)}", encode(content))

    async def _caught_up(self) -> Store:
        """Read all entries that are durable now. Raises `Closed` and `Unavailable`.

        Return what has read them. If the log is read anew meanwhile, the caller must not look at
        what is only half read.
        """
        self._started()
        await self._reader.catch_up()
        return self._store

    def _started(self) -> None:
        if not self._open:
            raise Closed("LogStorage is not started")

    async def _take(self, entries: Sequence[Entry]) -> None:
        """Put the next entries of the log into the views, and notify all that wait for them."""
        store, position = self._store, self._log.position
        decoded: list[tuple[Entry, Content | None]] = []
        for entry in entries:
            try:
                decoded.append((entry, self._content(entry)))
            except WireError as error:
                self._skip(entry, error)
        missing = store.missing(
            (entry.partition_key, entry.key, content) for entry, content in decoded
        )
        await store.load(missing)
        for entry, content in decoded:
            if content is None:
                store.discard(entry.partition_key, entry.key)
            else:
                self._take_content(store, entry, content)
        await store.took(position)

    def _content(self, entry: Entry) -> Content | None:
        """Return the content of an entry, None for a tombstone. Raises `WireError`."""
        if entry.value is None:
            return None
        own = self._saves.get(entry.key)
        return own[2] if own is not None else decode(entry.value)

    def _take_content(self, store: Store, entry: Entry, content: Content) -> None:
        if isinstance(content, Task):
            self._take_record(store, entry, content)
        elif isinstance(content, Items):
            size = len(entry.value or b"")
            store.records.append(entry.partition_key, entry.key, content, size)
            self._tell(entry, True)
        elif isinstance(content, Deletion):
            judged = self._judged(store.records, entry, content)
            self._tell(entry, judged.judgement == "accept" and listing.exists(judged.before))
        else:
            over_at = shared.over_since(content, time.monotonic())
            judged_change = self._judged(store.view_of(content), entry, content, over_at)
            self._tell(entry, judged_change.judgement != "refuse")
            if isinstance(content, Setting):
                self._watchers.ring(entry.partition_key)

    def _take_record(self, store: Store, entry: Entry, task: Task) -> None:
        final = task.status in FINAL
        over_at = expiry_of(task, self._retention) if final else None
        judged = self._judged(store.records, entry, task, over_at)
        if judged.judgement == "accept" and final:
            self._inboxes.push(task)
        if (own := self._saves.get(entry.key)) is not None:
            save, at, _ = own
            save.set(at, *self._outcome(judged))

    def _outcome(self, judged: Judged[Task | Deletion]) -> tuple[Outcome, Deletion | None]:
        """Return the outcome of a save, and what to delete if it has to be made again."""
        before = judged.before
        if judged.judgement != "refuse" or before is None:
            return DONE, None
        stored = before.content if isinstance(before.content, Task) else None
        return refused_by(stored), Deletion(before.key) if listing.is_over(before) else None

    def _judged(
        self, view: View[Change], entry: Entry, content: Change, over_at: float | None = None
    ) -> Judged[Change]:
        """Put a proposal into a view, and drop what it made needless."""
        subject = entry.partition_key
        judged = view.propose(subject, entry.key, content, over_at, len(entry.value or b""))
        if not self._log.compacts:
            view.keep_current_only(subject)
        elif entry.key.startswith(self._writer):
            accepted = judged.judgement == "accept"
            self._sweeper.discard(subject, view.needless(subject) if accepted else [entry.key])
        return judged

    def _tell(self, entry: Entry, won: bool) -> None:
        change = self._changes.get(entry.key)
        if change is not None and not change.done():
            change.set_result(won)

    def _skip(self, entry: Entry, error: WireError) -> None:
        if not self.undecodable:
            logger.warning("skipping what is no record in the log, under %s: %s", entry.key, error)
        self.undecodable += 1


class Save:
    """A batch whose proposals are on their way through the log."""

    def __init__(self, places: Iterable[int]) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.expired: dict[int, Deletion] = {}
        """The items that an expired record refused, and how to delete that record."""
        self._missing = set(places)
        self.judged: Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: Unavailable) -> None:
        """Finish the wait: it will not be known who won."""
        if not self.judged.done():
            self.judged.set_exception(error)

    def set(self, at: int, outcome: Outcome, expired: Deletion | None = None) -> None:
        """Note the outcome of one item. The last one finishes the wait."""
        if at in self._missing:
            self.outcomes[at] = outcome
            if expired is not None:
                self.expired[at] = expired
            self._missing.discard(at)
            if not self._missing and not self.judged.done():
                self.judged.set_result(None)
