"""A broker and a storage together: submit, admit, complete, and a crash between any two steps."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import Halt, How, message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import SOON, assert_silent, collect
from qtasks_core import (
    Ack,
    Broker,
    Completion,
    Composition,
    Delivery,
    Raw,
    Retry,
    Status,
    Storage,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.separate import compose

ADMISSIONS: tuple[tuple[int, tuple[int, Status] | None, Verdict], ...] = (
    # (attempt of the message, attempt and status of the record or None, verdict)
    (1, None, "run"),
    (1, (1, "new"), "run"),
    (1, (1, "scheduled"), "run"),
    (1, (1, "process"), "run"),
    (1, (1, "retry"), "stale"),
    (2, (1, "retry"), "run"),
    (1, (2, "process"), "stale"),
    (2, (1, "process"), "run"),
    (1, (1, "success"), "final"),
    (2, (1, "success"), "final"),
    (1, (1, "error"), "final"),
    (1, (1, "cancel"), "cancelled"),
    (2, (1, "cancel"), "cancelled"),
)


class ComposingContract(Contract):
    """Invariants 1, 2, 4 and 9, for a broker and a storage as the engine uses them together."""

    async def test_submitted_is_published_and_recorded(self, rig: Rig) -> None:
        """When `submit` returns, the message can be received and its record can be read."""
        broker, _, composition = await self._pair(rig)
        now, later = rig.message(created_at=5.0), rig.message(created_at=5.0, delay=600.0)
        assert_done(await composition.submit([now, later]))
        first, second = await (await rig.storage()).get([now.uuid, later.uuid])
        assert first is not None
        assert second is not None
        assert (first.status, first.task_name, first.queue) == ("new", now.task_name, "q")
        assert (second.status, second.due_at) == ("scheduled", 605.0)
        subscription = await broker.subscribe({"q": 10})
        (delivery,) = await collect(subscription, 1)
        assert delivery.message == now
        ((verdict, found),) = await composition.admit([delivery])
        assert verdict == "run"
        assert found in (None, first)
        assert await composition.submit([]) == []

    async def test_a_submit_repeated_late_changes_nothing(self, rig: Rig) -> None:
        """A `submit` that is repeated after the task has finished does not change its record."""
        _, storage, composition = await self._pair(rig)
        message = rig.message()
        final = rig.record("success", uuid=message.uuid, execution="a")
        assert_done(await storage.save([final]))
        await composition.submit([message])
        assert await storage.get([message.uuid]) == [final]

    async def test_admit_knows_what_still_has_to_run(self, rig: Rig) -> None:
        """`admit` returns the right verdict for each state: run, final, cancelled, stale or dead.

        `ADMISSIONS` has the states. `admit` also returns the record of each task that has begun.
        """
        _, storage, composition = await self._pair(rig)
        deliveries = [Delivery(Raw(b"\xff", "no message"), "q", None)]
        for attempt, there, _ in ADMISSIONS:
            message = rig.message(attempt=attempt)
            deliveries.append(Delivery(message, "q", None))
            if there is not None:
                record = rig.record(there[1], uuid=message.uuid, attempt=there[0])
                assert_done(await storage.save([record]))
        admitted = await composition.admit(deliveries)
        assert [verdict for verdict, _ in admitted] == ["dead", *(v for _, _, v in ADMISSIONS)], (
            "a verdict differs from `ADMISSIONS` in qtasks_conformance.contracts.pairs"
        )
        for delivery, (_, found) in zip(deliveries[1:], admitted[1:], strict=True):
            (stored,) = await storage.get([message_of(delivery).uuid])
            left_out = stored is not None and stored.status in ("new", "scheduled")
            assert found == stored or (left_out and found is None)
        assert await composition.admit([]) == []

    async def test_completed_is_recorded_and_settled(self, rig: Rig) -> None:
        """`complete` records each result and settles its delivery; each item has an outcome."""
        broker, storage, composition = await self._pair(rig)
        messages = rig.messages(4)
        assert_done(await composition.submit(messages))
        subscription = await broker.subscribe({"q": 10})
        success, failed, retried, left = await collect(subscription, 4)
        completions = [
            completion(success, "ack", "success"),
            completion(failed, "ack", "error"),
            completion(retried, "retry", "retry"),
            Completion(Ack(left), None),
            Completion(None, rig.record("process", uuid=rig.message().uuid)),
        ]
        outcomes = await composition.complete(subscription, completions)
        assert len(outcomes) == len(completions), "`complete` must return an outcome for each item"
        assert_settled(outcomes, broker.guarantees)
        statuses = await self._statuses(storage, [success, failed, retried, left])
        assert statuses == ["success", "error", "retry", "new"]
        assert completions[4].task is not None
        assert await storage.get([completions[4].task.uuid]) == [completions[4].task]
        (again,) = await collect(subscription, 1)
        assert message_of(again) == replace(message_of(retried), attempt=2)
        assert [v for v, _ in await composition.admit([again, retried])] == ["run", "stale"]
        assert_settled(
            await composition.complete(subscription, [completion(again, "ack", "success")]),
            broker.guarantees,
        )
        await assert_silent(subscription, 0.5)
        assert await composition.complete(subscription, []) == []

    async def test_a_refused_final_is_acknowledged(self, rig: Rig) -> None:
        """If another run has already finished the task, the result is refused, the delivery acked.

        The outcome has the existing record in `current`.
        """
        broker, storage, composition = await self._pair(rig)
        assert_done(await composition.submit([rig.message()]))
        subscription = await broker.subscribe({"q": 10})
        (delivery,) = await collect(subscription, 1)
        theirs = rig.record("cancel", uuid=message_of(delivery).uuid, execution="theirs")
        assert_done(await storage.save([theirs]))
        (outcome,) = await composition.complete(
            subscription, [completion(delivery, "ack", "success")]
        )
        assert (outcome.status, outcome.current) == ("refused", theirs)
        await subscription.close()
        await assert_silent(await broker.subscribe({"q": 10}), 0.5)

    async def test_each_completion_has_its_own_outcome(self, rig: Rig) -> None:
        """One refused item in a batch has its own outcome and does not affect the others."""
        broker, storage, composition = await self._pair(rig)
        assert_done(await composition.submit(rig.messages(5)))
        subscription = await broker.subscribe({"q": 10})
        held = await collect(subscription, 5)
        theirs = rig.record("cancel", uuid=message_of(held[1]).uuid, execution="theirs")
        assert_done(await storage.save([theirs]))
        hows: tuple[How, ...] = ("ack", "ack", "retry", "ack", "retry")
        ends = [
            completion(d, how, "retry" if how == "retry" else "success")
            for d, how in zip(held, hows, strict=True)
        ]
        outcomes = await composition.complete(subscription, ends)
        assert (outcomes[1].status, outcomes[1].current) == ("refused", theirs)
        assert_settled([outcomes[at] for at in (0, 2, 3, 4)], broker.guarantees)
        statuses = await self._statuses(storage, held)
        assert statuses == ["success", "cancel", "retry", "success", "retry"]
        back = await collect(subscription, 2)
        assert {message_of(d).uuid for d in back} == {message_of(held[at]).uuid for at in (2, 4)}

    @pytest.mark.parametrize("halt", ["before", "after"])
    async def test_a_crash_in_completing_runs_nothing_twice(self, rig: Rig, halt: Halt) -> None:
        """A worker is killed after recording a result, before or after settling its delivery.

        If the message is redelivered, `admit` answers `final`: the task does not run again.
        """
        broker, storage, composition = await self._pair(rig, lease=None)
        victim = await rig.elsewhere()
        assert_done(await composition.submit([rig.message()]))
        (seen,) = await victim.receive(1)
        halted = await victim.complete_halfway((0, "ack", "success"), halt)
        await victim.kill()
        (record,) = await storage.get([seen.message.uuid])
        assert record is not None
        assert record.status == "success"
        subscription = await broker.subscribe({"q": 10})
        if halted and halt == "before":
            (delivery,) = await collect(subscription, 1, rig.within)
            assert await composition.admit([delivery]) == [("final", record)]
            drop = [Completion(Ack(delivery), None)]
            assert_settled(await composition.complete(subscription, drop), broker.guarantees)
        elif broker.guarantees.settle_confirmed:
            await assert_silent(subscription, rig.subject.lease)
        assert await storage.get([seen.message.uuid]) == [record]

    @pytest.mark.parametrize("halt", ["before", "after"])
    async def test_a_crash_in_retrying_loses_nothing(self, rig: Rig, halt: Halt) -> None:
        """A worker is killed while it completes a retry: a message is left that can run.

        A retry must be settled before it is recorded. In the other order, a crash in between would
        leave only the old message, which is stale by then.
        """
        broker, storage, composition = await self._pair(rig, lease=None)
        victim = await rig.elsewhere()
        assert_done(await composition.submit([rig.message()]))
        await victim.receive(1)
        halted = await victim.complete_halfway((0, "retry", "retry"), halt)
        await victim.kill()
        subscription = await broker.subscribe({"q": 10})
        attempt = 1 if halted and halt == "before" else 2
        delivery = await self._of_attempt(subscription, attempt, rig.within)
        assert [verdict for verdict, _ in await composition.admit([delivery])] == ["run"]
        ends = [completion(delivery, "ack", "success")]
        assert_settled(await composition.complete(subscription, ends), broker.guarantees)
        assert await self._statuses(storage, [delivery]) == ["success"]

    async def test_a_crash_between_publish_and_record_loses_nothing(self, rig: Rig) -> None:
        """A message without a record runs, and its result is recorded."""
        broker, storage, composition = await self._pair(rig)
        message = rig.message()
        assert_done(await broker.publish([message]))
        subscription = await broker.subscribe({"q": 10})
        (delivery,) = await collect(subscription, 1)
        assert await composition.admit([delivery]) == [("run", None)]
        await composition.complete(subscription, [completion(delivery, "ack", "success")])
        assert await self._statuses(storage, [delivery]) == ["success"]

    @pytest.mark.parametrize("how", ["ack", "retry"])
    async def test_a_zombie_records_nothing(self, rig: Rig, how: How) -> None:
        """A worker that was frozen for longer than its lease changes neither record nor queue.

        Its result is refused because the new owner has already recorded one. Its retry is refused
        because the lease is lost.
        """
        broker, storage, composition = await self._pair(rig)
        zombie = await rig.elsewhere()
        assert_done(await composition.submit([rig.message()]))
        await zombie.receive(1)
        subscription = await broker.subscribe({"q": 10})
        zombie.pause()
        (delivery,) = await collect(subscription, 1, rig.within)
        if how == "ack":
            there = completion(delivery, "ack", "error").task
            await composition.complete(subscription, [completion(delivery, "ack", "error")])
        else:
            there = completion(delivery, "ack", "process").task
            await composition.complete(subscription, [Completion(None, there)])
        zombie.resume()
        status: Status = "success" if how == "ack" else "retry"
        (outcome,) = await zombie.complete((0, how, status))
        assert outcome.status == "refused"
        assert await storage.get([message_of(delivery).uuid]) == [there]
        if how == "retry":
            outcomes = await composition.complete(
                subscription, [completion(delivery, "ack", "success")]
            )
            assert_settled(outcomes, broker.guarantees)
            assert await self._statuses(storage, [delivery]) == ["success"]
        await assert_silent(subscription, 0.5)

    async def test_many_workers_finish_each_task_once(self, rig: Rig) -> None:
        """One of two workers is killed: still, each task finishes once, with `success`."""
        broker, storage, composition = await self._pair(rig, lease=None)
        victim = await rig.elsewhere()
        messages = rig.messages(30)
        assert_done(await composition.submit(messages))
        first, second, *_ = await victim.receive(5)
        await victim.complete((0, "ack", "success"), (1, "ack", "success"))
        await victim.kill()
        ended = {first.message.uuid, second.message.uuid}
        subscription = await broker.subscribe({"q": 100})
        finished: list[str] = []
        deadline = asyncio.get_running_loop().time() + rig.within + SOON
        while len(finished) < 28 and asyncio.get_running_loop().time() < deadline:
            deliveries = await collect(subscription, 1, rig.within + SOON)
            ((verdict, _),) = await composition.admit(deliveries)
            if verdict == "final":  # the killed worker recorded it, but its settle came too late
                assert message_of(deliveries[0]).uuid in ended.union(finished)
                await composition.complete(subscription, [Completion(Ack(deliveries[0]), None)])
                continue
            assert verdict == "run"
            ends = [completion(delivery, "ack", "success") for delivery in deliveries]
            assert_settled(await composition.complete(subscription, ends), broker.guarantees)
            finished += [message_of(delivery).uuid for delivery in deliveries]
        assert len(set(finished)) == len(finished) == 28
        records = await storage.get([message.uuid for message in messages])
        assert {record.status for record in records if record is not None} == {"success"}
        assert None not in records

    async def _pair(
        self, rig: Rig, lease: float | None = LONG_LEASE
    ) -> tuple[Broker, Storage, Composition]:
        broker, storage = await rig.broker(lease=lease), await rig.storage()
        return broker, storage, compose(broker, storage)

    @staticmethod
    async def _statuses(storage: Storage, deliveries: list[Delivery]) -> list[str | None]:
        records = await storage.get([message_of(delivery).uuid for delivery in deliveries])
        return [record.status if record is not None else None for record in records]

    @staticmethod
    async def _of_attempt(subscription: Subscription, attempt: int, within: float) -> Delivery:
        """Receive until this attempt comes: a crash may have left the previous one too."""
        async with asyncio.timeout(within):
            while True:
                (delivery,) = await collect(subscription, 1, within)
                if message_of(delivery).attempt == attempt:
                    return delivery


def completion(delivery: Delivery, how: How, status: Status) -> Completion:
    """Return the completion of a run of this delivery, with the status to record."""
    message = message_of(delivery)
    task = Task(
        uuid=message.uuid, task_name=message.task_name, queue=message.queue, status=status,
        attempt=message.attempt, execution="this", reply_to=message.reply_to,
    )  # fmt: skip
    again: TaskMessage = replace(message, attempt=message.attempt + 1)
    return Completion(Retry(delivery, again) if how == "retry" else Ack(delivery), task)
