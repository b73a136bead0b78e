"""A storage that takes the place of another one, while the app works."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from weakref import WeakSet

from msgspec import UNSET, UnsetType

from qtasks.compose.inbox import MergedInbox
from qtasks.compose.pages import merged_page
from qtasks.compose.told import distinct, listed
from qtasks.compose.values import MergedValue
from qtasks_core import Claim, Guarantees, Inbox, Outcome, Storage, Task, TaskPage, TaskQuery
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.lookup import resolve_storage
from qtasks_core.records import FINAL, order_of
from qtasks_core.schemas import EVENTS
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction

_PAGE = 500
"""Records that `copy` reads at once."""


class MigratingStorage(Storage):
    """Writes to `old` and `new`, and reads from both. What it reads in `old` alone, it copies.

        storage = MigratingStorage("redis://localhost", "postgresql://localhost/shop")
        app = QueueTasks("shop", "redis://localhost", storage)

    So processes that know only one of the two see what all others write, if all know `old` at first
    and all know `new` at the end. `copy` copies everything. Raises `ConfigurationError` for a wrong
    URL, or the same storage twice.
    """

    def __init__(self, old: Storage | str, new: Storage | str) -> None:
        for part in (old, new):
            if not isinstance(part, Storage | str):
                raise ConfigurationError(f"{part!r} is neither a storage nor a URL")
        if old == new:
            raise ConfigurationError("old and new are the same storage")
        self.old = resolve_storage(old) if isinstance(old, str) else old
        self.new = resolve_storage(new) if isinstance(new, str) else new
        self._both = (self.old, self.new)
        self.driver_loggers = (*self.old.driver_loggers, *self.new.driver_loggers)
        self._inboxes: WeakSet[MergedInbox] = WeakSet()
        self._watching: WeakSet[MergedValue] = WeakSet()

    @property
    def guarantees(self) -> Guarantees:
        """What both promise."""
        told = [storage.guarantees for storage in self._both]
        kept = [each.retention for each in told if each.retention is not None]
        return Guarantees(
            part=type(self).__name__,
            server=listed(each.server for each in told),
            survives=min((each.survives for each in told), key=EVENTS.index),
            durability=listed(f"{each.part}: {each.durability}" for each in told),
            best_settings=listed(each.best_settings for each in told),
            retention=min(kept, default=None),
            largest=min((each.largest for each in told if each.largest is not None), default=None),
            unsupported=distinct(name for each in told for name in each.unsupported),
            notes=tuple(f"{each.part}: {note}" for each in told for note in each.notes),
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
            await together([value.close() for value in self._watching])

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        """Save at `old`, then at `new` what that has accepted.

        At first `old` alone knows what processes without `new` have saved, so it decides. At the
        end it accepts what `new` may refuse.
        """
        if transaction is not None:
            refuse_transaction(self)
        outcomes = await self.old.save(tasks)
        accepted = [at for at, outcome in enumerate(outcomes) if outcome.status == "done"]
        answers = await self.new.save([tasks[at] for at in accepted]) if accepted else []
        for at, answer in zip(accepted, answers, strict=True):
            outcomes[at] = answer
        return outcomes

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        """Return the newest records. What is newer at `old` is copied."""
        olds, news = await together([storage.get(uuids) for storage in self._both])
        ahead = {
            old.uuid: old
            for old, new in zip(olds, news, strict=True)
            if old is not None and (new is None or _is_ahead(old, new))
        }
        if not ahead:
            return news
        found = {new.uuid: new for new in news if new is not None} | ahead
        copied = await self.new.save(list(ahead.values()))
        for uuid, outcome in zip(ahead, copied, strict=True):
            if outcome.current is not None:  # somebody was faster
                found[uuid] = outcome.current
        return [found.get(uuid) for uuid in uuids]

    async def inbox(self) -> Inbox:
        inboxes: list[Inbox] = []
        try:
            for storage in self._both:
                inboxes.append(await storage.inbox())
        except BaseException:
            await together([inbox.close() for inbox in inboxes])
            raise
        inbox = MergedInbox(inboxes)
        self._inboxes.add(inbox)
        return inbox

    async def clock(self) -> float | None:
        return await self.old.clock()

    async def refresh(self) -> None:
        await together([storage.refresh() for storage in self._both])

    async def query(self, query: TaskQuery) -> TaskPage:
        """List the newest records of both."""
        return await merged_page(self._both, query, self.get)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        """Claim the key at `old`, then at `new`. Only who gets both has it."""
        first = await self.old.claim(key, owner, ttl)
        if first is None:
            return None
        claim = await self.new.claim(key, owner, ttl)
        if claim is None:
            await self.old.release(first)
            return None
        return first  # it expires first

    async def release(self, claim: Claim) -> None:
        await together([storage.release(claim) for storage in self._both])

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        """Set the value at `old`, then copy it. A value that only `new` has counts as well."""
        if expect is not UNSET and await self.old.get_value(key) is None:
            later = await self.new.get_value(key)
            if later is not None:
                await self.old.set(key, later, expect=None)
        if not await self.old.set(key, value, expect):
            return False
        await self._copy_value(key)
        return True

    async def _copy_value(self, key: str) -> None:
        """Give `new` the value that `old` has, also if others set it meanwhile."""
        while True:
            value, before = await together([each.get_value(key) for each in self._both])
            if value == before:
                return
            await self.new.set(key, value, expect=before)

    async def get_value(self, key: str) -> bytes | None:
        value, later = await together([storage.get_value(key) for storage in self._both])
        return later if value is None else value

    async def values(self, prefix: str) -> dict[str, bytes]:
        values, later = await together([storage.values(prefix) for storage in self._both])
        return later | values

    def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        value = MergedValue(self._both, key, self.get_value)
        self._watching.add(value)
        return value

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        await self.old.append(uuid, items)
        await self.new.append(uuid, items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        """Read the items at `old`. Read them at `new` if `old` has none."""
        items = await self.old.read(uuid, after)
        if items or (after and await self.old.read(uuid, 0)):
            return items
        return await self.new.read(uuid, after)

    async def delete(self, uuids: Sequence[str]) -> int:
        found = await self.get(uuids)
        await together([storage.delete(uuids) for storage in self._both])
        return len({task.uuid for task in found if task is not None})

    async def expire(self) -> int:
        return max(await together([storage.expire() for storage in self._both]))

    async def migrate(self, namespace: str) -> list[str]:
        changes = await together([storage.migrate(namespace) for storage in self._both])
        return [line for lines in changes for line in lines]

    async def copy(self) -> int:
        """Copy all that only `old` has. Return the number of records.

        Records that others save meanwhile go to both. So if all processes use this storage and one
        call has returned, `new` has everything. After an error, call it again.
        """
        for key in await self.old.values(""):
            await self._copy_value(key)
        copied, cursor = 0, None
        while True:
            page = await self.old.query(TaskQuery(limit=_PAGE, cursor=cursor))
            uuids = [task.uuid for task in page.tasks]
            news = await self.new.get(uuids)
            pairs = zip(page.tasks, news, strict=True)
            copied += sum(new is None or _is_ahead(old, new) for old, new in pairs)
            await self.get(uuids)
            for uuid in uuids:
                if (items := await self.old.read(uuid, 0)) and not await self.new.read(uuid, 0):
                    await self.new.append(uuid, [item for _, item in items])
            if page.cursor is None:
                return copied
            cursor = page.cursor


def _is_ahead(old: Task, new: Task) -> bool:
    """Say whether the record at `old` is newer. A final record at `new` stays."""
    if new.status in FINAL:
        return False
    return old.status in FINAL or order_of(old) > order_of(new)
