"""Leases: another receiver gets what a dead one held, never what a living one holds.

A zombie is a receiver that was frozen for longer than its lease and then continues.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import pytest

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delays import clock
from qtasks_conformance.contracts.delivering import assert_done, assert_settled, uuids
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import (
    PATIENCE,
    SOON,
    assert_silent,
    collect,
    heartbeat,
    retry_call,
    retry_call_untimed,
)
from qtasks_core import Ack, Delivery, Guarantees, Release, Subscription

MOMENTS = (0.0, 0.001, 0.004, 0.016, SOON)
"""Seconds after which a process that settles is killed: before, during and after its settle.

The last one is an upper limit: the process is killed as soon as it has settled."""


class LeaseContract(Contract):
    """Invariants 1 (nothing is lost), 4 (leases) and 9 (a lost lease cannot be settled)."""

    async def test_a_killed_receiver_loses_nothing(self, rig: Rig) -> None:
        """What a killed process held is delivered to another receiver within the lease.

        If `counts_deliveries` is declared, these deliveries have the count 2.
        """
        broker, victim = await rig.broker(), await rig.elsewhere()
        messages = rig.messages(5)
        assert_done(await broker.publish(messages))
        await victim.receive(3)
        subscription = await broker.subscribe({"q": 10})
        await victim.kill()
        deliveries: list[Delivery] = []
        async with heartbeat(subscription, deliveries, rig.subject.lease / 4):
            await collect(subscription, 5, rig.within, into=deliveries)
        assert uuids(deliveries) == sorted(message.uuid for message in messages)
        assert_settled(await subscription.settle([Ack(d) for d in deliveries]), broker.guarantees)
        if broker.guarantees.counts_deliveries:
            assert sorted(d.count or 0 for d in deliveries)[2:] == [2, 2, 2], (
                "the second delivery of a message must have the count 2"
            )

    async def test_what_was_published_outlives_its_process(self, rig: Rig) -> None:
        """When `publish` returns, the message is on the server; delayed messages and retries too.

        The publishing process is killed then, and all messages are still delivered. If
        `atomic_retries` is not declared, the retry may have left the old message too.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        guarantees = broker.guarantees
        # What it leaves behind comes back after its lease. If its retry must leave one message, it
        # must not lose the lease on a busy machine.
        lease = float(SOON) if guarantees.atomic_retries else rig.subject.lease
        within = lease + rig.subject.slack
        victim = await rig.elsewhere(lease=lease)
        messages = rig.messages(3)
        later = rig.message(delay=1.0, queue="later")
        assert_done(await victim.publish(messages[:1]))
        await victim.receive(1)
        assert_settled(await victim.settle((0, "retry")), guarantees)
        assert_done(await victim.publish([*messages[1:], later]))
        await victim.kill()
        subscription = await broker.subscribe({"q": 10, "later": 10})
        deliveries: list[Delivery] = []
        async with heartbeat(subscription, deliveries, rig.subject.lease / 4):
            await collect(subscription, 3, within, into=deliveries)
            if len(set(uuids(deliveries))) < 3 and not guarantees.atomic_retries:
                await collect(subscription, 4, within, into=deliveries)
        # What the receiver lost with its connection comes again, and is counted then.
        came: list[tuple[str, int]] = []
        for delivery in deliveries:
            key = (message_of(delivery).uuid, message_of(delivery).attempt)
            if key not in came or (delivery.count or 1) == 1:
                came.append(key)
        expected = sorted(zip((m.uuid for m in messages), (2, 1, 1), strict=True))
        old = (messages[0].uuid, 1)
        assert sorted(came) in (expected, sorted([*expected, old]))
        (delivery,) = await collect(subscription, 1, rig.within, "later")
        assert delivery.message == later

    async def test_a_process_killed_while_it_settles_loses_nothing(self, rig: Rig) -> None:
        """A process is killed before, during or after a settle: no message is lost.

        A retry leaves the old message or the new one, at worst both. If `atomic_retries` is
        declared, it leaves exactly one.
        """
        broker = await rig.broker()
        queues = [f"q{at}" for at in range(len(MOMENTS))]
        messages = {queue: rig.messages(4, queue=queue) for queue in queues}
        for queue in queues:
            assert_done(await broker.publish(messages[queue]))
        await asyncio.gather(
            *(
                self._killed_while_it_settles(rig, queue, moment)
                for queue, moment in zip(queues, MOMENTS, strict=True)
            )
        )
        subscription = await broker.subscribe(dict.fromkeys(queues, 10))
        came: list[Delivery] = []
        deadline = clock().at + rig.within + PATIENCE
        for queue in queues:
            sent = {message.uuid for message in messages[queue]}
            while not sent <= set(uuids(came)):
                assert clock().at < deadline, "acknowledged messages are delivered again and again"
                some = await collect(subscription, 1, rig.within, queue)
                assert_settled(await subscription.settle([Ack(some[0])]), broker.guarantees)
                came += some
        came += await acknowledge_for(subscription, rig.subject.lease + 0.5, *queues)
        times = {uuid: uuids(came).count(uuid) for uuid in uuids(came)}
        most = 1 if broker.guarantees.atomic_retries else 2
        assert max(times.values()) <= most, (
            f"at most {most} message(s) of each task may be left after a crash in a retry: {times}"
        )
        assert {message_of(delivery).attempt for delivery in came} <= {1, 2}

    @staticmethod
    async def _killed_while_it_settles(rig: Rig, queue: str, moment: float) -> None:
        """Start a process that holds 4 messages; kill it while it retries 2 and releases 2."""
        victim = await rig.elsewhere()
        await victim.receive(4, queue)
        settling = rig.background(
            victim.settle((0, "retry"), (1, "release"), (2, "retry"), (3, "release"))
        )
        await asyncio.wait({settling}, timeout=moment)
        await victim.kill()

    async def test_extend_answers_for_each(self, rig: Rig) -> None:
        """`extend` answers in order: None for a settled delivery, else the delivery."""
        broker = await rig.broker()
        assert_done(await broker.publish(rig.messages(3)))
        subscription = await broker.subscribe({"q": 3})
        held = await collect(subscription, 3)
        assert_settled(await subscription.settle([Ack(held[1])]), broker.guarantees)
        extended = await subscription.extend(held)
        assert [delivery is not None for delivery in extended] == [True, False, True], (
            "`extend` must answer None for the settled delivery, and only for that"
        )
        mine = [delivery for delivery in extended if delivery is not None]
        assert [message_of(d) for d in mine] == [message_of(held[0]), message_of(held[2])]
        assert_settled(await subscription.settle([Ack(d) for d in mine]), broker.guarantees)
        assert await subscription.extend([]) == []
        await assert_silent(subscription, rig.subject.lease)

    @pytest.mark.parametrize("first", ["settle", "extend"])
    async def test_a_zombie_is_refused(self, rig: Rig, first: str) -> None:
        """A receiver that was frozen for longer than its lease cannot settle or extend.

        Another receiver has its deliveries by then. Its settles are `refused`, or `unknown` if
        `settle_confirmed` is not declared, and change nothing. What it receives later is its own.
        """
        broker, zombie = await rig.broker(), await rig.elsewhere()
        messages = rig.messages(3)
        assert_done(await broker.publish(messages))
        await zombie.receive(3, "q", "own")
        subscription = await broker.subscribe({"q": 10})
        zombie.pause()
        held: list[Delivery] = []
        async with heartbeat(subscription, held, rig.subject.lease / 4):
            await collect(subscription, 3, rig.within, into=held)
            zombie.resume()
            if first == "extend":
                assert await zombie.extend() == [False, False, False], (
                    "`extend` must answer None for a lease that was lost"
                )
            refusals = self._refusals(broker.guarantees)
            outcomes = await zombie.settle((0, "ack"), (1, "retry"), (2, "release"))
            assert {outcome.status for outcome in outcomes} <= refusals, (
                f"settling a lost lease must be {refusals}, but the outcomes are {outcomes}"
            )
            assert await zombie.extend() == [False, False, False], (
                "`extend` must answer None for a lease that was lost"
            )
            assert_done(await broker.publish([rig.message(queue="own")]))
            await retry_call(lambda: zombie.receive(1, "q", "own"))
            mixed = await zombie.settle((0, "ack"), (3, "ack"), (1, "ack"), (2, "ack"))
            assert {mixed[at].status for at in (0, 2, 3)} <= refusals, (
                f"of these, only the second is still held and may be done: {mixed}"
            )
            assert_settled([mixed[1]], broker.guarantees)
        await self._still_owns(subscription, held)

    @staticmethod
    def _refusals(guarantees: Guarantees) -> set[str]:
        return {"refused"} if guarantees.settle_confirmed else {"refused", "unknown"}

    @staticmethod
    async def _still_owns(subscription: Subscription, held: list[Delivery]) -> None:
        """Release all deliveries and receive them unchanged: the zombie had no effect."""
        assert None not in await subscription.extend(held), (
            "a settle by the former holder ended the lease of the present holder"
        )
        await subscription.settle([Release(delivery) for delivery in held])
        back = await collect(subscription, len(held))
        assert uuids(back) == uuids(held)
        assert {message_of(delivery).attempt for delivery in back} == {1}
        await subscription.settle([Ack(delivery) for delivery in back])
        await assert_silent(subscription, 0.5)

    async def test_an_extended_delivery_stays(self, rig: Rig) -> None:
        """A delivery that is extended for 2.5 leases is delivered to nobody else."""
        subscriptions = [await (await rig.broker()).subscribe({"q": 1}) for _ in range(2)]
        publisher = await rig.broker()
        waiting = [rig.background(s.receive({"q": 1}, 1)) for s in subscriptions]
        await asyncio.sleep(0.2)
        assert_done(await publisher.publish([rig.message()]))
        done, _ = await asyncio.wait(waiting, timeout=30, return_when="FIRST_COMPLETED")
        assert len(done) == 1, "exactly one receiver must get the message"
        holder = subscriptions[waiting.index(next(iter(done)))]
        other = next(task for task in waiting if task not in done)
        held = next(iter(done)).result()
        async with heartbeat(holder, held, rig.subject.lease / 4):
            await asyncio.wait({other}, timeout=2.5 * rig.subject.lease)
        assert not other.done(), "another receiver got a message whose lease was extended in time"
        assert_settled(await holder.settle([Ack(held[0])]), publisher.guarantees)
        await asyncio.wait({other}, timeout=0.5)
        assert not other.done(), "an acknowledged message was delivered again"
        other.cancel()
        await asyncio.wait({other})

    @pytest.mark.parametrize("first", ["short", "long"])
    async def test_a_lease_is_the_receivers(self, rig: Rig, first: str) -> None:
        """Two receivers of one queue each have their own lease, whichever subscribed first.

        One with a short lease dies: its message is delivered again within that lease. The other one
        keeps what it holds.
        """
        # Longer than all waits here, so a broker that applies this lease to all is found out.
        short, holder = await rig.elsewhere(), await rig.broker(lease=3 * LONG_LEASE)
        broker = await rig.broker()
        if first == "short":
            await short.subscribe(1)
        long = await holder.subscribe({"q": 1})
        if first == "long":
            await short.subscribe(1)
        others = await broker.subscribe({"q": 10})
        taking, receiving = rig.background(short.receive(1)), rig.background(collect(long, 1))
        deadline = clock().at + PATIENCE
        while not (taking.done() and receiving.done()):
            assert clock().at < deadline, "one of two receivers of a queue gets no message"
            assert_done(await broker.publish(rig.messages(3)))
            await asyncio.wait({taking, receiving}, timeout=0.5)
        ((lost,), (kept,)) = taking.result(), receiving.result()
        since = clock().at
        await short.kill()
        came: list[Delivery] = []

        async def acknowledge(subscription: Subscription) -> None:
            while True:
                receive = partial(subscription.receive, {"q": 10}, 10)
                some = await retry_call_untimed(receive, LONG_LEASE)
                acks = [Ack(delivery) for delivery in some]
                assert_settled(await subscription.settle(acks), broker.guarantees)
                came.extend(some)

        # Both receive: the server may choose who gets the message, as Kafka does by partition.
        receivers = {rig.background(acknowledge(each)) for each in (others, long)}
        deadline = since + max(rig.within, PATIENCE)
        while lost.message.uuid not in uuids(came):
            assert clock().at < deadline, (
                "what a dead receiver with a short lease held was not delivered again"
            )
            await only_time_passes(receivers, 0.1)
        # If the long lease were cut to the short one, it would have ended by then.
        await only_time_passes(receivers, max(since + rig.subject.lease - clock().at, 0.0) + 1.0)
        assert message_of(kept).uuid not in uuids(came), (
            "what a receiver with a long lease holds was delivered to another"
        )
        assert_settled(await long.settle([Ack(kept)]), holder.guarantees)

    async def test_settling_follows_a_replaced_fence(self, rig: Rig) -> None:
        """Where `extend` runner back a replacement, the old delivery can still be settled."""
        broker = await rig.broker()
        assert_done(await broker.publish([rig.message()]))
        subscription = await broker.subscribe({"q": 10})
        (old,) = await collect(subscription, 1)
        for _ in range(2):
            (new,) = await subscription.extend([old])
            assert new is not None, "`extend` called a delivery lost that is still held"
        assert_settled(await subscription.settle([Ack(old)]), broker.guarantees)
        await assert_silent(subscription, rig.subject.lease)


async def only_time_passes(tasks: set[asyncio.Task[None]], seconds: float) -> None:
    """Wait; raise the error of any task that fails in the meantime."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when="FIRST_COMPLETED")
    for task in done:
        task.result()


async def acknowledge_for(
    subscription: Subscription, seconds: float, *queues: str
) -> list[Delivery]:
    """Receive and acknowledge for so many seconds; return the deliveries."""
    came: list[Delivery] = []
    wanted = dict.fromkeys(queues or ("q",), 10)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                some = await subscription.receive(wanted, 10)
                came += some
                await subscription.settle([Ack(delivery) for delivery in some])
    return came
