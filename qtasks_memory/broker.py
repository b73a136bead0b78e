"""A broker in memory: two heaps for each queue, and a dict of the messages in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from weakref import WeakSet

from qtasks_core import (
    DONE,
    Broker,
    Command,
    Guarantees,
    Outcome,
    QueueDepth,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed
from qtasks_core.options import LEASE_TIME
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_memory.connection import Entry, Memory, connect, forget
from qtasks_memory.subscription import MemorySubscription


class MemoryBroker(Broker):
    """Moves messages within one process. `lease` is in seconds."""

    def __init__(self, name: str = "", *, lease: float = 30.0) -> None:
        self._name = name
        self._lease = LEASE_TIME.checked("lease", lease)
        self._memory: Memory | None = None
        self._namespace = ""
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
        self._namespace = namespace

    async def stop(self) -> None:
        await together([subscription.close() for subscription in self._subscriptions])
        for listener in self._listeners:
            listener.put_nowait(None)
        self._memory = None

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        memory = self._started()
        now = memory.clock.now()
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
        memory = self._started()
        return memory.queues[queue].depth(memory.clock.now())

    async def purge(self, queue: str) -> int:
        memory = self._started()
        return memory.queues[queue].purge(memory.clock.now())

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

    async def clock(self) -> float | None:
        return self._started().clock.unix_time()

    def travel(self, seconds: float) -> float:
        """For tests: stop the clock of this memory, and move it `seconds` ahead.

        It is the clock of delays, leases, claims, `expires=` and retention. After the first call it
        moves only by further calls. Returns the time at which it stands, in seconds.
        """
        memory = self._started()
        now = memory.clock.travel(seconds)
        memory.ring()
        return now

    def forget(self) -> None:
        """For tests: drop everything that brokers and storages of this name have stored."""
        self._started()
        forget(self._name, self._namespace)

    def _started(self) -> Memory:
        if self._memory is None:
            raise Closed("MemoryBroker is not started")
        return self._memory
