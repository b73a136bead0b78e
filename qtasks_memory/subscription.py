"""A subscription in memory: a lease is a time in an entry."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from qtasks_core import (
    DONE,
    LOST,
    Ack,
    Delivery,
    Outcome,
    Retry,
    Settlement,
    Subscription,
)
from qtasks_core.errors import Closed
from qtasks_core.receivers import Recent, repeat_key
from qtasks_memory.connection import Entry, Memory


class MemorySubscription(Subscription):
    """Takes entries and holds them. The fence is the number of the delivery."""

    def __init__(self, memory: Memory, lease: float) -> None:
        self._memory = memory
        self._lease = lease
        self._clock = memory.clock
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
                async with asyncio.timeout_at(self._clock.when(next_change)):
                    await self._bell.wait()
            except TimeoutError:
                continue
        raise Closed("the subscription is closed")

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        now = self._clock.now()
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
            due = self._clock.now() + message.delay if message.delay > 0 else 0.0
            self._memory.queues[message.queue].put(Entry(message), due)
        else:
            queue.put(entry)
        return DONE

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        extended: list[Delivery | None] = []
        for delivery in deliveries:
            entry = self._mine(delivery)
            if entry is not None:
                entry.held_until = self._clock.now() + self._lease
            extended.append(delivery if entry is not None else None)
        return extended

    def _mine(self, delivery: Delivery) -> Entry | None:
        """Return the entry while its lease holds."""
        entry = self._memory.queues[delivery.queue].in_flight.get(delivery.fence)
        return entry if entry is not None and entry.held_until > self._clock.now() else None

    async def close(self) -> None:
        self._open = False
        self._memory.receivers.discard(self._bell)
        self._bell.set()
