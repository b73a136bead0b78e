"""Cancelling a receive or closing a subscription strands no delivery."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled, uuids
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import SOON, assert_silent, collect, patient
from qtasks_core import Ack, Delivery, Release, Retry, Settlement, Subscription
from qtasks_core.errors import Closed

CANCELS = 300


class CancellingContract(Contract):
    """Invariant 10."""

    async def test_cancelled_receives_strand_nothing(self, rig: Rig) -> None:
        """300 receives cancelled at random instants lose nothing and double nothing."""
        broker = await rig.broker(lease=LONG_LEASE)
        publisher = await rig.elsewhere(lease=LONG_LEASE)
        subscription = await broker.subscribe({"q": 1000})
        messages = rig.messages(400)
        publishing = rig.background(publisher.stream(messages, 0.003))
        started = asyncio.get_running_loop().time()
        received = await self._cancel_often(subscription, started)
        assert_done(await publishing)
        received += await collect(subscription, len(messages) - len(received), SOON)
        elapsed = asyncio.get_running_loop().time() - started
        assert elapsed < LONG_LEASE, f"it took {elapsed:.1f} s: a lease may have run out"
        assert uuids(received) == sorted(message.uuid for message in messages)
        assert_settled(await subscription.settle([Ack(d) for d in received]), broker.guarantees)
        await assert_silent(subscription, 0.3)

    async def _cancel_often(self, subscription: Subscription, seed: float) -> list[Delivery]:
        instants = Random(seed)
        received: list[Delivery] = []
        cancelled = 0
        while cancelled < CANCELS:
            receiving = asyncio.create_task(subscription.receive({"q": 7}, 7))
            await asyncio.wait({receiving}, timeout=instants.uniform(0.0, 0.012))
            if receiving.done():
                received += receiving.result()
                continue
            receiving.cancel()
            cancelled += 1
            try:
                received += await receiving
            except asyncio.CancelledError:
                continue
        return received

    async def test_what_a_cancelled_receive_took_is_returned_by_the_next(self, rig: Rig) -> None:
        """A message that arrives while its receive is being cancelled comes with the next."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await broker.subscribe({"q": 10})
        for instant in (0.0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016):
            message = rig.message()
            receiving = rig.background(subscription.receive({"q": 10}, 10))
            await asyncio.sleep(0.02)
            publishing = rig.background(broker.publish([message]))
            await asyncio.sleep(instant)
            receiving.cancel()
            await asyncio.wait({receiving})
            assert_done(await publishing)
            deliveries = (
                await collect(subscription, 1, SOON)
                if receiving.cancelled()
                else receiving.result()
            )
            assert uuids(deliveries) == [message.uuid]
            await subscription.settle([Ack(deliveries[0])])

    async def test_what_a_cancelled_receive_took_is_not_forced_on_the_next(self, rig: Rig) -> None:
        """The next may want less, or another queue: what is over stays for a later call."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await broker.subscribe({"q": 10, "other": 10})
        for instant in (0.0, 0.001, 0.004):
            receiving = rig.background(subscription.receive({"q": 10, "other": 10}, 10))
            await asyncio.sleep(0.02)
            messages = rig.messages(5)
            publishing = rig.background(broker.publish([*messages, rig.message(queue="other")]))
            await asyncio.sleep(instant)
            receiving.cancel()
            await asyncio.wait({receiving})
            assert_done(await publishing)
            received = [] if receiving.cancelled() else receiving.result()
            while len(received) < 6:
                async with patient(SOON, "receiving after a cancelled receive"):
                    some = await subscription.receive({"q": 2, "other": 1}, 2)
                assert 1 <= len(some) <= 2
                assert sum(delivery.queue == "other" for delivery in some) <= 1
                received += some
            assert_settled(await subscription.settle([Ack(d) for d in received]), broker.guarantees)
            assert len(set(uuids(received))) == 6

    async def test_closing_releases_what_was_not_returned(self, rig: Rig) -> None:
        """Another receives it long before the lease; what was returned can still be settled."""
        broker, other = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        messages = rig.messages(20)
        assert_done(await broker.publish(messages))
        closing = await broker.subscribe({"q": 20})
        returned: list[Delivery] = []
        async with patient(SOON, "receiving after a cancelled receive"):
            while len(returned) < 3:
                returned += await closing.receive({"q": 3 - len(returned)}, 3 - len(returned))
        await closing.close()
        successor = await other.subscribe({"q": 20})
        rest = await collect(successor, len(messages) - len(returned), SOON)
        assert uuids(returned + rest) == sorted(message.uuid for message in messages)
        assert_settled(await successor.settle([Ack(d) for d in rest]), broker.guarantees)
        extended = await closing.extend(returned)
        acked, retried, released = [d for d in extended if d is not None]
        again = replace(message_of(retried), attempt=2)
        ends: list[Settlement] = [Ack(acked), Retry(retried, again), Release(released)]
        assert_settled(await closing.settle(ends), broker.guarantees)
        await closing.close()
        back = await collect(successor, 2, SOON)
        assert uuids(back) == sorted([again.uuid, message_of(released).uuid])
        assert_settled(await successor.settle([Ack(d) for d in back]), broker.guarantees)
        await assert_silent(successor, 0.5)

    async def test_closing_after_a_cancel_releases(self, rig: Rig) -> None:
        """What a cancelled receive had taken is released by `close`."""
        broker, other = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        for instant in (0.0, 0.002):
            subscription = await broker.subscribe({"q": 10})
            receiving = rig.background(subscription.receive({"q": 10}, 10))
            await asyncio.sleep(0.05)
            publishing = rig.background(broker.publish(rig.messages(3)))
            await asyncio.sleep(instant)
            receiving.cancel()
            await asyncio.wait({receiving})
            assert_done(await publishing)
            await subscription.close()
            successor = await other.subscribe({"q": 10})
            returned = [] if receiving.cancelled() else receiving.result()
            await subscription.settle([Ack(delivery) for delivery in returned])
            rest = await collect(successor, 3 - len(returned), SOON)
            await successor.settle([Ack(delivery) for delivery in rest])
            await successor.close()

    async def test_stopping_releases_what_was_not_returned(self, rig: Rig) -> None:
        """Stopping a broker strands nothing either."""
        broker, other = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        assert_done(await broker.publish(rig.messages(10)))
        stopped = await broker.subscribe({"q": 10})
        async with patient(SOON, "receiving after a cancelled receive"):
            returned = await stopped.receive({"q": 1}, 1)
        await stopped.settle([Ack(delivery) for delivery in returned])
        await broker.stop()
        successor = await other.subscribe({"q": 10})
        assert len(await collect(successor, 9, SOON)) == 9

    async def test_stopping_ends_a_waiting_receive(self, rig: Rig) -> None:
        """Stopped, a broker and its subscriptions raise `Closed`; stopping twice is harmless."""
        broker = await rig.broker()
        subscription = await broker.subscribe({"q": 10})
        receiving = rig.background(subscription.receive({"q": 10}, 10))
        await asyncio.sleep(0.1)
        await broker.stop()
        await broker.stop()
        await asyncio.wait({receiving}, timeout=SOON)
        assert receiving.done(), "the receive goes on waiting"
        assert isinstance(receiving.exception(), Closed)
        with pytest.raises(Closed):
            await broker.publish([rig.message()])

    async def test_closing_ends_a_waiting_receive(self, rig: Rig) -> None:
        """A receive that waits raises `Closed`, and so does the next; closing twice is harmless."""
        broker = await rig.broker()
        subscription = await broker.subscribe({"q": 10})
        receiving = rig.background(subscription.receive({"q": 10}, 10))
        await asyncio.sleep(0.1)
        await subscription.close()
        await subscription.close()
        await asyncio.wait({receiving}, timeout=SOON)
        assert receiving.done(), "the receive goes on waiting"
        assert isinstance(receiving.exception(), Closed)
        with pytest.raises(Closed):
            await subscription.receive({"q": 10}, 10)
