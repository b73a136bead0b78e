"""A call that was cancelled, at whatever moment, harms no other and can be made again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from itertools import cycle
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import How, message_of, settlement
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled, uuids
from qtasks_conformance.contracts.inboxes import hear, hear_through
from qtasks_conformance.contracts.keys import received
from qtasks_conformance.contracts.pairs import end
from qtasks_conformance.rig import LONG_LEASE, Rig, new_uuid
from qtasks_conformance.waiting import SOON, assert_silent, collect, patient, persist
from qtasks_core import Ack, Completion, Status
from qtasks_core.separate import compose

T = TypeVar("T")

INSTANTS = (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
"""Seconds after which a call is cancelled: some before it reaches a server, some after."""
TIMES = 2 * len(INSTANTS)


class BrokerRepeatContract(Contract):
    """Invariants 1, 9 and 10, for calls of a broker and its subscriptions."""

    async def test_a_cancelled_publish_is_made_again(self, rig: Rig) -> None:
        """Each message is there then, twice at worst; what another published meanwhile, once."""
        broker = await rig.broker(lease=LONG_LEASE)
        messages, others = rig.messages(TIMES), rig.messages(TIMES)
        for message, other, instant in zip(messages, others, cycle(INSTANTS), strict=False):
            beside = rig.background(broker.publish([other]))
            await cut_off(broker.publish([message]), instant)
            assert_done(await beside)
            assert_done(await broker.publish([message]))
        there = uuids(await received(await broker.subscribe({"q": 1000}), 2 * TIMES))
        assert {there.count(message.uuid) for message in messages} <= {1, 2}
        assert [there.count(other.uuid) for other in others] == [1] * TIMES

    @pytest.mark.parametrize("how", ["ack", "retry", "release"])
    async def test_a_cancelled_settle_is_made_again(self, rig: Rig, how: How) -> None:
        """It is done, and so is one that was made beside it. What comes back comes twice at worst.

        A cancel is to the delivery what a crash is: that may leave the new message and the old,
        unless the broker declares `atomic_retries`.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(2 * TIMES)))
        subscription = await broker.subscribe({"q": 4 * TIMES})
        held = await collect(subscription, 2 * TIMES)
        for mine, other, instant in zip(held[0::2], held[1::2], cycle(INSTANTS), strict=False):
            beside = rig.background(subscription.settle([settlement(other, how)]))
            await cut_off(subscription.settle([settlement(mine, how)]), instant)
            assert_settled(await beside, broker.guarantees)
            again = await subscription.settle([settlement(mine, how)])
            assert_settled(again, broker.guarantees)
        assert await subscription.extend(held) == [None] * len(held)
        if how == "ack":
            await assert_silent(subscription, 0.5)
            return
        back = await received(subscription, 2 * TIMES)
        there = uuids(back)
        once = how == "retry" and broker.guarantees.atomic_retries
        times = {there.count(message_of(mine).uuid) for mine in held[0::2]}
        assert times <= ({1} if once else {1, 2})
        assert {there.count(message_of(other).uuid) for other in held[1::2]} == {1}
        assert {message_of(d).attempt for d in back} == {2 if how == "retry" else 1}

    async def test_a_cancelled_extend_is_made_again(self, rig: Rig) -> None:
        """What is held stays held, and can be settled."""
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(3)))
        subscription = await broker.subscribe({"q": 3})
        held = await collect(subscription, 3)
        for instant in INSTANTS:
            await cut_off(subscription.extend(held), instant)
            extended = await subscription.extend(held)
            assert None not in extended
            held = [delivery for delivery in extended if delivery is not None]
        assert_settled(await subscription.settle([Ack(d) for d in held]), broker.guarantees)
        await assert_silent(subscription, 0.5)

    async def test_a_cancelled_subscribe_holds_nothing(self, rig: Rig) -> None:
        """It takes no message that somebody who subscribes later would get."""
        broker = await rig.broker(lease=LONG_LEASE)
        messages = rig.messages(20)
        assert_done(await broker.publish(messages))
        for instant in (0.0, 0.001, 0.004, 0.016, 0.1):
            opened = await cut_off(broker.subscribe({"q": 10}), instant)
            if opened is not None:
                await opened.close()
        subscription = await broker.subscribe({"q": 100})
        there = await collect(subscription, len(messages), SOON)
        assert uuids(there) == sorted(message.uuid for message in messages)


class StorageRepeatContract(Contract):
    """Invariants 2 and 10, for calls of a storage and its inboxes."""

    async def test_a_cancelled_save_is_made_again(self, rig: Rig) -> None:
        """It is done then, is read by all, and told to who waits; so is one made beside it."""
        storage, reader = await rig.storage(), await rig.storage()
        inbox = await rig.inbox(reader)
        records, others = (
            [rig.record("success", execution="a", reply_to=inbox.address) for _ in range(TIMES)]
            for _ in range(2)
        )
        inbox.expect([record.uuid for record in (*records, *others)])
        for record, other, instant in zip(records, others, cycle(INSTANTS), strict=False):
            beside = rig.background(storage.save([other]))
            await cut_off(storage.save([record]), instant)
            assert_done(await beside)
            assert_done(await storage.save([record]))
            (outcome,) = await storage.save([replace(record, status="error", execution="b")])
            assert (outcome.status, outcome.there) == ("refused", record)
        assert await reader.get([record.uuid for record in records]) == records
        wanted = {record.uuid: record for record in (*records, *others)}
        assert await hear(inbox, len(wanted), wanted.keys()) == wanted

    async def test_a_cancelled_get_confuses_no_other(self, rig: Rig) -> None:
        """Each call has its own answer, also when nobody waits for the one before it."""
        storage = await rig.storage()
        one, two = rig.record("success"), rig.record("error")
        assert_done(await storage.save([one, two]))
        for instant in INSTANTS * 2:
            beside = rig.background(storage.get([two.uuid, one.uuid]))
            await cut_off(storage.get([one.uuid]), instant)
            assert await beside == [two, one]
            assert await storage.get([two.uuid]) == [two]

    async def test_a_cancelled_watch_is_made_again(self, rig: Rig) -> None:
        """What is watched then is heard of, whether it was final before or is later."""
        inbox, saver = await rig.inbox(await rig.storage()), await rig.storage()
        records = [rig.record("success") for _ in range(TIMES)]
        final, later = records[0::2], records[1::2]
        wanted = {record.uuid: record for record in records}
        hearing = rig.background(hear_through(inbox, wanted.keys()))
        assert_done(await saver.save(final))
        for record, instant in zip(records, cycle(INSTANTS), strict=False):
            await cut_off(inbox.watch([record.uuid]), instant)
            await persist(partial(inbox.watch, [record.uuid]))
        assert_done(await saver.save(later))
        assert await hearing == wanted


class CompositionRepeatContract(Contract):
    """Invariants 1, 2 and 10, for a broker and a storage together."""

    @pytest.mark.parametrize("key", ["plain", "keyed"])
    async def test_a_cancelled_submit_is_made_again(self, rig: Rig, key: str) -> None:
        """Each task is run and recorded; what has a key is run once."""
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        messages = [
            rig.message(submission=new_uuid() if key == "keyed" else "") for _ in range(TIMES)
        ]
        for message, instant in zip(messages, cycle(INSTANTS), strict=False):
            await cut_off(composition.submit([message]), instant)
            again = replace(message, submission=new_uuid()) if key == "keyed" else message
            (outcome,) = await composition.submit([again])
            if outcome.status != "done":
                assert key == "keyed"
                assert outcome.there is not None
                assert outcome.there.submission == message.submission
        subscription = await broker.subscribe({"q": 1000})
        deliveries = await received(subscription, TIMES)
        admitted = await composition.admit(deliveries)
        run = [d for d, (verdict, _) in zip(deliveries, admitted, strict=True) if verdict == "run"]
        sent = sorted(message.uuid for message in messages)
        assert (uuids(run) if key == "keyed" else sorted(set(uuids(run)))) == sent
        ends = [Completion(Ack(d), None) for d in deliveries if d not in run]
        await composition.complete(subscription, ends)
        await composition.complete(subscription, [end(d, "ack", "success") for d in run])
        records = await storage.get(sent)
        assert [record and record.status for record in records] == ["success"] * TIMES

    async def test_a_cancelled_admit_is_made_again(self, rig: Rig) -> None:
        """The verdict is the same: having been asked about is not having been run."""
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        messages = [rig.message(submission=new_uuid() if at % 2 else "") for at in range(TIMES)]
        assert_done(await broker.publish(messages))
        held = await collect(await broker.subscribe({"q": TIMES}), TIMES)
        for delivery, instant in zip(held, cycle(INSTANTS), strict=False):
            await cut_off(composition.admit([delivery]), instant)
            ((verdict, _),) = await composition.admit([delivery])
            assert verdict == "run"

    @pytest.mark.parametrize("how", ["ack", "retry"])
    async def test_a_cancelled_complete_is_made_again(self, rig: Rig, how: How) -> None:
        """The end is recorded and the delivery settled; a retry is still to come."""
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        assert_done(await composition.submit(rig.messages(TIMES)))
        subscription = await broker.subscribe({"q": TIMES})
        held = await collect(subscription, TIMES)
        status: Status = "retry" if how == "retry" else "success"
        for delivery, instant in zip(held, cycle(INSTANTS), strict=False):
            await cut_off(composition.complete(subscription, [end(delivery, how, status)]), instant)
            again = await composition.complete(subscription, [end(delivery, how, status)])
            assert_settled(again, broker.guarantees)
        records = await storage.get(uuids(held))
        assert [record and record.status for record in records] == [status] * TIMES
        if how == "retry":
            back = await received(subscription, TIMES)
            assert set(uuids(back)) == set(uuids(held))
            assert {verdict for verdict, _ in await composition.admit(back)} == {"run"}
            await composition.complete(subscription, [end(d, "ack", "success") for d in back])
        await assert_silent(subscription, 0.5)


async def cut_off(call: Coroutine[Any, Any, T], instant: float) -> T | None:
    """Cancel a call after so many seconds, and see that it ends; what it returned if it was done.

    How it failed is told: only being cancelled is no failure.
    """
    task = asyncio.create_task(call)
    await asyncio.wait({task}, timeout=instant)
    task.cancel()
    async with patient(SOON, "the end of a cancelled call"):
        await asyncio.wait({task})
    return None if task.cancelled() else task.result()
