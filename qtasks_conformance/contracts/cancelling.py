"""Cancelling a receive or closing a subscription strands no delivery."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled, uuids
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import SOON, assert_silent, collect
from qtasks_core import Ack, Delivery, Subscription
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
        received += await collect(subscription, len(messages) - len(received), SOON)
        assert_done(await publishing)
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

    async def test_closing_releases_what_was_not_returned(self, rig: Rig) -> None:
        """Another receives it long before the lease; what was returned can still be settled."""
        broker, other = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        messages = rig.messages(20)
        assert_done(await broker.publish(messages))
        closing = await broker.subscribe({"q": 20})
        async with asyncio.timeout(SOON):
            returned = await closing.receive({"q": 2}, 2)
        await closing.close()
        successor = await other.subscribe({"q": 20})
        rest = await collect(successor, len(messages) - len(returned), SOON)
        assert uuids(returned + rest) == sorted(message.uuid for message in messages)
        assert None not in await closing.extend(returned)
        assert_settled(await closing.settle([Ack(d) for d in returned]), broker.guarantees)
        assert_settled(await successor.settle([Ack(d) for d in rest]), broker.guarantees)
        await closing.close()
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
        async with asyncio.timeout(SOON):
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
