"""Parts that are wrong only when several processes use them, each named for what it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from qtasks_core import (
    DONE,
    Ack,
    Claim,
    Command,
    Delivery,
    Guarantees,
    Inbox,
    Outcome,
    Raw,
    Retry,
    Settlement,
    Subscription,
    Task,
    TaskMessage,
)
from qtasks_core.errors import WireError
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


class CommandsOnlyItself(SqliteBroker):
    """Commands are told in this process; the others do not hear them."""

    async def start(self, namespace: str) -> None:
        await super().start(namespace)
        self._gossip = MemoryBroker("gossip")
        await self._gossip.start(namespace)

    async def broadcast(self, command: Command) -> None:
        await self._gossip.broadcast(command)

    def commands(self) -> AsyncIterator[Command]:
        return self._gossip.commands()


class SharesWithItself(SqliteStorage):
    """Records are shared; claims, values and streams are this process's own."""

    async def start(self, namespace: str) -> None:
        await super().start(namespace)
        self._own = MemoryStorage("own")
        await self._own.start(namespace)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        return await self._own.claim(key, owner, ttl)

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        return await self._own.set(key, value, expect)

    async def get_value(self, key: str) -> bytes | None:
        return await self._own.get_value(key)

    async def values(self, prefix: str) -> dict[str, bytes]:
        return await self._own.values(prefix)

    def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        return self._own.watch_value(key)

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        await self._own.append(uuid, items)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        return await self._own.read(uuid, after)


class DropsForeignBytes(SqliteBroker):
    """What it cannot read it does not deliver."""

    class wrapped(Through):
        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            while True:
                deliveries = await super().receive(wanted, limit)
                readable = [d for d in deliveries if not isinstance(d.message, Raw)]
                if readable:
                    return readable

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return self.wrapped(await super().subscribe(queues))


class ChokesOnForeignBytes(SqliteBroker):
    """One message that it cannot read, and nothing is delivered any more."""

    class wrapped(Through):
        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            deliveries = await super().receive(wanted, limit)
            for delivery in deliveries:
                if isinstance(delivery.message, Raw):
                    raise WireError(delivery.message.error)
            return deliveries

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return self.wrapped(await super().subscribe(queues))


class ForgetsSpoiltRecords(SqliteStorage):
    """What it cannot read was never there, so the task runs again."""

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        return [
            None if task is not None and "cannot be read" in (task.error or "") else task
            for task in await super().get(uuids)
        ]


class ChokesOnSpoiltRecords(SqliteStorage):
    """One record that it cannot read, and its neighbours cannot be had either."""

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        tasks = await super().get(uuids)
        for task in tasks:
            if task is not None and "cannot be read" in (task.error or ""):
                raise WireError(task.error)
        return tasks


class PublishesLater(SqliteBroker):
    """It answers first, and writes when there is time."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        late = super().publish(messages)
        self._late = [*getattr(self, "_late", []), asyncio.create_task(late_on(late))]
        return [DONE] * len(messages)


class DelaysInItsProcess(SqliteBroker):
    """What is delayed waits with its publisher."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        for message in messages:
            if message.delay > 0:
                late = super().publish([replace(message, delay=message.delay / 2)])
                self._late = [*getattr(self, "_late", []), asyncio.create_task(late_on(late))]
        await super().publish([message for message in messages if message.delay <= 0])
        return [DONE] * len(messages)


class RetriesInTwoSteps(SqliteBroker):
    """The old message goes, and the new one comes late: its process is dead by then."""

    class wrapped(Through):
        publish: Callable[[Sequence[TaskMessage]], Awaitable[list[Outcome]]]

        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            retried = [s for s in settlements if isinstance(s, Retry)]
            first = [Ack(s.delivery) if isinstance(s, Retry) else s for s in settlements]
            outcomes = await super().settle(first)
            await asyncio.sleep(60.0)
            await self.publish([retry.message for retry in retried])
            return outcomes

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = self.wrapped(await super().subscribe(queues))
        subscription.publish = self.publish
        return subscription


class SavesLater(SqliteStorage):
    """It answers first, and writes when there is time."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        late = super().save(tasks)
        self._late = [*getattr(self, "_late", []), asyncio.create_task(late_on(late))]
        return [DONE] * len(tasks)


class ImportsItsDriverEarly(SqliteBroker):
    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        import sqlite3  # noqa: F401


class MissesItsDriver(SqliteBroker):
    """What is not installed is an error of Python's."""

    async def start(self, namespace: str) -> None:
        import sqlite3  # noqa: F401

        await super().start(namespace)


async def late_on(call: Coroutine[Any, Any, object]) -> None:
    """Make a call, late."""
    await asyncio.sleep(0.5)
    await call
