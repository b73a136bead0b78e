"""A storage for the tasks of today, and another one for those of before."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from math import inf
from uuid import UUID, uuid4
from weakref import WeakSet

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from qtasks.compose.inbox import MergedInbox
from qtasks.compose.pages import merged_page
from qtasks.compose.told import distinct, listed
from qtasks_core import DONE, Claim, Guarantees, Inbox, Outcome, Storage, Task, TaskPage, TaskQuery
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.lookup import resolve_storage
from qtasks_core.records import FINAL, judge, refused_by
from qtasks_core.schemas import EVENTS
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction

_MOVES = "qtasks: moving to the archive"
"""The key of the claim of who moves records."""
_APART = 60.0
"""Seconds between two moves. Longer than a save takes: see `_move`."""
_PAGE = 100
"""Records that are moved at once."""


class TieredStorage(Storage):
    """Keeps records in `hot`, and moves them to `archive` when they have been finished for a while.

        storage = TieredStorage("redis://localhost", "postgresql://localhost/shop", after=3600)
        app = QueueTasks("shop", "redis://localhost", storage)

    `expire` moves what finished `after` seconds ago; workers call it. Claims and shared values are
    in `hot` alone. Raises `ConfigurationError` for a wrong URL, the same storage twice, or if one
    of them would delete records within `after` seconds.
    """

    def __init__(
        self, hot: Storage | str, archive: Storage | str, *, after: float = 86_400.0
    ) -> None:
        for part in (hot, archive):
            if not isinstance(part, Storage | str):
                raise ConfigurationError(f"{part!r} is neither a storage nor a URL")
        if hot == archive:
            raise ConfigurationError("hot and archive are the same storage")
        if not 0 <= after < inf:
            raise ConfigurationError(f"after={after!r} is not a number of seconds")
        self.hot = resolve_storage(hot) if isinstance(hot, str) else hot
        self.archive = resolve_storage(archive) if isinstance(archive, str) else archive
        self._both = (self.hot, self.archive)
        for told in (storage.guarantees for storage in self._both):
            if told.retention is not None and told.retention <= after:
                raise ConfigurationError(
                    f"{told.part} deletes records after {told.retention:g} s (retention=), "
                    f"but they are moved after {after:g} s (after=)"
                )
        self._after = after
        self.driver_loggers = distinct(n for each in self._both for n in each.driver_loggers)
        self._inboxes: WeakSet[MergedInbox] = WeakSet()

    @property
    def guarantees(self) -> Guarantees:
        """What both promise. The retention is that of the archive."""
        told = [storage.guarantees for storage in self._both]
        return Guarantees(
            part=type(self).__name__,
            server=listed(each.server for each in told),
            survives=min((each.survives for each in told), key=EVENTS.index),
            durability=listed(f"{each.part}: {each.durability}" for each in told),
            best_settings=listed(each.best_settings for each in told),
            retention=told[1].retention,
            largest=min((each.largest for each in told if each.largest is not None), default=None),
            unsupported=distinct(name for each in told for name in each.unsupported),
            notes=(
                f"{self._after:g} s after a task has finished, its record moves from "
                f"{told[0].part} to {told[1].part}",
                *(f"{each.part}: {note}" for each in told for note in each.notes),
            ),
            advice=tuple(f"{each.part}: {line}" for each in told for line in each.advice),
        )

    async def start(self, namespace: str) -> None:
        try:
            for storage in self._both:
                await storage.start(namespace)
        except BaseException:
            with suppress(Unavailable):
                await self.stop()
            raise

    async def stop(self) -> None:
        try:
            await together([inbox.close() for inbox in self._inboxes])
        finally:
            await together([storage.stop() for storage in self._both])

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        """Save in `hot`, except what a record in the archive refuses."""
        if transaction is not None:
            refuse_transaction(self)
        archived = await self._archived([task.uuid for task in tasks])
        verdicts = [judge(task, archived.get(task.uuid)) for task in tasks]
        left = [task for task, verdict in zip(tasks, verdicts, strict=True) if verdict == "accept"]
        saved = iter(await self.hot.save(left) if left else [])
        return [
            next(saved)
            if verdict == "accept"
            else DONE
            if verdict == "repeat"
            else refused_by(archived[task.uuid])
            for task, verdict in zip(tasks, verdicts, strict=True)
        ]

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        """Look in `hot`, then in the archive."""
        found = await self.hot.get(uuids)
        missing = [uuid for uuid, task in zip(uuids, found, strict=True) if task is None]
        archived = await self._archived(missing)
        return [
            archived.get(uuid) if task is None else task
            for uuid, task in zip(uuids, found, strict=True)
        ]

    async def _archived(self, uuids: Sequence[str]) -> dict[str, Task]:
        """Return the records of the archive. Young uuids cannot have one, so they cost nothing."""
        old = [uuid for uuid in dict.fromkeys(uuids) if not self._is_young(uuid)]
        records = await self.archive.get(old) if old else []
        return {record.uuid: record for record in records if record is not None}

    def _is_young(self, uuid: str) -> bool:
        """Say whether a uuid names a time (version 7), and it is too early to archive its task.

        Half of `after` is left for clocks that differ.
        """
        try:
            parsed = UUID(uuid)
        except ValueError:
            return False
        made = (parsed.int >> 80) / 1000
        return parsed.version == 7 and abs(time.time() - made) < self._after / 2

    async def inbox(self) -> Inbox:
        inboxes: list[Inbox] = []
        try:
            for storage in (self.archive, self.hot):
                inboxes.append(await storage.inbox())
        except BaseException:
            await together([inbox.close() for inbox in inboxes])
            raise
        inbox = MergedInbox(inboxes)
        self._inboxes.add(inbox)
        return inbox

    async def clock(self) -> float | None:
        return await self.hot.clock()

    async def refresh(self) -> None:
        await together([storage.refresh() for storage in self._both])

    async def query(self, query: TaskQuery) -> TaskPage:
        """List the records of both."""
        return await merged_page(self._both, query, self.get)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        return await self.hot.claim(key, owner, ttl)

    async def release(self, claim: Claim) -> None:
        await self.hot.release(claim)

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await self.hot.set(key, value, expect)

    async def get_value(self, key: str) -> bytes | None:
        return await self.hot.get_value(key)

    async def values(self, prefix: str) -> dict[str, bytes]:
        return await self.hot.values(prefix)

    def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        return self.hot.watch_value(key)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        await self.hot.append(uuid, items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        """Read the items in `hot`. Read them in the archive if `hot` has none."""
        items = await self.hot.read(uuid, after)
        if items or self._is_young(uuid) or (after and await self.hot.read(uuid, 0)):
            return items
        return await self.archive.read(uuid, after)

    async def delete(self, uuids: Sequence[str]) -> int:
        found = await self.get(uuids)
        await self.hot.delete(uuids)
        await self.archive.delete(uuids)  # last: see `_copy`
        return len({task.uuid for task in found if task is not None})

    async def expire(self) -> int:
        """Delete what has expired in both. Then move what has been finished for long enough."""
        numbers = await together([storage.expire() for storage in self._both])
        await self._move()
        return sum(numbers)

    async def _move(self) -> None:
        """Copy records to the archive. Delete those that an earlier move has copied.

        A save looks into the archive, then writes to `hot`. If a record could be copied and deleted
        between the two, that save would be accepted beside the archived record. So a minute lies
        between them: the claim is not released.
        """
        owner = uuid4().hex
        now = await self.clock() or time.time()
        query = TaskQuery(status=tuple(FINAL), created_before=now - self._after, limit=_PAGE)
        while await self.hot.claim(_MOVES, owner, _APART) is not None:
            page = await self.hot.query(query)
            due = {
                task.uuid: task
                for task in page.tasks
                if task.finished_at is not None and task.finished_at + self._after <= now
            }
            if due:
                archived = {
                    task.uuid
                    for task in await self.archive.get([*due])
                    # The archive may have been the app's only storage before.
                    if task is not None and task.status in FINAL
                }
                await self._copy([task for uuid, task in due.items() if uuid not in archived])
                if archived:
                    await self.hot.delete([*archived])
            if page.cursor is None:
                return
            query = replace(query, cursor=page.cursor)

    async def _copy(self, tasks: Sequence[Task]) -> None:
        """Copy records, after the items that were appended to them."""
        for task in tasks:
            items = await self.hot.read(task.uuid, 0)
            if items and not await self.archive.read(task.uuid, 0):
                await self.archive.append(task.uuid, [item for _, item in items])
        if tasks:
            await self.archive.save(tasks)
            found = await self.hot.get([task.uuid for task in tasks])
            deleted = [t.uuid for t, left in zip(tasks, found, strict=True) if left is None]
            if deleted:  # meanwhile
                await self.archive.delete(deleted)

    async def migrate(self, namespace: str) -> list[str]:
        changes = await together([storage.migrate(namespace) for storage in self._both])
        return [line for lines in changes for line in lines]
