"""A storage on an append-only log: a save is a proposal, and reading it back decides who won."""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import Future
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import count

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
from qtasks_core.errors import Closed, Refused, WireError
from qtasks_core.names import checked_id
from qtasks_core.options import checked_retention
from qtasks_core.records import FINAL, RETENTION, expiry_of, refused_by, retention_note
from qtasks_core.transactions import refuse_transaction
from qtasks_log import listing, shared
from qtasks_log.entries import Content, Deletion, Items, Setting, decode, encode
from qtasks_log.inbox import Inboxes, LogInbox
from qtasks_log.log import Entry, Log
from qtasks_log.reader import Reader
from qtasks_log.sweeper import Sweeper
from qtasks_log.view import Change, Judged, View

logger = logging.getLogger("qtasks.log")

GRACE = 3600.0
"""Seconds after which `expire` discards deleted values and claims that are over, if the log
compacts. A proposal that follows such an entry arrives before: no call waits that long."""
_AT_ONCE = 1000
"""Deletions in one append."""
_NOTES = (
    "every process reads the whole log at its start and keeps its records in memory",
    "deleted and expired records leave that memory, but not the log: it grows until it is deleted",
    "do not limit the age or the size of the log: it would lose records, values and claims",
    "the time of a claim counts from when a process reads it in the log, so the clocks of machines "
    "need not agree; a process that was just started may wait for the whole time before it takes "
    "over the claim of a dead owner",
)


class LogStorage(Storage):
    """Keeps records in a log. Every process reads it from its beginning into its own view.

    `retention` is in seconds, None means for ever. It applies to final records without a retention.
    All processes of an app must have the same one.
    """

    def __init__(self, log: Log, *, retention: float | None = RETENTION) -> None:
        self._log = log
        self._retention = checked_retention(retention)
        self._open = False
        self._reset()

    def _reset(self) -> None:
        self._records: listing.Records = View()
        self._values: shared.Values = View()
        self._claims: shared.Claims = View()
        self._reader = Reader(self._log, self._take)
        self._inboxes = Inboxes(self._reader, self._record)
        self._watchers = shared.Watchers(self._reader)
        self._sweeper = Sweeper(self._log)
        # Each proposal has a unique key. With one key for all repeats of a save, compaction would
        # keep the last repeat. A loser before that one would then win.
        self._writer = f"{uuid7().hex}."
        self._sequence = count()
        self._saves: dict[str, tuple[Save, int, Task]] = {}
        self._changes: dict[str, Future[bool]] = {}
        """By key: the proposals, apart from saves, that are on their way through the log."""
        self.undecodable = 0
        """How many entries of the log were skipped because this release cannot read them."""

    @property
    def guarantees(self) -> Guarantees:
        told = self._log.guarantees
        return replace(
            told,
            retention=self._retention,
            notes=(*told.notes, retention_note(self._retention), *_NOTES),
        )

    async def start(self, namespace: str) -> None:
        """Connect and read the log to its end. From here on, this view judges as all others do."""
        self._reset()
        self._open = True
        try:
            await self._log.start(namespace)
            await self._reader.catch_up()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._open:
            self._open = False
            await self._inboxes.close()
            await self._reader.stop()
            await self._sweeper.stop()
        await self._log.stop()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        """Append a proposal for each task, and wait until all are read back and judged."""
        self._started()
        if transaction is not None:
            refuse_transaction(self)
        outcomes: dict[int, Outcome] = {}
        missing: Mapping[int, Deletion | None] = dict.fromkeys(range(len(tasks)))
        while missing:
            save = await self._save(tasks, missing)
            outcomes |= save.outcomes
            # What an expired record refused is saved again, behind the deletion of that record.
            missing = {at: save.expired[at] for at in sorted(save.expired)}
        return [outcomes[at] for at in range(len(tasks))]

    async def _save(self, tasks: Sequence[Task], missing: Mapping[int, Deletion | None]) -> Save:
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
            for place, refused in zip(places, await self._log.append(entries), strict=True):
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
        return [self._record(uuid) for uuid in uuids]

    def _record(self, uuid: str) -> Task | None:
        return listing.record_of(self._records.get(uuid))

    async def inbox(self) -> Inbox:
        self._started()
        return LogInbox(self._inboxes)

    async def query(self, query: TaskQuery) -> TaskPage:
        await self._caught_up()
        return await listing.page_of(self._records, query)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        checked_id(key, "the key of a claim")
        checked_id(owner, "the owner of a claim")
        await self._caught_up()
        while (claiming := shared.claiming(self._claims, key, owner, ttl)) is not None:
            began = time.time()
            if await self._propose(key, claiming):
                return Claim(key, owner, began + ttl)
        return None

    async def release(self, claim: Claim) -> None:
        await self._caught_up()
        while (releasing := shared.releasing(self._claims, claim)) is not None:
            if await self._propose(claim.key, releasing):
                return

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        checked_id(key, "the key of a value")
        await self._caught_up()
        while isinstance(setting := shared.setting(self._values, key, value, expect), Setting):
            if await self._propose(key, setting):
                return True
        return setting

    async def get_value(self, key: str) -> bytes | None:
        checked_id(key, "the key of a value")
        await self._caught_up()
        return shared.getting(self._values, key)

    async def values(self, prefix: str) -> dict[str, bytes]:
        await self._caught_up()
        return shared.listing(self._values, prefix)

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        checked_id(key, "the key of a value")
        values, watchers = self._values, self._watchers  # a later start makes others
        await self._caught_up()
        seen: bytes | UnsetType | None = UNSET
        while True:
            value = shared.getting(values, key)
            if value != seen:
                seen = value
                yield value
            else:
                await watchers.wait(key)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        self._started()
        checked_id(uuid, "a uuid")
        if items:
            await self._append([self._entry(uuid, Items(tuple(items), time.time()))])

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        await self._caught_up()
        items = [item for some in self._records.stream(uuid) for item in some.items]
        return list(enumerate(items, 1))[max(after, 0) :]

    async def delete(self, uuids: Sequence[str]) -> int:
        await self._caught_up()
        existing = [
            uuid
            for uuid in dict.fromkeys(uuids)
            if listing.exists(self._records.get(uuid)) or self._records.stream(uuid)
        ]
        return await self._delete(dict.fromkeys(existing, Deletion()))

    async def expire(self) -> int:
        await self._caught_up()
        count = await self._delete(await listing.deletions_of_expired(self._records))
        orphans = await listing.deletions_of_orphans(self._records, time.time() - self._retention)
        await self._delete(orphans)
        if self._log.compacts:
            before = time.monotonic() - GRACE
            for key, needless in (
                *listing.spent(self._values, before).items(),
                *listing.spent(self._claims, before).items(),
            ):
                self._sweeper.discard(key, needless)
        return count

    async def migrate(self, namespace: str) -> list[str]:
        return await self._log.migrate(namespace)

    async def _delete(self, deletions: Mapping[str, Deletion]) -> int:
        """Delete records and streams. Return how many of the records existed."""
        waiting = list(deletions.items())
        count = 0
        for at in range(0, len(waiting), _AT_ONCE):
            count += sum(await self._propose_all(waiting[at : at + _AT_ONCE]))
        return count

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
                del self._changes[entry.key]

    async def _append(self, entries: Sequence[Entry]) -> None:
        for refused in await self._log.append(entries):
            if refused is not None:
                raise Refused(refused)

    def _entry(self, subject: str, content: Content) -> Entry:
        return Entry(subject, f"{self._writer}{next(self._sequence)}", encode(content))

    async def _caught_up(self) -> None:
        """Read all entries that are durable now. Raises `Closed` and `Unavailable`."""
        self._started()
        await self._reader.catch_up()

    def _started(self) -> None:
        if not self._open:
            raise Closed("LogStorage is not started")

    def _take(self, entry: Entry) -> None:
        """Put the next entry of the log into the view, and notify all that wait for it."""
        if entry.value is None:
            for view in (self._records, self._values, self._claims):
                view.discard(entry.partition_key, entry.key)
            return
        own = self._saves.get(entry.key)
        try:
            content = own[2] if own is not None else decode(entry.value)
        except WireError as error:
            self._skip(entry, error)
            return
        if isinstance(content, Task):
            self._take_record(entry, content, own)
        elif isinstance(content, Items):
            self._records.append(entry.partition_key, entry.key, content)
        elif isinstance(content, Deletion):
            judged = self._judged(self._records, entry, content)
            self._tell(entry, judged.judgement == "accept" and listing.exists(judged.before))
        elif isinstance(content, Setting):
            judged_value = self._judged(self._values, entry, content, shared.over_at(content))
            self._tell(entry, judged_value.judgement != "refuse")
            self._watchers.ring(entry.partition_key)
        else:
            judged_claim = self._judged(self._claims, entry, content, shared.over_at(content))
            self._tell(entry, judged_claim.judgement != "refuse")

    def _take_record(self, entry: Entry, task: Task, own: tuple[Save, int, Task] | None) -> None:
        final = task.status in FINAL
        over_at = expiry_of(task, self._retention) if final else None
        judged = self._judged(self._records, entry, task, over_at)
        if judged.judgement == "accept" and final:
            self._inboxes.push(task)
        if own is not None:
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
        judged = view.propose(subject, entry.key, content, over_at)
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

    def set(self, at: int, outcome: Outcome, expired: Deletion | None = None) -> None:
        """Note the outcome of one item. The last one finishes the wait."""
        if at in self._missing:
            self.outcomes[at] = outcome
            if expired is not None:
                self.expired[at] = expired
            self._missing.discard(at)
            if not self._missing and not self.judged.done():
                self.judged.set_result(None)
