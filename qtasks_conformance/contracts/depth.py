"""Counting and dropping the messages of a queue."""

from __future__ import annotations

import asyncio
import time

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.contracts.delivering import assert_done, assert_settled, uuids
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import SOON, assert_silent, collect, patient
from qtasks_core import Ack, Broker, QueueDepth, Release


class DepthContract(Contract):
    """`depth` and `purge`, if the broker has them."""

    async def test_depth_counts_what_is_where(self, rig: Rig) -> None:
        """`depth` counts ready, delayed and in-flight messages; None for what it cannot know."""
        needs(rig.subject.broker, "depth")
        broker, other = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        await expect_depth(broker, 0, 0, 0)
        assert_done(await other.publish(rig.messages(5) + rig.messages(2, delay=60.0)))
        await expect_depth(broker, 5, 2, 0)
        subscription = await other.subscribe({"q": 3})
        acked, released, held = await collect(subscription, 3)
        await expect_depth(broker, 2, 2, 3)
        outcomes = await subscription.settle([Ack(acked), Release(released)])
        assert_settled(outcomes, broker.guarantees)
        await expect_depth(broker, 3, 2, 1)
        assert_settled(await subscription.settle([Ack(held)]), broker.guarantees)

    async def test_depth_knows_the_oldest_ready_message(self, rig: Rig) -> None:
        """If `depth` tells an age, it is that of the message that has been ready for longest.

        A message in flight is not ready. A delayed one is ready from the time when it is due.
        """
        needs(rig.subject.broker, "depth")
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(1, delay=60.0)))
        await expect_depth(broker, 0, 1, 0)
        assert (await broker.depth("q")).oldest_age is None, "no message is ready"
        assert_done(await broker.publish(rig.messages(1)))
        await expect_depth(broker, 1, 1, 0)
        begun = time.monotonic()
        if (await broker.depth("q")).oldest_age is None:
            return  # this transport cannot know
        await asyncio.sleep(1.0)
        assert_done(await broker.publish(rig.messages(1, delay=0.1) + rig.messages(1)))
        await expect_depth(broker, 3, 1, 0)
        age = (await broker.depth("q")).oldest_age
        assert age is not None
        assert age > 0.9, "the newest message was taken for the oldest"
        assert age < time.monotonic() - begun + 5.0
        subscription = await broker.subscribe({"q": 3})
        held = await collect(subscription, 3)
        await expect_depth(broker, 0, 1, 3)
        assert (await broker.depth("q")).oldest_age is None, "messages in flight are not ready"
        assert_settled(await subscription.settle([Ack(d) for d in held]), broker.guarantees)

    async def test_depth_is_of_one_queue_and_namespace(self, rig: Rig) -> None:
        """`depth` does not count messages of other queues and other apps."""
        needs(rig.subject.broker, "depth")
        broker = await rig.broker()
        other = await rig.broker(namespace="other" + rig.namespace)
        assert_done(await broker.publish(rig.messages(2, queue="elsewhere")))
        assert_done(await other.publish(rig.messages(3)))
        await expect_depth(broker, 0, 0, 0)
        await expect_depth(broker, 2, 0, 0, "elsewhere")
        await expect_depth(other, 3, 0, 0)

    async def test_purge_drops_what_is_not_in_flight(self, rig: Rig) -> None:
        """`purge` drops ready and delayed messages, not those in flight; the queue still works.

        It returns how many it dropped, or -1 if it cannot know.
        """
        needs(rig.subject.broker, "purge")
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(6)))
        subscription = await broker.subscribe({"q": 2})
        held = await collect(subscription, 2)
        assert_done(await broker.publish(rig.messages(3, delay=1.0)))
        assert await broker.purge("q") in (7, -1)
        assert await broker.purge("q") in (0, -1)
        extended = await subscription.extend(held)
        assert None not in extended, "`purge` took a delivery from its holder"
        mine = [delivery for delivery in extended if delivery is not None]
        assert_settled(await subscription.settle([Ack(d) for d in mine]), broker.guarantees)
        await assert_silent(subscription, 2.0)
        after = rig.message()
        assert_done(await broker.publish([after]))
        assert uuids(await collect(subscription, 1)) == [after.uuid]

    async def test_purge_spares_the_neighbours(self, rig: Rig) -> None:
        """`purge` does not touch other queues, nor the same queue of another app."""
        needs(rig.subject.broker, "purge")
        broker = await rig.broker(lease=LONG_LEASE)
        other = await rig.broker(namespace="other" + rig.namespace, lease=LONG_LEASE)
        near, far = rig.message(queue="elsewhere"), rig.message()
        assert_done(await broker.publish([near, rig.message()]))
        assert_done(await other.publish([far]))
        assert await broker.purge("q") in (1, -1)
        await assert_silent(await broker.subscribe({"q": 10}), 0.3)
        elsewhere = await broker.subscribe({"elsewhere": 10})
        assert uuids(await collect(elsewhere, 1, queue="elsewhere")) == [near.uuid]
        assert uuids(await collect(await other.subscribe({"q": 10}), 1)) == [far.uuid]


async def expect_depth(
    broker: Broker, ready: int, delayed: int, in_flight: int, queue: str = "q"
) -> None:
    """Wait until `depth` answers these numbers: a server may count with a short delay."""
    wanted, got = QueueDepth(ready, delayed, in_flight), QueueDepth()
    try:
        async with patient(SOON, f"the depth {wanted}"):
            while (got := await broker.depth(queue)) != wanted:
                known = [
                    (here, there)
                    for here, there in zip(_fields(got), _fields(wanted), strict=True)
                    if here is not None
                ]
                assert known, "`depth` knows none of its numbers: declare it unsupported instead"
                if all(here == there for here, there in known):
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(
            f"`depth` of queue {queue!r} still answers {got}; it must be {wanted}"
        ) from None


def _fields(depth: QueueDepth) -> tuple[int | None, int | None, int | None]:
    return depth.ready, depth.delayed, depth.in_flight
