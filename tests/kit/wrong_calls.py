"""Parts that are wrong when calls are cancelled, run side by side or are large."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress

from msgspec.structs import replace

from qtasks_core import (
    DONE,
    Ack,
    Command,
    Completion,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Retry,
    Settlement,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import Unavailable
from qtasks_core.receivers import repeat_key
from qtasks_core.records import record_of
from qtasks_core.separate import SeparateComposition
from qtasks_memory.connection import Entry, Memory
from qtasks_memory.inbox import MemoryInbox
from qtasks_memory.subscription import MemorySubscription
from tests.kit.served import Broker, ServedSubscription, Storage, servers
from tests.kit.wrong_brokers import Composes

ON_ITS_WAY = 0.003
"""Seconds that a call of these takes, in which it may be cancelled."""


class PublishesTooSoon(Broker):
    """What it has begun to publish it takes for published."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        begun: set[str] = self.__dict__.setdefault("begun", set())
        fresh = [message for message in messages if message.uuid not in begun]
        begun.update(message.uuid for message in messages)
        await asyncio.sleep(ON_ITS_WAY)
        await super().publish(fresh)
        return [DONE] * len(messages)


class CancelsItsNeighbours(Broker):
    """Calls share a round trip, and the first that is cancelled takes the others along."""

    _trip: asyncio.Task[None] | None = None

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if self._trip is None or self._trip.done():
            self._trip = asyncio.create_task(asyncio.sleep(ON_ITS_WAY))
        await self._trip
        return await super().publish(messages)


class SettlesTooSoon(Broker):
    """What it has begun to settle it takes for settled."""

    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            begun = self.__dict__.setdefault("begun", set())
            fresh = [s for s in settlements if s.delivery.fence not in begun]
            begun.update(settlement.delivery.fence for settlement in settlements)
            await asyncio.sleep(ON_ITS_WAY)
            await super().settle(fresh)
            return [DONE] * len(settlements)


class RefusesWhatWasCancelled(Broker):
    """It settles, and remembers that only when it can say so."""

    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            outcomes = await super().settle(settlements)
            try:
                await asyncio.sleep(ON_ITS_WAY)
            except asyncio.CancelledError:
                for settlement in settlements:
                    self._settled.discard(repeat_key(settlement))
                raise
            return outcomes


class LosesWhatItExtends(Broker):
    """A delivery whose extension is cancelled is nobody's."""

    class subscription(MemorySubscription):
        async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
            try:
                await asyncio.sleep(ON_ITS_WAY)
            except asyncio.CancelledError:
                for delivery in deliveries:
                    self._memory.queues[delivery.queue].in_flight.pop(delivery.fence, None)
                raise
            return await super().extend(deliveries)


class SubscribesForNobody(Broker):
    """It fetches ahead before it returns the subscription."""

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = MemorySubscription(self._started(), self._lease)
        ahead = subscription._take(queues, 3)
        await asyncio.sleep(ON_ITS_WAY)
        for delivery in ahead:
            held = self._started().queues[delivery.queue]
            held.put(held.in_flight.pop(delivery.fence))
        return subscription


class DropsWhatItTook(Broker):
    """It looks around once more before it hands over, and what it has is lost if that fails."""

    class subscription(MemorySubscription):
        dropped_on: type[BaseException] = BaseException

        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            deliveries = await super().receive(wanted, limit)
            try:
                await asyncio.sleep(0)
            except self.dropped_on:
                await super().settle([Ack(delivery) for delivery in deliveries])
                raise
            return deliveries


class DropsWhatItTookOnErrors(Broker):
    """A cancel it survives, but not an error."""

    class subscription(DropsWhatItTook.subscription):
        dropped_on = OSError


class RetriesInTwoSteps(Broker):
    """The old message goes, and then the new one comes, unless the call is over by then."""

    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            first = [Ack(s.delivery) if isinstance(s, Retry) else s for s in settlements]
            fresh = [repeat_key(settlement) not in self._settled for settlement in first]
            outcomes = await super().settle(first)
            await asyncio.sleep(0)
            for settlement, new in zip(settlements, fresh, strict=True):
                if isinstance(settlement, Retry) and new:
                    message = settlement.message
                    self._memory.queues[message.queue].put(Entry(message))
            return outcomes


class RetriesWithoutDedup(Broker):
    """The new message comes, and then the old one goes: each try leaves one more."""

    class subscription(MemorySubscription):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            for settlement in settlements:
                if isinstance(settlement, Retry) and self._mine(settlement.delivery):
                    message = settlement.message
                    self._memory.queues[message.queue].put(Entry(message))
            await asyncio.sleep(0)
            return await super().settle(
                [Ack(s.delivery) if isinstance(s, Retry) else s for s in settlements]
            )


class HidesACancel(Broker):
    """A cancelled call is told as an outage, and its task goes on."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        try:
            await asyncio.sleep(0)
        except BaseException as error:
            raise Unavailable("the call failed") from error
        return await super().publish(messages)


class ForcesWhatItTook(Broker):
    """What a cancelled receive took is returned by the next, whatever that wants."""

    class subscription(MemorySubscription):
        _taken: tuple[Delivery, ...] = ()

        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            taken, self._taken = self._taken, ()
            if taken:
                return list(taken)
            deliveries = await super().receive(wanted, limit)
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                self._taken = tuple(deliveries)
                raise
            return deliveries


class MakesOneCallAtATime(Broker):
    """A second call beside the first finds its connection taken."""

    class subscription(MemorySubscription):
        _busy = False

        async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
            if self._busy:
                raise Unavailable("the connection is in use")
            self._busy = True
            await asyncio.sleep(0)
            self._busy = False
            return await super().settle(settlements)


class TakesAThousand(Broker):
    """What is more than its server takes at once is left out."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        await super().publish(messages[:1000])
        return [DONE] * len(messages)


class RefusesLargeMessages(Broker):
    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if any(len(message.args) > 1_000_000 for message in messages):
            return [Outcome("refused", "too large")] * len(messages)
        return await super().publish(messages)


class OverflowsDelays(Broker):
    """Seconds in 32 bits, with a sign."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        wrapped = [m if m.delay < 2**31 else replace(m, delay=0.0) for m in messages]
        return await super().publish(wrapped)


class ExtendsInItsOwnOrder(Broker):
    """What is lost is told last."""

    class subscription(MemorySubscription):
        async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
            extended = await super().extend(deliveries)
            return sorted(extended, key=lambda delivery: delivery is None)


class SettlesNothingOnceClosed(Broker):
    """After `close` a retry or a release is taken for an acknowledgement."""

    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            if not self._open:
                settlement = Ack(settlement.delivery)
            return super()._settle(settlement)


class AcknowledgesOnStop(Broker):
    """What is held when it stops is gone."""

    async def stop(self) -> None:
        if self._memory is not None:
            for queue in self._memory.queues.values():
                queue.in_flight.clear()
        await super().stop()


class KeepsCommands(Broker):
    """Who begins to listen is told what was broadcast before."""

    async def broadcast(self, command: Command) -> None:
        self._told().append(command)
        await super().broadcast(command)

    async def commands(self) -> AsyncIterator[Command]:
        for command in self._told():
            yield command
        async for command in super().commands():
            yield command

    def _told(self) -> list[Command]:
        told: list[Command] = self._started().__dict__.setdefault("told", [])
        return told


class IgnoresTransactions(Broker):
    """It publishes at once, whatever becomes of the caller's transaction."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await super().publish(messages)


class Polls(Broker):
    class subscription(MemorySubscription):
        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            while not (deliveries := self._take(wanted, limit)):  # noqa: ASYNC110 (it is wrong)
                await asyncio.sleep(0.02)
            return deliveries


class SubscribesWhenStopped(Broker):
    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return MemorySubscription(self._memory or Memory(), self._lease)


class WaitsForTheServer(Broker):
    """A receive that finds no server waits until there is one."""

    subscription = MemorySubscription


class PublishesWithoutWaiting(Broker):
    """It answers at once and writes in the background, where nobody hears that it failed."""

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        self._writing = asyncio.create_task(self._write(messages))
        return [DONE] * len(messages)

    async def _write(self, messages: Sequence[TaskMessage]) -> None:
        with suppress(Unavailable):
            await super().publish(messages)


class HangsWhenFrozen(Broker):
    """It waits for a server that says nothing for as long as that takes."""

    async def depth(self, queue: str) -> QueueDepth:
        while self.server.frozen:  # noqa: ASYNC110 (it is wrong)
            await asyncio.sleep(0.05)
        return await super().depth(queue)


class DropsWhatWaits(Broker):
    """Who waited while the server was frozen is never told of what comes."""

    class subscription(ServedSubscription):
        async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            freezes = self.server.freezes
            deliveries = await super().receive(wanted, limit)
            if self.server.freezes > freezes:
                await asyncio.Event().wait()
            return deliveries


class LetsPoisonLoop(Broker):
    """Each delivery is the first."""

    class subscription(MemorySubscription):
        def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
            taken = super()._take(wanted, limit)
            return [Delivery(d.message, d.queue, d.fence, 1) for d in taken]


class TakesAttemptsForRepeats(Broker):
    """A retry of the same attempt is the same message to it, which it has."""

    class subscription(MemorySubscription):
        def _settle(self, settlement: Settlement) -> Outcome:
            delivery = settlement.delivery
            if (
                isinstance(settlement, Retry)
                and isinstance(delivery.message, TaskMessage)
                and settlement.message.attempt == delivery.message.attempt
            ):
                settlement = Ack(delivery)
            return super()._settle(settlement)


class SavesTooSoon(Storage):
    """What it has begun to save it takes for saved."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        begun = self.__dict__.setdefault("begun", set())
        names = [(task.uuid, task.execution, task.status) for task in tasks]
        fresh = [task for task, name in zip(tasks, names, strict=True) if name not in begun]
        begun.update(names)
        await asyncio.sleep(ON_ITS_WAY)
        outcomes = await super().save(fresh)
        return outcomes if fresh else [DONE] * len(tasks)


class ReadsTheAnswerOfAnother(Storage):
    """An answer that nobody waited for is taken for that of the next call."""

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        answers = self.__dict__.setdefault("answers", [])
        answers.append(await super().get(uuids))
        await asyncio.sleep(ON_ITS_WAY)
        answer: list[Task | None] = answers.pop(0)
        return answer


class WatchesTooSoon(Storage):
    """What it has begun to watch it takes for watched."""

    class inbox_class(MemoryInbox):
        async def watch(self, uuids: Sequence[str]) -> None:
            begun = self.__dict__.setdefault("begun", set())
            fresh = [uuid for uuid in uuids if uuid not in begun]
            begun.update(uuids)
            await asyncio.sleep(ON_ITS_WAY)
            await super().watch(fresh)


class SavesOneCallAtATime(Storage):
    """A second call beside the first finds its connection taken."""

    _busy = False

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if self._busy:
            raise Unavailable("the connection is in use")
        self._busy = True
        await asyncio.sleep(0)
        self._busy = False
        return await super().save(tasks)


class SavesAThousand(Storage):
    """What is more than its server takes at once is left out."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        await super().save(tasks[:1000])
        return [DONE] * len(tasks)


class RefusesLargeRecords(Storage):
    def _save(self, memory: Memory, task: Task) -> Outcome:
        if len(task.returning or b"") > 1_000_000:
            return Outcome("refused", "too large")
        return super()._save(memory, task)


class TellsTooSoon(Storage):
    """Who waits hears of a record, and then it is saved."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        memory = self._started()
        for task in tasks:
            if task.reply_to in memory.inboxes:
                memory.inboxes[str(task.reply_to)].put_nowait(task)
        await asyncio.sleep(0.01)
        return await super().save([replace(task, reply_to=None) for task in tasks])


class WaitsAfterClose(Storage):
    """A closed inbox goes on waiting."""

    class inbox_class(MemoryInbox):
        async def close(self) -> None:
            self._memory.inboxes.pop(self._address, None)


class LeavesStreamsOfTheExpired(Storage):
    async def expire(self) -> int:
        streams = dict(self._started().streams)
        expired = await super().expire()
        self._started().streams.update(streams)
        return expired


class HidesItsRetention(Storage):
    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, retention=None)


class SavesWhateverTheTransaction(Storage):
    """It saves at once, whatever becomes of the caller's transaction."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        return await super().save(tasks)


class PollsForNews(Storage):
    class inbox_class(MemoryInbox):
        async def receive(self) -> list[Task]:
            while self._arrived.empty():  # noqa: ASYNC110 (it is wrong)
                await asyncio.sleep(0.02)
            return await super().receive()


class WatchesNothingWhenDown(Storage):
    """What it could not begin to watch while there was no server it never watches."""

    class inbox_class(MemoryInbox):
        async def watch(self, uuids: Sequence[str]) -> None:
            servers["the"].check()
            await super().watch(uuids)


class ReadsWhenDown(Storage):
    """Without a server it knows of nothing."""

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        return await super().get(uuids) if self.server.up else [None] * len(uuids)


class SavesWithoutWaiting(Storage):
    """It answers at once and saves in the background, where nobody hears that it failed."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        self._saving = asyncio.create_task(self._write(tasks))
        return [DONE] * len(tasks)

    async def _write(self, tasks: Sequence[Task]) -> None:
        with suppress(Unavailable):
            await super().save(tasks)


class FindsNothingWhenFrozen(Storage):
    """A server that says nothing has nothing, it thinks."""

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        return [None] * len(uuids) if self.server.frozen else await super().get(uuids)


class ForgetsWhatHasBegun(Storage):
    """It keeps ends and beginnings, and nothing in between."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        return DONE if task.status == "process" else super()._save(memory, task)


class SubmitsTooSoon(Composes):
    """What it has begun to submit it takes for submitted."""

    class composition(SeparateComposition):
        async def submit(
            self, messages: Sequence[TaskMessage], transaction: object | None = None
        ) -> list[Outcome]:
            begun = self.__dict__.setdefault("begun", set())
            fresh = [message for message in messages if message.uuid not in begun]
            begun.update(message.uuid for message in messages)
            await asyncio.sleep(ON_ITS_WAY)
            await super().submit(fresh)
            return [DONE] * len(messages)


class AdmitsOnce(Composes):
    """Who has asked about a delivery has run it."""

    class composition(SeparateComposition):
        async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
            asked = self.__dict__.setdefault("asked", set())
            admitted = await super().admit(deliveries)
            again = [delivery.fence in asked for delivery in deliveries]
            asked.update(delivery.fence for delivery in deliveries)
            await asyncio.sleep(ON_ITS_WAY)
            return [
                ("stale" if was and verdict == "run" else verdict, record)
                for was, (verdict, record) in zip(again, admitted, strict=True)
            ]


class CompletesTooSoon(Composes):
    """What it has begun to complete it takes for completed."""

    class composition(SeparateComposition):
        async def complete(
            self, subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            begun = self.__dict__.setdefault("begun", set())
            names = [str(completion.settlement and completion.task) for completion in completions]
            fresh = [c for c, name in zip(completions, names, strict=True) if name not in begun]
            begun.update(names)
            await asyncio.sleep(ON_ITS_WAY)
            outcomes = await super().complete(subscription, fresh)
            return outcomes if fresh else [DONE] * len(completions)


class MixesCompletionsUp(Composes):
    class composition(SeparateComposition):
        async def complete(
            self, subscription: Subscription, completions: Sequence[Completion]
        ) -> list[Outcome]:
            return list(reversed(await super().complete(subscription, completions)))


class RunsOnlyWhatIsRecorded(Composes):
    """A message without a record is taken for one whose record was deleted."""

    class composition(SeparateComposition):
        async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
            admitted = await super().admit(deliveries)
            return [("stale" if there is None else verdict, there) for verdict, there in admitted]


class PublishesOnlyWhatIsNew(Composes):
    """What is recorded is taken for published."""

    class composition(SeparateComposition):
        async def submit(
            self, messages: Sequence[TaskMessage], transaction: object | None = None
        ) -> list[Outcome]:
            there = await self._storage.get([message.uuid for message in messages])
            new = [m for m, record in zip(messages, there, strict=True) if record is None]
            outcomes = await self._storage.save([record_of(message) for message in messages])
            await self._broker.publish(new)
            return outcomes
