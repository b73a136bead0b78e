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
    """Invariant 10: cancelling a receive, closing and stopping strand no delivery."""

    async def test_cancelled_receives_strand_nothing(self, rig: Rig) -> None:
        """300 calls of `receive` are cancelled at random times: no message is lost or doubled."""
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
        assert elapsed < LONG_LEASE, (
            f"the test took {elapsed:.1f} s, longer than its lease of {LONG_LEASE:g} s"
        )
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
        """A message that arrives while `receive` is cancelled is returned by the next call."""
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
        """After a cancelled `receive`, the next call still returns no more than it asks for.

        It may ask for fewer messages or other queues. The rest is returned by later calls.
        """
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
                assert 1 <= len(some) <= 2, "`receive` must return 1 to `limit` deliveries"
                assert sum(delivery.queue == "other" for delivery in some) <= 1, (
                    "`receive` returned more of a queue than was wanted"
                )
                received += some
            assert_settled(await subscription.settle([Ack(d) for d in received]), broker.guarantees)
            assert len(set(uuids(received))) == 6

    async def test_closing_releases_what_was_not_returned(self, rig: Rig) -> None:
        """`close` releases what was fetched but not returned, long before the lease ends.

        Deliveries that were returned before can still be settled.
        """
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
        """`close` releases what a cancelled `receive` had fetched."""
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
        """`stop` of a broker releases what was fetched but not returned."""
        broker, other = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        assert_done(await broker.publish(rig.messages(10)))
        stopped = await broker.subscribe({"q": 10})
        async with patient(SOON, "receiving after a cancelled receive"):
            returned = await stopped.receive({"q": 1}, 1)
        await stopped.settle([Ack(delivery) for delivery in returned])
        await broker.stop()
        successor = await other.subscribe({"q": 10})
        await collect(successor, 9, SOON)

    async def test_stopping_ends_a_waiting_receive(self, rig: Rig) -> None:
        """`stop` makes a waiting `receive` and all later calls raise `Closed`. Twice is allowed."""
        broker = await rig.broker()
        subscription = await broker.subscribe({"q": 10})
        receiving = rig.background(subscription.receive({"q": 10}, 10))
        await asyncio.sleep(0.1)
        await broker.stop()
        await broker.stop()
        await asyncio.wait({receiving}, timeout=SOON)
        assert receiving.done(), "`receive` still waits; it must raise `Closed`"
        assert isinstance(receiving.exception(), Closed)
        with pytest.raises(Closed):
            await broker.publish([rig.message()])

    async def test_closing_ends_a_waiting_receive(self, rig: Rig) -> None:
        """`close` makes a waiting `receive` raise `Closed`, and the next call. Twice is allowed."""
        broker = await rig.broker()
        subscription = await broker.subscribe({"q": 10})
        receiving = rig.background(subscription.receive({"q": 10}, 10))
        await asyncio.sleep(0.1)
        await subscription.close()
        await subscription.close()
        await asyncio.wait({receiving}, timeout=SOON)
        assert receiving.done(), "`receive` still waits; it must raise `Closed`"
        assert isinstance(receiving.exception(), Closed)
        with pytest.raises(Closed):
            await subscription.receive({"q": 10}, 10)
