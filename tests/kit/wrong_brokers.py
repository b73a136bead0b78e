"""Brokers that are wrong on purpose, each in one way, each named for what it does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from qtasks_core import (
    DONE,
    Ack,
    Completion,
    Composition,
    Delivery,
    Guarantees,
    Outcome,
    Release,
    Retry,
    Settlement,
    Storage,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import ConfigurationError
from qtasks_core.receivers import Recent
from qtasks_core.records import record_of
from qtasks_core.separate import SeparateComposition
from qtasks_memory.connection import Entry, Memory, connect
from qtasks_memory.subscription import MemorySubscription
from tests.kit.served import Broker


class LosesOnCrash(Broker):
    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return MemorySubscription(self._started(), lease=1e6)


class SharesTheFirstLease(Broker):
    """The lease of who subscribes first is everybody's."""

    leases: ClassVar[WeakKeyDictionary[Memory, float]] = WeakKeyDictionary()

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        memory = self._started()
        return MemorySubscription(memory, self.leases.setdefault(memory, self._lease))


class StartsEarly(Broker):
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish([replace(m, delay=m.delay * 0.9) for m in messages])

    class subscription(MemorySubscription):
        def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            # The message is shown as it was sent: only the time is wrong.
            return [
                Delivery(shown(d.message), d.queue, d.fence, d.count)
                for d in super()._take(wanted, limit)
            ]


def shown(message: object) -> TaskMessage:
    assert isinstance(message, TaskMessage)
    return replace(message, delay=round(message.delay / 0.9, 6))


class StartsLate(Broker):
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        late = [m for m in messages if m.delay > 0]
        await super().publish([m for m in messages if m.delay <= 0])
        loop = asyncio.get_running_loop()
        for message in late:
            entry = Entry(message)
            self._started().queues[message.queue].put(entry, loop.time() + message.delay + 2.5)
        self._started().ring()
        return [DONE] * len(messages)


class RetriesEarly(Broker):
    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            return await super().settle([hurried(settlement) for settlement in settlements])


def hurried(settlement: Settlement) -> Settlement:
    if not isinstance(settlement, Retry):
        return settlement
    message = settlement.message
    return Retry(settlement.delivery, replace(message, delay=message.delay / 2))


class WakesLate(Broker):
    """A new earliest delay does not wake who sleeps towards a later one."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        memory = self._started()
        now = asyncio.get_running_loop().time()
        for message in messages:
            due = now + message.delay if message.delay > 0 else 0.0
            memory.queues[message.queue].put(Entry(message), due)
        if any(message.delay <= 0 for message in messages):
            memory.ring()
        return [DONE] * len(messages)


class IsDeaf(Broker):
    """Publishing wakes nobody: who waits already goes on waiting."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        for message in messages:
            self._started().queues[message.queue].put(Entry(message))
        return [DONE] * len(messages)


class DelaysTwice(Broker):
    """A delay beyond the lease is taken for a lost delivery."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        long = [message for message in messages if message.delay > self._lease]
        await super().publish(long)
        return await super().publish(messages)


class StrandsOnCancel(Broker):
    class subscription(MemorySubscription):
        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            deliveries = await super().receive(wanted, limit)
            await asyncio.sleep(0.002)
            return deliveries


class DoublesOnCancel(Broker):
    class subscription(MemorySubscription):
        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            deliveries = await super().receive(wanted, limit)
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError:
                for delivery in deliveries:
                    assert isinstance(delivery.message, TaskMessage)
                    for _ in range(2):
                        self._memory.queues[delivery.queue].put(Entry(delivery.message))
                raise
            return deliveries


class ObeysLostLeases(Broker):
    """The last word counts, whoever says it."""

    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            take_over(self, settlement.delivery)
            return super()._settle(settlement)


class ObeysSecretly(Broker):
    """It says that the lease was lost, and acknowledges all the same."""

    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            outcome = super()._settle(settlement)
            if outcome.status == "refused":
                take_over(self, settlement.delivery)
                super()._settle(settlement)
            return outcome


class ExtendsLostLeases(Broker):
    class subscription(MemorySubscription):
        async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
            return list(deliveries)


def take_over(subscription: MemorySubscription, delivery: Delivery) -> None:
    """Make a delivery that another holds by now the subscription's own again."""
    held = subscription._memory.queues[delivery.queue].in_flight
    for holder, entry in list(held.items()):
        if same(entry.message, delivery.message) and holder != delivery.fence:
            held[delivery.fence] = held.pop(holder)


def same(one: object, other: object) -> bool:
    return (
        isinstance(one, TaskMessage) and isinstance(other, TaskMessage) and one.uuid == other.uuid
    )


class StealsLeases(Broker):
    """Extending is answered, but does nothing."""

    class subscription(MemorySubscription):
        async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
            return [delivery if self._mine(delivery) else None for delivery in deliveries]


class SaysDoneToAll(Broker):
    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            return [DONE for _ in await super().settle(settlements)]


class MixesOutcomesUp(Broker):
    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            return list(reversed(await super().settle(settlements)))


class SwallowsOutcomes(Broker):
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return (await super().publish(messages))[:1]

    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            return (await super().settle(settlements))[:1]


class ReleasesIntoNothing(Broker):
    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            if isinstance(settlement, Release):
                settlement = Ack(settlement.delivery)
            return super()._settle(settlement)


class RetriesAgainAndAgain(Broker):
    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            if isinstance(settlement, Retry):
                self._memory.queues[settlement.message.queue].put(Entry(settlement.message))
                settlement = Ack(settlement.delivery)
            return super()._settle(settlement)


class ForgetsWhatItSettled(Broker):
    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            self._settled = Recent()
            return super()._settle(settlement)


class SaysDoneToWhatDiffers(Broker):
    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            seen = self.__dict__.setdefault("seen", set())
            outcome = super()._settle(settlement)
            outcome = DONE if settlement.delivery.fence in seen else outcome
            seen.add(settlement.delivery.fence)
            return outcome


class GivesTooMuch(Broker):
    class subscription(MemorySubscription):
        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            return await super().receive(dict.fromkeys(wanted, 10), 10)


class DeliversToBoth(Broker):
    class subscription(MemorySubscription):
        def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            deliveries = super()._take(wanted, limit)
            for delivery in deliveries:
                if delivery.count == 1:
                    self._memory.queues[delivery.queue].put(
                        self._memory.queues[delivery.queue].in_flight[delivery.fence]
                    )
            return deliveries


class LosesHeaders(Broker):
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish([replace(message, headers={}) for message in messages])


class MixesNamespaces(Broker):
    async def start(self, namespace: str) -> None:
        self._memory = connect("", "everybody")


class JoinsNames(Broker):
    """Namespace and queue are joined by a dot, and nobody can tell where the dot belongs."""

    def _joined(self, namespace: str, queue: str) -> str:
        return f"{namespace}.{queue}"

    async def start(self, namespace: str) -> None:
        self._memory = connect("", "joined")
        self._namespace = namespace

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        for message in messages:
            queue = self._joined(self._namespace, message.queue)
            self._started().queues[queue].put(Entry(message))
        self._started().ring()
        return [DONE] * len(messages)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        namespace = self._namespace

        class Joined(MemorySubscription):
            def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
                joined = {f"{namespace}.{queue}": most for queue, most in wanted.items()}
                return super()._take(joined, limit)

        return Joined(self._started(), self._lease)


class Hoards(Broker):
    """It fetches more than it returns, and takes it to the grave."""

    class subscription(MemorySubscription):
        _fetched: tuple[Delivery, ...] = ()

        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            if not self._fetched or not self._open:
                self._fetched = tuple(await super().receive(dict.fromkeys(wanted, 100), 100))
            some, self._fetched = self._fetched[:limit], self._fetched[limit:]
            return list(some)


class DropsAllOnClose(Broker):
    """Closing gives back what was returned as well, so that it cannot be settled any more."""

    class subscription(MemorySubscription):
        async def close(self) -> None:
            for queue in self._memory.queues.values():
                for entry in list(queue.in_flight.values()):
                    queue.put(entry)
                queue.in_flight.clear()
            self._memory.ring()
            await super().close()


class WaitsAfterClose(Broker):
    class subscription(MemorySubscription):
        async def close(self) -> None:
            self._memory.receivers.discard(self._bell)


class IgnoresPriorities(Broker):
    """It keeps messages in the order in which they came."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        flat = [replace(m, priority=5, headers={"was": str(m.priority)}) for m in messages]
        return await super().publish(flat)

    class subscription(MemorySubscription):
        def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            return [
                Delivery(replace(message, priority=int(message.headers["was"])), d.queue, d.fence)
                for d in super()._take(wanted, limit)
                if isinstance(message := d.message, TaskMessage)
            ]


class CountsNothing(Broker):
    class subscription(MemorySubscription):
        def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            taken = super()._take(wanted, limit)
            return [Delivery(d.message, d.queue, d.fence, 1) for d in taken]


class PromisesLess(Broker):
    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, counts_deliveries=False)


class HangsWhenDown(Broker):
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if not self.server.up:
            await asyncio.sleep(3600.0)
        return await super().publish(messages)


class StartsOnce(Broker):
    """What could not start stays broken."""

    tried = False

    async def start(self, namespace: str) -> None:
        if self.tried:
            raise ConfigurationError("it has been started before")
        self.tried = True
        await super().start(namespace)


class UsesWhatIsStopped(Broker):
    """Before `start` and after `stop` it pretends to work."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish(messages) if self._memory else [DONE] * len(messages)


class LiesWhenDown(Broker):
    """What is published while the server is down is answered with `done` and lost."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish(messages) if self.server.up else [DONE] * len(messages)


class Composes(Broker):
    """A broker whose composition is wrong."""

    composition: type[SeparateComposition]

    def join(self, storage: Storage) -> Composition:
        return self.composition(self, storage)


class SettlesFirst(Composes):
    class composition(SeparateComposition):
        async def complete(
            self, subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            settled = [Completion(c.settlement, None) for c in completions]
            outcomes = await super().complete(subscription, settled)
            await super().complete(subscription, [Completion(None, c.task) for c in completions])
            return outcomes


class RecordsRetriesFirst(Composes):
    class composition(SeparateComposition):
        async def complete(
            self, subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            await super().complete(subscription, [Completion(None, c.task) for c in completions])
            return await super().complete(subscription, completions)


class RecordsLostRetries(Composes):
    class composition(SeparateComposition):
        async def complete(
            self, subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            outcomes = await super().complete(subscription, completions)
            for completion in completions:
                if completion.task is not None:
                    await self._storage.save([completion.task])
            return outcomes


class KeepsWhatWasRefused(Composes):
    """A refused record leaves its delivery unsettled: it comes again and again."""

    class composition(SeparateComposition):
        async def complete(
            self, subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            saved = [Completion(None, c.task) for c in completions]
            outcomes = await super().complete(subscription, saved)
            for completion, outcome in zip(completions, outcomes, strict=True):
                if outcome.status == "refused" and completion.settlement is not None:
                    await subscription.settle([Release(completion.settlement.delivery)])
            kept = [c for c, o in zip(completions, outcomes, strict=True) if o.status == "done"]
            await super().complete(subscription, kept)
            return outcomes


class RunsWhatIsFinal(Composes):
    class composition(SeparateComposition):
        async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
            return [("run", record) for _, record in await super().admit(deliveries)]


class RecordsNothingNew(Composes):
    class composition(SeparateComposition):
        async def submit(
            self, messages: Sequence[TaskMessage], transaction: object | None = None
        ) -> list[Outcome]:
            return await self._broker.publish(messages)


class RefusesLongNames(Broker):
    """Its server has room for 63 characters, and it leaves that to the caller."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        outcomes = await super().publish(messages, transaction)
        return [
            Outcome("refused", "too long") if len(message.queue) > 63 else outcome
            for message, outcome in zip(messages, outcomes, strict=True)
        ]


class CutsLongUuids(Broker):
    """Its server has room for 63 characters, and it cuts what is longer."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish([replace(m, uuid=m.uuid[:63]) for m in messages])


class RefusesLongUuids(Broker):
    """Its server has room for 255 bytes, and it counts characters."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        outcomes = await super().publish(messages, transaction)
        return [
            Outcome("refused", "too long") if len(message.uuid.encode()) > 255 else outcome
            for message, outcome in zip(messages, outcomes, strict=True)
        ]


class RunsEveryCopy(Composes):
    """The submission is not compared."""

    class composition(SeparateComposition):
        async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
            admitted = await super().admit(deliveries)
            return [("run" if verdict == "stale" else verdict, r) for verdict, r in admitted]


class AdmitsWithoutRecording(Composes):
    """What has a key and no record runs, and leaves the key to others meanwhile."""

    class composition(SeparateComposition):
        async def _records(self, messages: Sequence[TaskMessage]) -> dict[str, Task]:
            records = await self._storage.get([message.uuid for message in messages])
            return {record.uuid: record for record in records if record is not None}


class RecordsForItself(Composes):
    """The first record that a worker saves is not that of the message."""

    class composition(SeparateComposition):
        async def _records(self, messages: Sequence[TaskMessage]) -> dict[str, Task]:
            first = [replace(record_of(message), execution="worker") for message in messages]
            await self._storage.save(first)
            return await super()._records(messages)


class RecordsBeforeItPublishes(Composes):
    """A key is held by a record whose message may never come."""

    class composition(SeparateComposition):
        async def submit(
            self, messages: Sequence[TaskMessage], transaction: object | None = None
        ) -> list[Outcome]:
            saved = await self._storage.save([record_of(message) for message in messages])
            mine = [m for m, o in zip(messages, saved, strict=True) if o.status == "done"]
            await self._broker.publish(mine)
            return saved


class RecordsWithoutTheSubmission(Composes):
    """All first records look alike."""

    class composition(SeparateComposition):
        async def _record(
            self, messages: Sequence[TaskMessage], published: Sequence[Outcome]
        ) -> list[Outcome]:
            plain = [replace(message, submission="") for message in messages]
            return await self._storage.save([record_of(message) for message in plain])


class SubmitsWhateverTheTransaction(Composes):
    """It writes at once, whatever the caller's transaction does."""

    class composition(SeparateComposition):
        async def submit(
            self, messages: Sequence[TaskMessage], transaction: object | None = None
        ) -> list[Outcome]:
            return await super().submit(messages)


class PublishesAgain(Composes):
    """It does not remember what it has published."""

    class composition(SeparateComposition):
        def _remember(self, messages: Sequence[TaskMessage], published: Sequence[Outcome]) -> None:
            pass


class DropsRepeats(Broker):
    """It takes any message of a uuid that is in the queue for the same."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        known = self.__dict__.setdefault("known", set())
        fresh = [m for m in messages if m.attempt > 1 or m.uuid not in known]
        known.update(message.uuid for message in messages)
        await super().publish(fresh)
        return [DONE] * len(messages)


class LosesTheSubmission(Broker):
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish([replace(m, submission="") for m in messages])
