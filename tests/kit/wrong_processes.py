"""Parts that are wrong only when several processes use them, each named for what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from qtasks_core import (
    DONE,
    Delivery,
    Guarantees,
    Inbox,
    Outcome,
    Settlement,
    Subscription,
    Task,
)
from qtasks_memory import MemoryBroker, MemoryStorage
from qtasks_sqlite import SqliteBroker, SqliteStorage


class Through(Subscription):
    """Another subscription as it is; wrong ones change a method."""

    def __init__(self, true: Subscription) -> None:
        self._true = true

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        return await self._true.receive(wanted, limit)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        return await self._true.settle(settlements)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        return await self._true.extend(deliveries)

    async def close(self) -> None:
        await self._true.close()


class LosesWithTheProcess(SqliteBroker):
    """Leases never end, whatever it promises."""

    def __init__(self, url: str, *, lease: float = 30.0, **options: Any) -> None:
        super().__init__(url, lease=1e6, **options)
        self._promised = lease

    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, lease=self._promised)


class SaysDoneToZombies(SqliteBroker):
    class wrapped(Through):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            return [DONE for _ in await super().settle(settlements)]

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return self.wrapped(await super().subscribe(queues))


class KeepsZombiesAlive(SqliteBroker):
    """What was received is held for ever, it says."""

    class wrapped(Through):
        async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
            await super().extend(deliveries)
            return list(deliveries)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return self.wrapped(await super().subscribe(queues))


class SeesOnlyItself(MemoryBroker):
    """Memory, passed off as something that processes share."""

    def __init__(self, url: str, *, lease: float = 30.0) -> None:
        super().__init__(url, lease=lease)


class RemembersOnlyItself(MemoryStorage):
    """Memory, passed off as something that processes share."""

    def __init__(self, url: str) -> None:
        super().__init__(url)


class HearsOnlyItself(SqliteStorage):
    """Records are shared; news of them is not."""

    async def start(self, namespace: str) -> None:
        await super().start(namespace)
        self._gossip = MemoryStorage("gossip")
        await self._gossip.start(namespace)

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        outcomes = await super().save([replace(task, reply_to=None) for task in tasks])
        await self._gossip.save(tasks)
        return outcomes

    async def inbox(self) -> Inbox:
        return await self._gossip.inbox()
