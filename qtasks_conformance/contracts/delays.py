"""Delays: a message is never early, at most two seconds late, and delivered only once."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from msgspec.structs import replace

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.patience import lag, measure_lag
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import assert_silent, collect
from qtasks_core import Ack, Broker, Retry, Subscription

LATE = 2.0
"""Seconds by which a due message may be late on an idle system."""
CENTURY = 100 * 365.25 * 86_400
"""Seconds."""
BUSY = 3.0
"""How many times the lag of this process may be added: the server is behind too, and what connects
them."""
ROUNDING = 0.002
"""Seconds by which two clocks with a resolution of 1 ms may differ."""


class DelayContract(Contract):
    """Invariant 3 (delays), measured on this process's monotonic clock."""

    async def test_a_published_delay_passes(self, rig: Rig) -> None:
        """Each message of a batch is delivered after its own delay, at most 2 s late."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await warm_subscription(rig, broker)
        delays = [2.4, 0.3, 1.2, 0.0]
        before = clock()
        assert_done(await broker.publish([rig.message(delay=delay) for delay in delays]))
        after = clock()
        waited_for = sorted(delays)
        while waited_for:
            (delivery,) = await collect(subscription, 1, max(delays) + 10)
            assert_on_time(message_of(delivery).delay, before, after)
            waited_for.remove(message_of(delivery).delay)
            await subscription.settle([Ack(delivery)])

    async def test_a_retry_delay_passes(self, rig: Rig) -> None:
        """The delay of a retry starts when it is settled."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await warm_subscription(rig, broker)
        assert_done(await broker.publish([rig.message()]))
        (delivery,) = await collect(subscription, 1)
        again = replace(message_of(delivery), attempt=2, delay=1.1)
        before = clock()
        assert_settled(await subscription.settle([Retry(delivery, again)]), broker.guarantees)
        after = clock()
        (back,) = await collect(subscription, 1)
        assert_on_time(1.1, before, after)
        assert message_of(back).attempt == 2

    async def test_a_new_earliest_wakes_sleepers(self, rig: Rig) -> None:
        """A receiver that waits for a long delay is woken when a shorter one is published."""
        publisher, broker = await rig.broker(), await rig.broker(lease=LONG_LEASE)
        subscription = await warm_subscription(rig, broker)
        assert_done(await publisher.publish([rig.message(delay=3600.0)]))
        waiting = rig.background(collect(subscription, 1))
        await asyncio.sleep(0.5)
        before = clock()
        assert_done(await publisher.publish([rig.message(delay=0.7)]))
        after = clock()
        (delivery,) = await waiting
        assert_on_time(0.7, before, after)
        assert message_of(delivery).delay == 0.7

    async def test_the_longest_delay_is_kept(self, rig: Rig) -> None:
        """A delay of 100 years does not overflow, in a new message and in a retry."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await warm_subscription(rig, broker)
        assert_done(await broker.publish([rig.message(delay=CENTURY), rig.message()]))
        (delivery,) = await collect(subscription, 1)
        again = replace(message_of(delivery), attempt=2, delay=CENTURY)
        assert_settled(await subscription.settle([Retry(delivery, again)]), broker.guarantees)
        await assert_silent(subscription, 1.0)

    async def test_a_delay_beyond_the_lease_is_delivered_once(self, rig: Rig) -> None:
        """A delay that is longer than the lease does not cause a second delivery."""
        brokers = [await rig.broker() for _ in range(2)]
        first, second = [await warm_subscription(rig, broker) for broker in brokers]
        delay = 2.2 * rig.subject.lease
        message = rig.message(delay=delay)
        before = clock()
        assert_done(await brokers[0].publish([message]))
        after = clock()
        waiting = [rig.background(s.receive({"q": 1}, 1)) for s in (first, second)]
        await asyncio.wait(waiting, timeout=delay + 10, return_when="FIRST_COMPLETED")
        assert_on_time(delay, before, after)
        for task, subscription in zip(waiting, (first, second), strict=True):
            if task.done():
                assert_settled(
                    await subscription.settle([Ack(d) for d in task.result()]),
                    brokers[0].guarantees,
                )
        await asyncio.wait(waiting, timeout=1.0)
        assert sum(task.done() for task in waiting) == 1, "a delayed message was delivered twice"
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await asyncio.gather(assert_silent(first, 0.3), assert_silent(second, 0.3))


async def warm_subscription(rig: Rig, broker: Broker) -> Subscription:
    """Subscribe and receive a first message: some servers need time until messages flow."""
    rig.background(measure_lag())
    subscription = await broker.subscribe({"q": 10})
    assert_done(await broker.publish([rig.message()]))
    await subscription.settle([Ack(d) for d in await collect(subscription, 1)])
    return subscription


class Instant(NamedTuple):
    """A moment: monotonic seconds, and how far this machine was behind until then."""

    at: float
    behind: float


def clock() -> Instant:
    """Return this moment."""
    return Instant(asyncio.get_running_loop().time(), lag())


def assert_on_time(delay: float, before: Instant, after: Instant) -> None:
    """Fail unless a delay is over now. The server got the message between `before` and `after`.

    On a busy machine, a message may be later: the broker and the server are behind too.
    """
    now = clock()
    took, allowed = now.at - after.at, delay + LATE + BUSY * (now.behind - after.behind)
    assert now.at - before.at >= delay - ROUNDING, (
        f"a message with a delay of {delay} s was delivered too early, "
        f"after {now.at - before.at:.3f} s"
    )
    assert took <= allowed, (
        f"a message with a delay of {delay} s was delivered too late, after {took:.3f} s; "
        f"{LATE:g} s more than the delay are allowed"
    )
