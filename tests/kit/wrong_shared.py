"""Storages that list, claim, share, stream and delete wrongly on purpose, each named for that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from fnmatch import fnmatchcase

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from qtasks_core import Claim, Task, TaskPage, TaskQuery
from qtasks_core.errors import Refused
from tests.kit.served import Storage


class PagesByNumber(Storage):
    """A cursor counts records, so new ones shift the next page."""

    async def query(self, query: TaskQuery) -> TaskPage:
        skipped = int(query.cursor or 0)
        whole = replace(query, cursor=None, limit=skipped + query.limit)
        page = await super().query(whole)
        more = str(whole.limit) if page.cursor is not None else None
        return TaskPage(page.tasks[skipped:], more)


class AlwaysHasMore(Storage):
    """It says where the next page begins without looking whether there is one."""

    async def query(self, query: TaskQuery) -> TaskPage:
        page = await super().query(query)
        if page.cursor is None and page.tasks:
            last = page.tasks[-1]
            return TaskPage(page.tasks, f"{last.created_at!r} {last.uuid}")
        return page


class IgnoresFilters(Storage):
    async def query(self, query: TaskQuery) -> TaskPage:
        return await super().query(TaskQuery(limit=query.limit, cursor=query.cursor))


class ListsOldestFirst(Storage):
    async def query(self, query: TaskQuery) -> TaskPage:
        page = await super().query(replace(query, limit=1000))
        return TaskPage(page.tasks[::-1][: query.limit])


class TakesAnyCursor(Storage):
    async def query(self, query: TaskQuery) -> TaskPage:
        try:
            return await super().query(query)
        except Refused:
            return await super().query(replace(query, cursor=None))


class ClaimsForAll(Storage):
    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        self._started().claims.pop(key, None)
        return await super().claim(key, owner, ttl)


class CutsLongKeys(Storage):
    """Its server has room for 199 characters, and it cuts what is longer."""

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        claim = await super().claim(key[:199], owner[:199], ttl)
        return claim and replace(claim, key=key, owner=owner)

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await super().set(key[:199], value, expect)

    async def get_value(self, key: str) -> bytes | None:
        return await super().get_value(key[:199])

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        await super().append(uuid[:199], items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        return await super().read(uuid[:199], after)


class WatchesAllLongKeys(Storage):
    """It tells of a change by the first 100 characters of the key, and looks no further."""

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        done = await super().set(key, value, expect)
        for near in self._started().value_watchers:
            if near != key and near[:100] == key[:100]:
                await super().set(near, value)
        return done


class NamesNobody(Storage):
    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        claim = await super().claim(key, owner, ttl)
        return claim and replace(claim, owner="")


class NeverLetsGo(Storage):
    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        return await super().claim(key, owner, 3600.0)


class LetsGoEarly(Storage):
    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        return await super().claim(key, owner, ttl / 2)


class ExtendsNothing(Storage):
    """Claiming again is answered, but does nothing."""

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        there = self._started().claims.get(key)
        claim = await super().claim(key, owner, ttl)
        if there is not None and there[0] == owner:
            self._started().claims[key] = there
        return claim


class ReleasesNothing(Storage):
    async def release(self, claim: Claim) -> None:
        """Leave it to its time."""


class ReleasesForAnybody(Storage):
    async def release(self, claim: Claim) -> None:
        self._started().claims.pop(claim.key, None)


class TakesEmptyForNothing(Storage):
    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await super().set(key, value or None, expect)


class IgnoresWhatIsExpected(Storage):
    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await super().set(key, value)


class ExpectsAnythingForNone(Storage):
    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await super().set(key, value, UNSET if expect is None else expect)


class ComparesThenSets(Storage):
    """It looks, waits for something else, and then sets on what it saw."""

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        if expect is not UNSET and await self.get_value(key) != expect:
            return False
        await asyncio.sleep(0.001)
        return await super().set(key, value)


class ListsByPattern(Storage):
    async def values(self, prefix: str) -> dict[str, bytes]:
        return {
            key: value
            for key, value in self._started().values.items()
            if fnmatchcase(key, f"{prefix}*")
        }


class WatchesOnlyChanges(Storage):
    """What is there already is not shown."""

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        first = True
        async for value in super().watch_value(key):
            if not first:
                yield value
            first = False


class WatchesOnce(Storage):
    """What is there is shown, and then nothing any more."""

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        async for value in super().watch_value(key):
            yield value
            await asyncio.Event().wait()


class SeesEachChangeTwice(Storage):
    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        async for value in super().watch_value(key):
            yield value
            yield value


class IsOneChangeBehind(Storage):
    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        before: list[bytes | None] = []
        async for value in super().watch_value(key):
            if not before:
                yield value
            elif len(before) > 1:
                yield before[-1]
            before.append(value)


class WatchesForEver(Storage):
    """Stopping it leaves its watchers waiting."""

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        yield await self.get_value(key)
        await asyncio.Event().wait()


class CountsPositionsAnew(Storage):
    """Each batch begins at 1 again."""

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        self._batches = [*getattr(self, "_batches", []), len(items)]
        await super().append(uuid, items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        return [(at % 250, item) for at, item in await super().read(uuid, after)]


class ReadsFromAfter(Storage):
    """`after` itself is read again."""

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        return await super().read(uuid, max(after - 1, 0))


class TearsBatches(Storage):
    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        for item in items:
            await super().append(uuid, [item])
            await asyncio.sleep(0.001)


class ForgetsStreams(Storage):
    """What one client appended is known to that client."""

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        self._own = [*getattr(self, "_own", []), *enumerate(items, 1)]

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        return list(getattr(self, "_own", []))


class HidesInsteadOfDeleting(Storage):
    """What is deleted is not shown, but refuses what is saved anew."""

    _hidden: set[str] = set()  # noqa: RUF012 (shared on purpose)

    async def delete(self, uuids: Sequence[str]) -> int:
        there = [task for task in await self.get(uuids) if task is not None]
        self._hidden.update(uuids)
        return len(there)

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        found = await super().get(uuids)
        return [task if task and task.uuid not in self._hidden else None for task in found]


class LeavesStreams(Storage):
    async def delete(self, uuids: Sequence[str]) -> int:
        records = self._started().records
        return sum(records.pop(uuid, None) is not None for uuid in uuids)


class ExpiresWhatRuns(Storage):
    async def expire(self) -> int:
        records = self._started().records
        return await self.delete([u for u, task in records.items() if task.created_at < 10.0]) + (
            await super().expire()
        )


class ExpiresNothing(Storage):
    async def expire(self) -> int:
        return 0


class ExpiresByOneTime(Storage):
    """What a record itself says of its retention is nothing to it."""

    async def expire(self) -> int:
        records = self._started().records
        for uuid, task in list(records.items()):
            records[uuid] = replace(task, retention=None)
        return await super().expire()


class MigratesAnew(Storage):
    """It begins by clearing away what is there."""

    async def migrate(self, namespace: str) -> list[str]:
        if self._memory is not None:
            self._memory.records.clear()
        return []
