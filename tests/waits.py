"""A storage in memory that knows which results its client waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qtasks_core import Inbox, Task
from qtasks_memory import MemoryStorage


class WaitedFor(MemoryStorage):
    """`waited_for` has the uuids that the client expects or watches, until they come or it leaves.

    The client forgets a result once no caller waits for it, so what stays is a wait left behind.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.waited_for: set[str] = set()

    async def inbox(self) -> Inbox:
        return _NotingInbox(await super().inbox(), self.waited_for)


class _NotingInbox(Inbox):
    def __init__(self, inner: Inbox, waited_for: set[str]) -> None:
        self._inner, self._waited_for = inner, waited_for

    @property
    def address(self) -> str:
        return self._inner.address

    def expect(self, uuids: Iterable[str]) -> None:
        expected = list(uuids)
        self._waited_for.update(expected)
        self._inner.expect(expected)

    async def watch(self, uuids: Sequence[str]) -> None:
        self._waited_for.update(uuids)
        await self._inner.watch(uuids)

    def forget(self, uuids: Iterable[str]) -> None:
        forgotten = list(uuids)
        self._waited_for.difference_update(forgotten)
        self._inner.forget(forgotten)

    async def receive(self) -> list[Task]:
        tasks = await self._inner.receive()
        self._waited_for.difference_update(task.uuid for task in tasks)
        return tasks

    async def close(self) -> None:
        await self._inner.close()
