"""What a test sees of an app: a broker that notes what is enqueued and what is settled.

It works with any broker. A tester's worker receives through it one delivery at a time, and only
what is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from typing import Any

from qtasks_core import (
    Ack,
    Broker,
    Command,
    Completion,
    Composition,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Raw,
    Retry,
    Settlement,
    Storage,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import Closed
from qtasks_core.separate import compose


class Ledger:
    """The messages that an app has enqueued, and those that are not settled.

    It lives on the I/O thread. Times are in seconds, by `now`.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.enqueued: list[TaskMessage] = []
        """What the app has enqueued, in order. Retries are not among them."""
        self._waiting: dict[str, tuple[float, TaskMessage]] = {}
        """By uuid, in order of enqueuing: when a message that is not settled is due."""
        self._held: set[str] = set()
        self.undecided: list[TaskMessage] = []
        """Messages in transactions of the caller, which may be rolled back."""
        self.round: Round | None = None
        """The round that a tester's worker is at. None: workers receive freely."""

    def due(self) -> list[TaskMessage]:
        """Return the messages that are due and not held, the first enqueued first."""
        now = self.now()
        return [
            message
            for uuid, (due, message) in self._waiting.items()
            if due <= now and uuid not in self._held
        ]

    async def note(
        self,
        messages: Sequence[TaskMessage],
        call: Callable[[], Coroutine[Any, Any, list[Outcome]]],
    ) -> list[Outcome]:
        """Enqueue messages by `call`, and note those that are enqueued."""
        # Noted before the call: a worker may settle a message before the call returns.
        early: dict[str, TaskMessage] = {}
        for message in messages:
            if message.uuid not in self._waiting:
                early[message.uuid] = message
                self._put(message)
        done: list[TaskMessage] = []
        try:
            outcomes = await call()
            # Others were refused, or their key was taken.
            done = [m for m, o in zip(messages, outcomes, strict=True) if o.status == "done"]
        finally:
            for uuid in early.keys() - {message.uuid for message in done}:
                self._waiting.pop(uuid, None)
            for message in done:
                self.enqueued.append(message)
                waits = message.uuid in self._waiting
                if message.uuid not in early or (waits and early[message.uuid] is not message):
                    self._put(message)
            self.changed()
        return outcomes

    async def look_at_transactions(self, storage: Storage) -> None:
        """Note the messages whose transactions have been committed: they have a record now."""
        looked, self.undecided = self.undecided, []
        records = await storage.get([message.uuid for message in looked]) if looked else []
        for message, record in zip(looked, records, strict=True):
            if record is None:
                self.undecided.append(message)
            else:
                self.enqueued.append(message)
                self._put(message)

    def _put(self, message: TaskMessage) -> None:
        self._waiting.pop(message.uuid, None)
        self._waiting[message.uuid] = (self.now() + message.delay, message)

    def hold(self, deliveries: Iterable[Delivery]) -> None:
        """Note what a worker has received."""
        self._held.update(_uuid_of(delivery) for delivery in deliveries)

    async def settle(
        self,
        settlements: Sequence[Settlement],
        call: Callable[[], Coroutine[Any, Any, list[Outcome]]],
    ) -> list[Outcome]:
        """Settle deliveries by `call`, and note that. Call `changed` afterwards."""
        for settlement in settlements:  # before the call, for the same reason
            if isinstance(settlement, Ack):
                self._waiting.pop(_uuid_of(settlement.delivery), None)
            elif isinstance(settlement, Retry):
                self._put(settlement.message)
        try:
            return await call()
        finally:
            self._held.difference_update(_uuid_of(s.delivery) for s in settlements)

    def purge(self, queue: str) -> None:
        """Note that a queue was purged."""
        for uuid, (_, message) in list(self._waiting.items()):
            if message.queue == queue and uuid not in self._held:
                del self._waiting[uuid]
        self.changed()

    @property
    def held(self) -> int:
        """How many deliveries workers have and have not settled."""
        return len(self._held)

    def changed(self) -> None:
        """Have the current round look at what has changed."""
        if self.round is not None:
            self.round.look()


def _uuid_of(delivery: Delivery) -> str:
    return "" if isinstance(delivery.message, Raw) else delivery.message.uuid


class Round:
    """What one worker of a tester may receive: due messages of its queues, until there are none.

    `runs`: most runs; None: no limit. `concurrency`: most deliveries that it holds at once.
    """

    def __init__(
        self, ledger: Ledger, queues: Collection[str], runs: int | None, concurrency: int
    ) -> None:
        self._ledger = ledger
        self.queues = queues
        self._left = runs
        self._concurrency = concurrency
        self.records: list[Task] = []
        """The record of each run that has finished, in order."""
        self.received: set[str] = set()
        """The names of the tasks that were received."""
        self.over = asyncio.Event()
        self._changed = asyncio.Event()

    async def next_queue(self) -> str:
        """Wait until one more message may be received, and return its queue.

        Raises `Closed` when the round is over.
        """
        while True:
            self._changed.clear()
            if self.over.is_set():
                raise Closed("the round is over")
            if (queue := self._next()) is not None:
                return queue
            await self._changed.wait()

    def _next(self) -> str | None:
        if self._left == 0 or self._ledger.held >= self._concurrency:
            return None
        due = (message.queue for message in self._ledger.due())
        return next((queue for queue in due if queue in self.queues), None)

    def finished(self, record: Task) -> None:
        """Note the record of a run."""
        self.records.append(record)
        if self._left is not None:
            self._left -= 1

    def look(self) -> None:
        """Look whether the round is over, or goes on."""
        if self._ledger.held == 0 and self._next() is None:
            self.over.set()
        self._changed.set()


class ObservedBroker(Broker):
    """Passes all calls on to a broker, and notes in a ledger what changes there."""

    def __init__(self, broker: Broker, ledger: Ledger) -> None:
        self._broker = broker
        self._ledger = ledger
        self.driver_loggers = broker.driver_loggers

    @property
    def guarantees(self) -> Guarantees:
        return self._broker.guarantees

    async def start(self, namespace: str) -> None:
        await self._broker.start(namespace)

    async def stop(self) -> None:
        await self._broker.stop()

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        publish = partial(self._broker.publish, messages, transaction)
        if transaction is not None:
            return await publish()  # the storage does not tell whether that is committed
        return await self._ledger.note(messages, publish)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = await self._broker.subscribe(queues)
        return ObservedSubscription(subscription, self._ledger, self._ledger.round)

    async def clock(self) -> float | None:
        return await self._broker.clock()

    async def refresh(self) -> None:
        await self._broker.refresh()

    async def depth(self, queue: str) -> QueueDepth:
        return await self._broker.depth(queue)

    async def purge(self, queue: str) -> int:
        dropped = await self._broker.purge(queue)
        self._ledger.purge(queue)
        return dropped

    async def broadcast(self, command: Command) -> None:
        await self._broker.broadcast(command)

    def commands(self) -> AsyncIterator[Command]:
        return self._broker.commands()

    async def migrate(self, namespace: str) -> list[str]:
        return await self._broker.migrate(namespace)

    def join(self, storage: Storage) -> Composition:
        return ObservedComposition(compose(self._broker, storage), self._ledger)


class ObservedSubscription(Subscription):
    """Notes what is received. In a round, it receives only what the round allows."""

    def __init__(self, subscription: Subscription, ledger: Ledger, round: Round | None) -> None:
        self.inner = subscription
        self._ledger = ledger
        self._round = round

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        if self._round is not None:
            wanted, limit = {await self._round.next_queue(): 1}, 1
        deliveries = await self.inner.receive(wanted, limit)
        self._ledger.hold(deliveries)
        if self._round is not None:
            messages = (delivery.message for delivery in deliveries)
            self._round.received.update(m.task_name for m in messages if not isinstance(m, Raw))
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        outcomes = await self._ledger.settle(settlements, partial(self.inner.settle, settlements))
        self._ledger.changed()
        return outcomes

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        return await self.inner.extend(deliveries)

    async def close(self) -> None:
        if self._round is not None:
            self._round.over.set()
            self._round.look()
        await self.inner.close()


class ObservedComposition(Composition):
    """Notes what is submitted and completed."""

    def __init__(self, composition: Composition, ledger: Ledger) -> None:
        self._composition = composition
        self._ledger = ledger

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        submit = partial(self._composition.submit, messages, transaction)
        if transaction is None:
            return await self._ledger.note(messages, submit)
        outcomes = await submit()
        done = [m for m, o in zip(messages, outcomes, strict=True) if o.status == "done"]
        self._ledger.undecided += done
        return outcomes

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        return await self._composition.admit(deliveries)

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        inner = subscription.inner if isinstance(subscription, ObservedSubscription) else None
        settlements = [c.settlement for c in completions if c.settlement is not None]
        complete = partial(self._composition.complete, inner or subscription, completions)
        outcomes = await self._ledger.settle(settlements, complete)
        if (round := self._ledger.round) is not None:
            for completion in completions:
                ran = isinstance(completion.settlement, Ack | Retry)
                if ran and completion.task is not None:
                    round.finished(completion.task)
        self._ledger.changed()
        return outcomes
