"""Brokers that count, purge and command wrongly on purpose, each named for what it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from msgspec.structs import replace

from qtasks_core import (
    Command,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import NotSupported
from qtasks_memory.connection import Memory
from qtasks_memory.subscription import MemorySubscription
from tests.kit.served import Broker


class CannotCount(Broker):
    """It declares `depth` and has none."""

    async def depth(self, queue: str) -> QueueDepth:
        raise NotSupported("it cannot count")


class HidesThatItCounts(Broker):
    """It has `depth` and declares that it has none."""

    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, unsupported=("depth",))


class CountsEverythingAsReady(Broker):
    async def depth(self, queue: str) -> QueueDepth:
        depth = await super().depth(queue)
        return QueueDepth(sum(filter(None, (depth.ready, depth.delayed, depth.in_flight))))


class TellsTheAgeOfTheNewest(Broker):
    async def depth(self, queue: str) -> QueueDepth:
        depth = await super().depth(queue)
        return replace(depth, oldest_age=0.0 if depth.ready else None)


class CountsAllQueues(Broker):
    async def depth(self, queue: str) -> QueueDepth:
        depths = [await super(CountsAllQueues, self).depth(name) for name in self._started().queues]
        return QueueDepth(sum(depth.ready or 0 for depth in depths), 0, 0)


class StaysWithAQueue(Broker):
    """It hands out the first queue until that one is empty, whichever is asked for first."""

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return OneAfterTheOther(self._started(), self._lease)


class OneAfterTheOther(MemorySubscription):
    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        return await super().receive(dict(sorted(wanted.items())), limit)


class PurgesWhatIsHeld(Broker):
    async def purge(self, queue: str) -> int:
        dropped = await super().purge(queue)
        self._started().queues[queue].in_flight.clear()
        return dropped


class PurgesOnlyWhatIsReady(Broker):
    async def purge(self, queue: str) -> int:
        ready = self._started().queues[queue]._ready
        dropped = len(ready)
        ready.clear()
        return dropped + 3


class PurgesAllQueues(Broker):
    async def purge(self, queue: str) -> int:
        dropped = [
            await super(PurgesAllQueues, self).purge(name) for name in self._started().queues
        ]
        return max(dropped, default=0)


class TellsOneListener(Broker):
    async def broadcast(self, command: Command) -> None:
        listeners = self._started().listeners
        if command.name == "hello":
            await super().broadcast(command)
        else:
            next(iter(listeners)).put_nowait(command)


class ForgetsArguments(Broker):
    async def broadcast(self, command: Command) -> None:
        await super().broadcast(replace(command, arguments={}))


class TellsInReverse(Broker):
    """A command overtakes the one before it."""

    _held: Command | None = None

    async def broadcast(self, command: Command) -> None:
        held, self._held = self._held, None
        if held is None and command.target == "7":
            self._held = command
            return
        await super().broadcast(command)
        if held is not None:
            await super().broadcast(held)


class SendsToAllApps(Broker):
    apps: set[Memory] = set()  # noqa: RUF012 (shared on purpose)

    async def start(self, namespace: str) -> None:
        await super().start(namespace)
        self.apps.add(self._started())

    async def broadcast(self, command: Command) -> None:
        for memory in self.apps:
            for listener in memory.listeners:
                listener.put_nowait(command)


class ListensForEver(Broker):
    """Stopping it leaves its listeners waiting."""

    async def commands(self) -> AsyncIterator[Command]:
        listener: asyncio.Queue[Command | None] = asyncio.Queue()
        self._started().listeners.add(listener)
        while True:
            command = await listener.get()
            assert command is not None
            yield command


class MigratesAnew(Broker):
    """It begins by clearing away what is there."""

    async def migrate(self, namespace: str) -> list[str]:
        if self._memory is not None:
            self._memory.queues.clear()
        return []


class ShufflesABatch(Broker):
    """It promises the order of a queue, and puts the messages of one batch in as it likes."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish(sorted(messages, key=lambda message: message.uuid[::-1]))


class ForgetsWhoHolds(Broker):
    """It promises that leases survive its server, which gives back all that was held."""

    async def start(self, namespace: str) -> None:
        await super().start(namespace)
        self.server.on_kill.append(self._release_all)

    def _release_all(self) -> None:
        if self._memory is not None:
            for queue in self._memory.queues.values():
                for entry in queue.in_flight.values():
                    entry.held_until = 0.0
