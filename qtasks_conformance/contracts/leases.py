"""Leases: a dead receiver's go to another, a living one's do not, a zombie is refused."""

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
    keeping,
    persist,
    retry,
)
from qtasks_core import Ack, Delivery, Guarantees, Release, Subscription

MOMENTS = (0.0, 0.001, 0.004, 0.016, SOON)
"""Seconds after which a process that settles is killed. By the last of them it has settled, and
dies at once; one that takes as long is in the midst of it."""


class LeaseContract(Contract):
    """Invariants 1, 4 and 9."""

    async def test_a_killed_receiver_loses_nothing(self, rig: Rig) -> None:
        """What a process held when it was killed goes to another within the lease."""
        broker, victim = await rig.broker(), await rig.elsewhere()
        messages = rig.messages(5)
        assert_done(await broker.publish(messages))
        await victim.receive(3)
        subscription = await broker.subscribe({"q": 10})
        await victim.kill()
        deliveries: list[Delivery] = []
        async with keeping(subscription, deliveries, rig.subject.lease / 4):
            await collect(subscription, 5, rig.within, into=deliveries)
        assert uuids(deliveries) == sorted(message.uuid for message in messages)
        assert_settled(await subscription.settle([Ack(d) for d in deliveries]), broker.guarantees)
        if broker.guarantees.counts_deliveries:
            assert sorted(d.count or 0 for d in deliveries)[2:] == [2, 2, 2]

    async def test_what_was_published_outlives_its_process(self, rig: Rig) -> None:
        """It is with the server when `publish` returns, delayed messages and retries too."""
        victim = await rig.elsewhere()
        messages = rig.messages(3)
        later = rig.message(delay=1.0, queue="later")
        assert_done(await victim.publish(messages[:1]))
        await victim.receive(1)
        guarantees = (broker := await rig.broker()).guarantees
        assert_settled(await victim.settle((0, "retry")), guarantees)
        assert_done(await victim.publish([*messages[1:], later]))
        before = clock()
        await victim.kill()
        subscription = await broker.subscribe({"q": 10, "later": 10})
        deliveries: list[Delivery] = []
        async with keeping(subscription, deliveries, rig.subject.lease / 4):
            await collect(subscription, 3, rig.within, into=deliveries)
        assert uuids(deliveries) == sorted(message.uuid for message in messages)
        assert sorted(message_of(d).attempt for d in deliveries) == [1, 1, 2]
        (delivery,) = await collect(subscription, 1, rig.within, "later")
        assert delivery.message == later
        assert clock() - before <= rig.within

    async def test_a_process_killed_while_it_settles_loses_nothing(self, rig: Rig) -> None:
        """Killed before its settle, at several moments in it, and after it: all messages come.

        A retry is there as the old message or as the new one, at worst as both; as one alone where
        `atomic_retries` is declared.
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
        deadline = clock() + rig.within + PATIENCE
        for queue in queues:
            sent = {message.uuid for message in messages[queue]}
            while not sent <= set(uuids(came)):
                assert clock() < deadline, "messages come again and again"
                some = await collect(subscription, 1, rig.within, queue)
                assert_settled(await subscription.settle([Ack(some[0])]), broker.guarantees)
                came += some
        came += await acknowledge_for(subscription, rig.subject.lease + 0.5, *queues)
        times = {uuid: uuids(came).count(uuid) for uuid in uuids(came)}
        most = 1 if broker.guarantees.atomic_retries else 2
        assert max(times.values()) <= most, f"more than the old and the new message: {times}"
        assert {message_of(delivery).attempt for delivery in came} <= {1, 2}

    @staticmethod
    async def _killed_while_it_settles(rig: Rig, queue: str, moment: float) -> None:
        """Let a process hold what is in a queue, retry one half and release the other, and die."""
        victim = await rig.elsewhere()
        await victim.receive(4, queue)
        settling = rig.background(
            victim.settle((0, "retry"), (1, "release"), (2, "retry"), (3, "release"))
        )
        await asyncio.wait({settling}, timeout=moment)
        await victim.kill()

    async def test_extend_answers_for_each(self, rig: Rig) -> None:
        """In order, and only for what is still held: what is settled cannot be had back."""
        broker = await rig.broker()
        assert_done(await broker.publish(rig.messages(3)))
        subscription = await broker.subscribe({"q": 3})
        held = await collect(subscription, 3)
        assert_settled(await subscription.settle([Ack(held[1])]), broker.guarantees)
        extended = await subscription.extend(held)
        assert [delivery is not None for delivery in extended] == [True, False, True]
        mine = [delivery for delivery in extended if delivery is not None]
        assert [message_of(d) for d in mine] == [message_of(held[0]), message_of(held[2])]
        assert_settled(await subscription.settle([Ack(d) for d in mine]), broker.guarantees)
        assert await subscription.extend([]) == []
        await assert_silent(subscription, rig.subject.lease)

    @pytest.mark.parametrize("first", ["settle", "extend"])
    async def test_a_zombie_is_refused(self, rig: Rig, first: str) -> None:
        """A receiver stopped beyond its lease hears that it was lost, and changes nothing.

        Its settlements of what another has received by then are refused (at least not confirmed,
        where the server does not answer a settle); what it receives afterwards is its own.
        """
        broker, zombie = await rig.broker(), await rig.elsewhere()
        messages = rig.messages(3)
        assert_done(await broker.publish(messages))
        await zombie.receive(3, "q", "own")
        subscription = await broker.subscribe({"q": 10})
        zombie.pause()
        held: list[Delivery] = []
        async with keeping(subscription, held, rig.subject.lease / 4):
            await collect(subscription, 3, rig.within, into=held)
            zombie.resume()
            if first == "extend":
                assert await zombie.extend() == [False, False, False]
            refusals = self._refusals(broker.guarantees)
            outcomes = await zombie.settle((0, "ack"), (1, "retry"), (2, "release"))
            assert {outcome.status for outcome in outcomes} <= refusals, outcomes
            assert await zombie.extend() == [False, False, False]
            assert_done(await broker.publish([rig.message(queue="own")]))
            await persist(lambda: zombie.receive(1, "q", "own"))
            mixed = await zombie.settle((0, "ack"), (3, "ack"), (1, "ack"), (2, "ack"))
            assert {mixed[at].status for at in (0, 2, 3)} <= refusals, mixed
            assert_settled([mixed[1]], broker.guarantees)
        await self._still_owns(subscription, held)

    @staticmethod
    def _refusals(guarantees: Guarantees) -> set[str]:
        return {"refused"} if guarantees.settle_confirmed else {"refused", "unknown"}

    @staticmethod
    async def _still_owns(subscription: Subscription, held: list[Delivery]) -> None:
        """Give all back and find each again, unchanged: the zombie's word had no effect."""
        assert None not in await subscription.extend(held)
        await subscription.settle([Release(delivery) for delivery in held])
        back = await collect(subscription, len(held))
        assert uuids(back) == uuids(held)
        assert {message_of(delivery).attempt for delivery in back} == {1}
        await subscription.settle([Ack(delivery) for delivery in back])
        await assert_silent(subscription, 0.5)

    async def test_an_extended_delivery_stays(self, rig: Rig) -> None:
        """Extended over two and a half lease times it goes to nobody else and can be settled."""
        subscriptions = [await (await rig.broker()).subscribe({"q": 1}) for _ in range(2)]
        publisher = await rig.broker()
        waiting = [rig.background(s.receive({"q": 1}, 1)) for s in subscriptions]
        await asyncio.sleep(0.2)
        assert_done(await publisher.publish([rig.message()]))
        done, _ = await asyncio.wait(waiting, timeout=30, return_when="FIRST_COMPLETED")
        assert len(done) == 1, "exactly one receiver gets the message"
        holder = subscriptions[waiting.index(next(iter(done)))]
        other = next(task for task in waiting if task not in done)
        held = next(iter(done)).result()
        async with keeping(holder, held, rig.subject.lease / 4):
            await asyncio.wait({other}, timeout=2.5 * rig.subject.lease)
        assert not other.done(), "another receiver got a delivery that is held"
        assert_settled(await holder.settle([Ack(held[0])]), publisher.guarantees)
        await asyncio.wait({other}, timeout=0.5)
        assert not other.done(), "an acknowledged delivery came again"
        other.cancel()
        await asyncio.wait({other})

    @pytest.mark.parametrize("first", ["short", "long"])
    async def test_a_lease_is_the_receivers(self, rig: Rig, first: str) -> None:
        """Two receivers of one queue have leases of their own, whichever subscribed first.

        What the dead one held comes back within its short lease; the other keeps what it holds.
        """
        # Longer than all waits here, so that what waits for the end of this lease is found out.
        short, holder = await rig.elsewhere(), await rig.broker(lease=3 * LONG_LEASE)
        broker = await rig.broker()
        if first == "short":
            await short.subscribe(1)
        long = await holder.subscribe({"q": 1})
        if first == "long":
            await short.subscribe(1)
        others = await broker.subscribe({"q": 10})
        taking, receiving = rig.background(short.receive(1)), rig.background(collect(long, 1))
        deadline = clock() + PATIENCE
        while not (taking.done() and receiving.done()):
            assert clock() < deadline, "not every receiver of a queue gets of its messages"
            assert_done(await broker.publish(rig.messages(3)))
            await asyncio.wait({taking, receiving}, timeout=0.5)
        ((lost,), (kept,)) = taking.result(), receiving.result()
        since = clock()
        await short.kill()
        came: list[Delivery] = []

        async def acknowledge(subscription: Subscription) -> None:
            while True:
                receive = partial(subscription.receive, {"q": 10}, 10)
                some = await retry(receive, LONG_LEASE)
                acks = [Ack(delivery) for delivery in some]
                assert_settled(await subscription.settle(acks), broker.guarantees)
                came.extend(some)

        # The server chooses which of the two gets it, as by Kafka's partitions: both receive.
        receivers = {rig.background(acknowledge(each)) for each in (others, long)}
        deadline = since + max(rig.within, PATIENCE)
        while lost.message.uuid not in uuids(came):
            assert clock() < deadline, "what the dead one held came to nobody"
            await only_time_passes(receivers, 0.1)
        # By then a short lease would be over that began with the long one.
        await only_time_passes(receivers, max(since + rig.subject.lease - clock(), 0.0) + 1.0)
        assert message_of(kept).uuid not in uuids(came), "another got what is held"
        assert_settled(await long.settle([Ack(kept)]), holder.guarantees)

    async def test_settling_follows_a_replaced_fence(self, rig: Rig) -> None:
        """Where `extend` hands back a replacement, the old delivery can still be settled."""
        broker = await rig.broker()
        assert_done(await broker.publish([rig.message()]))
        subscription = await broker.subscribe({"q": 10})
        (old,) = await collect(subscription, 1)
        for _ in range(2):
            (new,) = await subscription.extend([old])
            assert new is not None
        assert_settled(await subscription.settle([Ack(old)]), broker.guarantees)
        await assert_silent(subscription, rig.subject.lease)


async def only_time_passes(tasks: set[asyncio.Task[None]], seconds: float) -> None:
    """Wait, and raise what one of the tasks raises meanwhile."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when="FIRST_COMPLETED")
    for task in done:
        task.result()


async def acknowledge_for(
    subscription: Subscription, seconds: float, *queues: str
) -> list[Delivery]:
    """Acknowledge what comes within so many seconds, and return it."""
    came: list[Delivery] = []
    wanted = dict.fromkeys(queues or ("q",), 10)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                some = await subscription.receive(wanted, 10)
                came += some
                await subscription.settle([Ack(delivery) for delivery in some])
    return came
