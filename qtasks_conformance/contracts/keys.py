"""Tasks with a key: a task that is submitted many times, by any clients, runs once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.rig import LONG_LEASE, Rig, new_uuid
from qtasks_conformance.waiting import assert_silent, collect, retry_call
from qtasks_core import (
    Ack,
    Broker,
    Completion,
    Composition,
    Delivery,
    Outcome,
    Retry,
    Status,
    Storage,
    Subscription,
    Task,
    TaskMessage,
)
from qtasks_core.errors import Unavailable
from qtasks_core.records import record_of
from qtasks_core.separate import compose

QUIET = 1.0
"""Seconds without a delivery after which the queue counts as empty. A message that comes later
finds a final record, so it does not run either."""


class KeyContract(Contract):
    """One uuid, several submissions: the record decides whose message runs.

    A message of a task with a key has a `submission`, a new one for each call of `add_task`. Only
    the submission in the task's first record runs.
    """

    async def test_a_key_is_taken_by_the_first(self, rig: Rig) -> None:
        """The first submission is accepted. Later ones are `taken`, with its record: no run."""
        broker, storage, composition = await self._pair(rig)
        first, second, third = self._copies(rig, 3)
        assert_done(await composition.submit([first]))
        (outcome,) = await composition.submit([second])
        assert (outcome.status, outcome.current) == ("taken", record_of(first))
        assert await self._ran(broker, composition) == [first]
        (record,) = await storage.get([first.uuid])
        assert record is not None
        assert (record.status, record.submission) == ("success", first.submission)
        (outcome,) = await composition.submit([third])
        assert (outcome.status, outcome.current) == ("taken", record)

    async def test_each_of_a_batch_has_its_own_answer(self, rig: Rig) -> None:
        """Taken keys, new keys and tasks without a key in one batch each get their own outcome."""
        broker, _, composition = await self._pair(rig)
        taken, again = self._copies(rig, 2)
        assert_done(await composition.submit([taken]))
        new, twin = self._copies(rig, 2)
        plain = rig.message()
        outcomes = await composition.submit([plain, again, new, twin])
        assert [o.status for o in outcomes] == ["done", "taken", "done", "taken"]
        assert [o.current for o in outcomes] == [None, record_of(taken), None, record_of(new)]
        ran = await self._ran(broker, composition, count=3)
        assert {m.submission for m in ran} == {plain.submission, taken.submission, new.submission}
        assert len(ran) == 3

    @pytest.mark.parametrize("written", ["written", "not written"])
    async def test_a_key_holds_when_publishing_was_in_doubt(self, rig: Rig, written: str) -> None:
        """`publish` fails, with or without writing; the task is submitted again: it runs once."""
        broker, storage, composition = await self._pair(rig)
        publish = broker.publish

        async def fail(
            messages: Sequence[TaskMessage], transaction: object | None = None
        ) -> list[Outcome]:
            if written == "written":
                await publish(messages, transaction)
            raise Unavailable("the answer was lost")

        first, second = self._copies(rig, 2)
        setattr(broker, "publish", fail)  # noqa: B010 a method is replaced
        with suppress(Unavailable):  # a joint composition does not call `publish`
            await composition.submit([first])
        setattr(broker, "publish", publish)  # noqa: B010
        await composition.submit([second])
        (ran,) = await self._ran(broker, composition)
        (record,) = await storage.get([first.uuid])
        assert record is not None
        assert (record.status, record.submission) == ("success", ran.submission)

    @pytest.mark.parametrize("begun", ["begun", "queued"])
    async def test_a_key_outlives_a_client_that_dies(self, rig: Rig, begun: str) -> None:
        """A client dies between publishing and recording; another submits the task: one run."""
        broker, _, composition = await self._pair(rig)
        first, second = self._copies(rig, 2)
        assert_done(await broker.publish([first]))
        subscription = await broker.subscribe({"q": 10})
        if begun == "queued":
            await composition.submit([second])
            assert len(await self._ran(broker, composition, subscription)) == 1
            return
        (delivery,) = await collect(subscription, 1)
        ((verdict, record),) = await composition.admit([delivery])
        assert (verdict, record) == ("run", record_of(first))
        (outcome,) = await composition.submit([second])
        assert (outcome.status, outcome.current) == ("taken", record_of(first))
        await complete(composition, subscription, [delivery])
        await assert_silent(subscription, QUIET)

    async def test_of_two_unrecorded_copies_one_is_run(self, rig: Rig) -> None:
        """Two clients died between publishing and recording: only one of their messages runs."""
        broker, _, composition = await self._pair(rig)
        assert_done(await broker.publish(self._copies(rig, 2)))
        assert len(await self._ran(broker, composition)) == 1

    async def test_a_late_record_is_that_of_the_publishing_that_runs(self, rig: Rig) -> None:
        """A worker admits a message before the client records it: that record is accepted."""
        broker, storage, composition = await self._pair(rig)
        message = self._copies(rig, 1)[0]
        assert_done(await broker.publish([message]))
        subscription = await broker.subscribe({"q": 10})
        (delivery,) = await collect(subscription, 1)
        assert [verdict for verdict, _ in await composition.admit([delivery])] == ["run"]
        assert_done(await storage.save([record_of(message)]))
        await complete(composition, subscription, [delivery])

    async def test_many_submit_one_key_at_once(self, rig: Rig) -> None:
        """Of 50 concurrent submissions by two processes one is accepted, and only that one runs."""
        broker, _, composition = await self._pair(rig)
        other = await rig.elsewhere()
        copies = self._copies(rig, 50)
        mine, theirs = copies[:25], copies[25:]
        answers = await asyncio.gather(
            other.submit(*theirs), *(composition.submit([message]) for message in mine)
        )
        outcomes = [outcome for answer in answers for outcome in answer]
        submitted = [*theirs, *mine]
        (winner,) = [m for m, o in zip(submitted, outcomes, strict=True) if o.status == "done"]
        assert [o.current for o in outcomes if o.current is not None] == [record_of(winner)] * 49
        assert await self._ran(broker, composition) == [winner]

    async def test_a_retry_keeps_the_key(self, rig: Rig) -> None:
        """The retry of the accepted submission runs; a message of another submission does not."""
        broker, _, composition = await self._pair(rig)
        first, second = self._copies(rig, 2)
        assert_done(await composition.submit([first]))
        subscription = await broker.subscribe({"q": 10})
        (delivery,) = await collect(subscription, 1)
        again = replace(first, attempt=2)
        retry = Completion(Retry(delivery, again), record_of_run(first, "retry"))
        assert_settled(await composition.complete(subscription, [retry]), broker.guarantees)
        assert_done(await broker.publish([replace(second, attempt=2)]))
        assert await self._ran(broker, composition, subscription) == [again]

    @pytest.mark.parametrize("submission", ["", "publishing"], ids=["plain", "keyed"])
    async def test_what_was_published_is_not_published_again(
        self, rig: Rig, submission: str
    ) -> None:
        """If only saving failed, a repeated `submit` saves the record without publishing again."""
        broker, storage, composition = await self._pair(rig)
        save, left = storage.save, 2

        async def fail(tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
            nonlocal left
            left -= 1
            if left >= 0:
                raise Unavailable("the storage is down")
            return await save(tasks, transaction)

        setattr(storage, "save", fail)  # noqa: B010 a method is replaced
        message = rig.message(submission=submission)
        assert_done(await retry_call(lambda: composition.submit([message])))
        assert len(await received(await broker.subscribe({"q": 10}))) == 1
        assert await storage.get([message.uuid]) == [record_of(message)]

    async def _pair(self, rig: Rig) -> tuple[Broker, Storage, Composition]:
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        return broker, storage, compose(broker, storage)

    @staticmethod
    def _copies(rig: Rig, count: int) -> list[TaskMessage]:
        """Return messages of one task with different submissions."""
        uuid = new_uuid()
        return [rig.message(uuid=uuid, submission=new_uuid()) for _ in range(count)]

    @staticmethod
    async def _ran(
        broker: Broker,
        composition: Composition,
        subscription: Subscription | None = None,
        count: int = 1,
    ) -> list[TaskMessage]:
        """Run everything in the queue that is admitted, and complete it; return those messages.

        Waits until at least `count` have run: a slow server may deliver them one by one.
        """
        subscription = subscription or await broker.subscribe({"q": 100})
        ran: list[TaskMessage] = []
        while len(ran) < count:
            deliveries = await received(subscription)
            verdicts = [verdict for verdict, _ in await composition.admit(deliveries)]
            run = [d for d, verdict in zip(deliveries, verdicts, strict=True) if verdict == "run"]
            dropped = [Completion(Ack(d), None) for d in deliveries if d not in run]
            await composition.complete(subscription, dropped)
            await complete(composition, subscription, run)
            ran += [message_of(delivery) for delivery in run]
        return ran


async def received(subscription: Subscription, least: int = 1) -> list[Delivery]:
    """Receive until the queue is empty; fail if fewer tasks than `least` come in time."""
    deliveries: list[Delivery] = []
    while (missing := least - len({message_of(delivery).uuid for delivery in deliveries})) > 0:
        deliveries += await collect(subscription, missing)
    while True:
        try:
            async with asyncio.timeout(QUIET):
                deliveries += await retry_call(lambda: subscription.receive({"q": 100}, 100))
        except TimeoutError:
            return deliveries


async def complete(
    composition: Composition, subscription: Subscription, deliveries: Sequence[Delivery]
) -> None:
    """Complete deliveries with status `success`."""
    ends = [
        Completion(Ack(delivery), record_of_run(message_of(delivery), "success"))
        for delivery in deliveries
    ]
    outcomes = await composition.complete(subscription, ends)
    assert [outcome.status for outcome in outcomes] == ["done"] * len(ends)


def record_of_run(message: TaskMessage, status: Status) -> Task:
    """Return the record of a run with this status."""
    return replace(record_of(message), status=status, execution="a run")
