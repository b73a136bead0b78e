"""A broker on a shelf."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from weakref import WeakSet

from qtasks_core import (
    DONE,
    LOST,
    Broker,
    Command,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Release,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed
from qtasks_core.options import LEASE_TIME
from qtasks_core.receivers import Recent, repeat_key
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import decode_command, decode_message, encode_command, encode_message
from qtasks_shelf.shelf import Row, Shelf, connect


class ShelfBroker(Broker):
    def __init__(self, name: str = "", *, lease: float = 30.0) -> None:
        self._name = name
        self.lease = LEASE_TIME.checked("lease", lease)
        self._shelf: Shelf | None = None
        self._subscriptions: WeakSet[ShelfSubscription] = WeakSet()
        self._listeners: set[asyncio.Queue[bytes]] = set()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="ShelfBroker",
            survives="nothing",
            durability="messages end with the process",
            lease=self.lease,
            counts_deliveries=True,
            atomic_retries=True,
            order="queue",
        )

    async def start(self, namespace: str) -> None:
        self._shelf = connect(self._name, namespace)

    async def stop(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        for listener in self._listeners:
            listener.put_nowait(b"")
        self._shelf = None

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        shelf = self.started()
        for message in messages:
            shelf.put(message.queue, encode_message(message), message.delay)
        return [DONE] * len(messages)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = ShelfSubscription(self.started(), self.lease)
        self._subscriptions.add(subscription)
        return subscription

    async def depth(self, queue: str) -> QueueDepth:
        rows = [row for row in self.started().rows.values() if row.queue == queue]
        now = asyncio.get_running_loop().time()
        later = [row for row in rows if row.wake_at > now]
        in_flight = sum(row.holder != 0 for row in later)
        return QueueDepth(len(rows) - len(later), len(later) - in_flight, in_flight)

    async def purge(self, queue: str) -> int:
        rows = self.started().rows
        now = asyncio.get_running_loop().time()
        free = [
            n for n, r in rows.items() if r.queue == queue and not (r.holder and r.wake_at > now)
        ]
        for number in free:
            del rows[number]
        return len(free)

    async def broadcast(self, command: Command) -> None:
        for listener in self.started().listeners:
            listener.put_nowait(encode_command(command))

    async def commands(self) -> AsyncIterator[Command]:
        shelf = self.started()
        listener: asyncio.Queue[bytes] = asyncio.Queue()
        shelf.listeners.add(listener)
        self._listeners.add(listener)
        try:
            while data := await listener.get():
                yield decode_command(data)
        finally:
            shelf.listeners.discard(listener)
            self._listeners.discard(listener)
        raise Closed("ShelfBroker is stopped")

    async def migrate(self, namespace: str) -> list[str]:
        return []  # a shelf needs nothing

    def started(self) -> Shelf:
        if self._shelf is None:
            raise Closed("ShelfBroker is not started")
        return self._shelf


class ShelfSubscription(Subscription):
    """The fence of a delivery is the row's number and the number of the delivery."""

    def __init__(self, shelf: Shelf, lease: float) -> None:
        self._shelf = shelf
        self._lease = lease
        self._loop = asyncio.get_running_loop()
        self._bell = asyncio.Event()
        shelf.waiting.add(self._bell)
        self._settled = Recent()
        self._open = True

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        while self._open:
            # Cleared before looking: a message that is put from now on sets it again.
            self._bell.clear()
            deliveries = self._take(wanted, limit)
            if deliveries:
                return deliveries
            moments = [row.wake_at for row in self._shelf.rows.values() if row.queue in wanted]
            try:
                async with asyncio.timeout_at(min(moments, default=None)):
                    await self._bell.wait()
            except TimeoutError:
                continue
        raise Closed("the subscription is closed")

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        now = self._loop.time()
        deliveries: list[Delivery] = []
        # In the order in which the queues are named, the oldest message of each first.
        for queue, most in wanted.items():
            ready = [
                n for n, r in self._shelf.rows.items() if r.queue == queue and r.wake_at <= now
            ]
            for number in ready[: max(min(most, limit - len(deliveries)), 0)]:
                row = self._shelf.rows[number]
                row.wake_at = now + self._lease
                row.holder = next(self._shelf.numbers)
                row.deliveries += 1
                message = decode_message(row.data)
                deliveries.append(Delivery(message, queue, (number, row.holder), row.deliveries))
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        return [self._settle(settlement) for settlement in settlements]

    def _settle(self, settlement: Settlement) -> Outcome:
        fence = settlement.delivery.fence
        key = repeat_key(settlement)
        if key in self._settled:
            return DONE
        row = self._mine(fence)
        if row is None:
            return LOST
        self._settled.add(key)
        if isinstance(settlement, Release):
            row.wake_at = row.holder = 0
            self._shelf.ring()
            return DONE
        del self._shelf.rows[fence[0]]
        if isinstance(settlement, Retry):
            message = settlement.message
            self._shelf.put(message.queue, encode_message(message), message.delay)
        return DONE

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        extended: list[Delivery | None] = []
        for delivery in deliveries:
            row = self._mine(delivery.fence)
            if row is not None:
                row.wake_at = self._loop.time() + self._lease
            extended.append(delivery if row is not None else None)
        return extended

    def _mine(self, fence: tuple[int, int]) -> Row | None:
        number, holder = fence
        row = self._shelf.rows.get(number)
        held = row is not None and row.holder == holder and row.wake_at > self._loop.time()
        return row if held else None

    async def close(self) -> None:
        self._open = False
        self._shelf.waiting.discard(self._bell)
        self._bell.set()
