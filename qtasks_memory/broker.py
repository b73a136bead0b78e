"""A broker in memory: two heaps a queue, and a dict of what is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from weakref import WeakSet

from qtasks_core import (
    DONE,
    LOST,
    Ack,
    Broker,
    Command,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed, refuse_transaction
from qtasks_core.options import LEASE_TIME
from qtasks_core.recent import Recent, repeat_key
from qtasks_memory.connection import Entry, Memory, connect


class MemoryBroker(Broker):
    """Moves messages within one process. `lease` is in seconds."""

    def __init__(self, name: str = "", *, lease: float = 30.0) -> None:
        self._name = name
        self._lease = LEASE_TIME.checked("lease", lease)
        self._memory: Memory | None = None
        self._subscriptions: WeakSet[MemorySubscription] = WeakSet()
        self._listeners: set[asyncio.Queue[Command | None]] = set()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="MemoryBroker",
            survives="nothing",
            durability="messages end with the process",
            lease=self._lease,
            order="queue",
            counts_deliveries=True,
            atomic_retries=True,
            priorities=True,
        )

    async def start(self, namespace: str) -> None:
        self._memory = connect(self._name, namespace)

    async def stop(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        for listener in self._listeners:
            listener.put_nowait(None)
        self._memory = None

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        refuse_transaction(self, transaction)
        memory = self._started()
        now = asyncio.get_running_loop().time()
        for message in messages:
            due = now + message.delay if message.delay > 0 else 0.0
            memory.queues[message.queue].put(Entry(message), due)
        memory.ring()
        return [DONE] * len(messages)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = MemorySubscription(self._started(), self._lease)
        self._subscriptions.add(subscription)
        return subscription

    async def depth(self, queue: str) -> QueueDepth:
        return self._started().queues[queue].depth(asyncio.get_running_loop().time())

    async def purge(self, queue: str) -> int:
        return self._started().queues[queue].purge(asyncio.get_running_loop().time())

    async def broadcast(self, command: Command) -> None:
        for listener in self._started().listeners:
            listener.put_nowait(command)

    async def commands(self) -> AsyncIterator[Command]:
        memory = self._started()
        listener: asyncio.Queue[Command | None] = asyncio.Queue()
        self._listeners.add(listener)
        memory.listeners.add(listener)
        try:
            while (command := await listener.get()) is not None:
                yield command
        finally:
            self._listeners.discard(listener)
            memory.listeners.discard(listener)
        raise Closed("MemoryBroker is stopped")

    async def migrate(self, namespace: str) -> list[str]:
        return []  # there is no server

    def _started(self) -> Memory:
        if self._memory is None:
            raise Closed("MemoryBroker is not started")
        return self._memory


class MemorySubscription(Subscription):
    """Takes entries and holds them; the fence is the number of the delivery."""

    def __init__(self, memory: Memory, lease: float) -> None:
        self._memory = memory
        self._lease = lease
        self._loop = asyncio.get_running_loop()
        self._bell = asyncio.Event()
        memory.receivers.add(self._bell)
        self._settled = Recent()
        self._open = True

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        while self._open:
            self._bell.clear()
            deliveries = self._take(wanted, limit)
            if deliveries:
                return deliveries
            changes = (self._memory.queues[queue].next_change() for queue in wanted)
            next_change = min((c for c in changes if c is not None), default=None)
            try:
                async with asyncio.timeout_at(next_change):
                    await self._bell.wait()
            except TimeoutError:
                continue
        raise Closed("the subscription is closed")

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        now = self._loop.time()
        deliveries: list[Delivery] = []
        for name, most in wanted.items():
            queue = self._memory.queues[name]
            for _ in range(min(most, limit - len(deliveries))):
                entry = queue.pop(now)
                if entry is None:
                    break
                entry.count += 1
                entry.holder = next(self._memory.deliveries)
                entry.held_until = now + self._lease
                queue.in_flight[entry.holder] = entry
                deliveries.append(Delivery(entry.message, name, entry.holder, entry.count))
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        outcomes = [self._settle(settlement) for settlement in settlements]
        self._memory.ring()
        return outcomes

    def _settle(self, settlement: Settlement) -> Outcome:
        delivery = settlement.delivery
        key = repeat_key(settlement)
        if key in self._settled:
            return DONE
        queue = self._memory.queues[delivery.queue]
        entry = self._mine(delivery)
        if entry is None:
            return LOST
        del queue.in_flight[delivery.fence]
        self._settled.add(key)
        if isinstance(settlement, Ack):
            return DONE
        if isinstance(settlement, Retry):
            message = settlement.message
            due = self._loop.time() + message.delay if message.delay > 0 else 0.0
            self._memory.queues[message.queue].put(Entry(message), due)
        else:
            queue.put(entry)
        return DONE

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        extended: list[Delivery | None] = []
        for delivery in deliveries:
            entry = self._mine(delivery)
            if entry is not None:
                entry.held_until = self._loop.time() + self._lease
            extended.append(delivery if entry is not None else None)
        return extended

    def _mine(self, delivery: Delivery) -> Entry | None:
        """Return the entry while its lease holds."""
        entry = self._memory.queues[delivery.queue].in_flight.get(delivery.fence)
        return entry if entry is not None and entry.held_until > self._loop.time() else None

    async def close(self) -> None:
        self._open = False
        self._memory.receivers.discard(self._bell)
        self._bell.set()
