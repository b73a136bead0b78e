"""Any call can be cancelled at any time and made again, without harm to other calls."""

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
from qtasks_conformance.contracts.inboxes import hear, hear_despite_outages
from qtasks_conformance.contracts.keys import received
from qtasks_conformance.contracts.pairs import completion
from qtasks_conformance.rig import LONG_LEASE, Rig, new_uuid
from qtasks_conformance.waiting import SOON, assert_silent, collect, patient, retry_call
from qtasks_core import Ack, Completion, Status
from qtasks_core.separate import compose

T = TypeVar("T")

INSTANTS = (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
"""Seconds after which a call is cancelled: some before it reaches the server, some after."""
TIMES = 2 * len(INSTANTS)
"""How many calls are cancelled in each test."""


class BrokerRepeatContract(Contract):
    """Invariants 1, 9 and 10, for cancelled calls of a broker and its subscriptions."""

    async def test_a_cancelled_publish_is_made_again(self, rig: Rig) -> None:
        """A cancelled `publish` is repeated: each message is delivered once, at worst twice.

        Messages of other calls at the same time are delivered exactly once.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        messages, others = rig.messages(TIMES), rig.messages(TIMES)
        for message, other, instant in zip(messages, others, cycle(INSTANTS), strict=False):
            beside = rig.background(broker.publish([other]))
            await cancel_after(broker.publish([message]), instant)
            assert_done(await beside)
            assert_done(await broker.publish([message]))
        there = uuids(await received(await broker.subscribe({"q": 1000}), 2 * TIMES))
        assert {there.count(message.uuid) for message in messages} <= {1, 2}
        assert [there.count(other.uuid) for other in others] == [1] * TIMES

    @pytest.mark.parametrize("how", ["ack", "retry", "release"])
    async def test_a_cancelled_settle_is_made_again(self, rig: Rig, how: How) -> None:
        """A cancelled `settle` is repeated and is `done`, and so is another one at the same time.

        A message that comes back comes at worst twice: a cancelled retry may leave the old message
        and the new one. If `atomic_retries` is declared, it comes exactly once.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(2 * TIMES)))
        subscription = await broker.subscribe({"q": 4 * TIMES})
        held = await collect(subscription, 2 * TIMES)
        for mine, other, instant in zip(held[0::2], held[1::2], cycle(INSTANTS), strict=False):
            beside = rig.background(subscription.settle([settlement(other, how)]))
            await cancel_after(subscription.settle([settlement(mine, how)]), instant)
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
        """After a cancelled `extend`, the deliveries are still held and can be settled."""
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(3)))
        subscription = await broker.subscribe({"q": 3})
        held = await collect(subscription, 3)
        for instant in INSTANTS:
            await cancel_after(subscription.extend(held), instant)
            extended = await subscription.extend(held)
            assert None not in extended, "a cancelled `extend` lost a delivery"
            held = [delivery for delivery in extended if delivery is not None]
        assert_settled(await subscription.settle([Ack(d) for d in held]), broker.guarantees)
        await assert_silent(subscription, 0.5)

    async def test_a_cancelled_subscribe_holds_nothing(self, rig: Rig) -> None:
        """A cancelled `subscribe` holds no message back from later subscriptions."""
        broker = await rig.broker(lease=LONG_LEASE)
        messages = rig.messages(20)
        assert_done(await broker.publish(messages))
        for instant in (0.0, 0.001, 0.004, 0.016, 0.1):
            opened = await cancel_after(broker.subscribe({"q": 10}), instant)
            if opened is not None:
                await opened.close()
        subscription = await broker.subscribe({"q": 100})
        there = await collect(subscription, len(messages), SOON)
        assert uuids(there) == sorted(message.uuid for message in messages)


class StorageRepeatContract(Contract):
    """Invariants 2 and 10, for cancelled calls of a storage and its inboxes."""

    async def test_a_cancelled_save_is_made_again(self, rig: Rig) -> None:
        """A cancelled `save` is repeated: it is `done`, readable, and pushed to the inbox.

        So is a save of another record at the same time.
        """
        storage, reader = await rig.storage(), await rig.storage()
        inbox = await rig.inbox(reader)
        records, others = (
            [rig.record("success", execution="a", reply_to=inbox.address) for _ in range(TIMES)]
            for _ in range(2)
        )
        inbox.expect([record.uuid for record in (*records, *others)])
        for record, other, instant in zip(records, others, cycle(INSTANTS), strict=False):
            beside = rig.background(storage.save([other]))
            await cancel_after(storage.save([record]), instant)
            assert_done(await beside)
            assert_done(await storage.save([record]))
            (outcome,) = await storage.save([replace(record, status="error", execution="b")])
            assert (outcome.status, outcome.current) == ("refused", record)
        assert await reader.get([record.uuid for record in records]) == records
        wanted = {record.uuid: record for record in (*records, *others)}
        assert await hear(inbox, len(wanted), wanted.keys()) == wanted

    async def test_a_cancelled_get_confuses_no_other(self, rig: Rig) -> None:
        """After a cancelled `get`, every other call still gets its own answer."""
        storage = await rig.storage()
        one, two = rig.record("success"), rig.record("error")
        assert_done(await storage.save([one, two]))
        for instant in INSTANTS * 2:
            beside = rig.background(storage.get([two.uuid, one.uuid]))
            await cancel_after(storage.get([one.uuid]), instant)
            assert await beside == [two, one]
            assert await storage.get([two.uuid]) == [two]

    async def test_a_cancelled_watch_is_made_again(self, rig: Rig) -> None:
        """A cancelled `watch` is repeated: each final record is received, earlier or later ones."""
        inbox, saver = await rig.inbox(await rig.storage()), await rig.storage()
        records = [rig.record("success") for _ in range(TIMES)]
        final, later = records[0::2], records[1::2]
        wanted = {record.uuid: record for record in records}
        hearing = rig.background(hear_despite_outages(inbox, wanted.keys()))
        assert_done(await saver.save(final))
        for record, instant in zip(records, cycle(INSTANTS), strict=False):
            await cancel_after(inbox.watch([record.uuid]), instant)
            await retry_call(partial(inbox.watch, [record.uuid]))
        assert_done(await saver.save(later))
        assert await hearing == wanted


class CompositionRepeatContract(Contract):
    """Invariants 1, 2 and 10, for cancelled calls of a broker and a storage together."""

    @pytest.mark.parametrize("key", ["plain", "keyed"])
    async def test_a_cancelled_submit_is_made_again(self, rig: Rig, key: str) -> None:
        """A cancelled `submit` is repeated: each task runs and is recorded; with a key, once."""
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        messages = [
            rig.message(submission=new_uuid() if key == "keyed" else "") for _ in range(TIMES)
        ]
        for message, instant in zip(messages, cycle(INSTANTS), strict=False):
            await cancel_after(composition.submit([message]), instant)
            again = replace(message, submission=new_uuid()) if key == "keyed" else message
            (outcome,) = await composition.submit([again])
            if outcome.status != "done":
                assert key == "keyed"
                assert outcome.current is not None
                assert outcome.current.submission == message.submission
        subscription = await broker.subscribe({"q": 1000})
        deliveries = await received(subscription, TIMES)
        admitted = await composition.admit(deliveries)
        run = [d for d, (verdict, _) in zip(deliveries, admitted, strict=True) if verdict == "run"]
        sent = sorted(message.uuid for message in messages)
        assert (uuids(run) if key == "keyed" else sorted(set(uuids(run)))) == sent
        ends = [Completion(Ack(d), None) for d in deliveries if d not in run]
        await composition.complete(subscription, ends)
        await composition.complete(subscription, [completion(d, "ack", "success") for d in run])
        records = await storage.get(sent)
        assert [record and record.status for record in records] == ["success"] * TIMES

    async def test_a_cancelled_admit_is_made_again(self, rig: Rig) -> None:
        """A cancelled `admit` is repeated with the same verdict: admitting does not mark a run."""
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        messages = [rig.message(submission=new_uuid() if at % 2 else "") for at in range(TIMES)]
        assert_done(await broker.publish(messages))
        held = await collect(await broker.subscribe({"q": TIMES}), TIMES)
        for delivery, instant in zip(held, cycle(INSTANTS), strict=False):
            await cancel_after(composition.admit([delivery]), instant)
            ((verdict, _),) = await composition.admit([delivery])
            assert verdict == "run"

    @pytest.mark.parametrize("how", ["ack", "retry"])
    async def test_a_cancelled_complete_is_made_again(self, rig: Rig, how: How) -> None:
        """A cancelled `complete` is repeated: the record is saved, the delivery settled.

        The message of a retry is delivered, and can run.
        """
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        assert_done(await composition.submit(rig.messages(TIMES)))
        subscription = await broker.subscribe({"q": TIMES})
        held = await collect(subscription, TIMES)
        status: Status = "retry" if how == "retry" else "success"
        for delivery, instant in zip(held, cycle(INSTANTS), strict=False):
            await cancel_after(
                composition.complete(subscription, [completion(delivery, how, status)]), instant
            )
            again = await composition.complete(subscription, [completion(delivery, how, status)])
            assert_settled(again, broker.guarantees)
        records = await storage.get(uuids(held))
        assert [record and record.status for record in records] == [status] * TIMES
        if how == "retry":
            back = await received(subscription, TIMES)
            assert set(uuids(back)) == set(uuids(held))
            assert {verdict for verdict, _ in await composition.admit(back)} == {"run"}
            await composition.complete(
                subscription, [completion(d, "ack", "success") for d in back]
            )
        await assert_silent(subscription, 0.5)


async def cancel_after(call: Coroutine[Any, Any, T], instant: float) -> T | None:
    """Cancel a call after so many seconds; return its result if it was faster, else None.

    Raises the error of a call that fails in another way, and fails if the call does not end.
    """
    task = asyncio.create_task(call)
    await asyncio.wait({task}, timeout=instant)
    task.cancel()
    async with patient(SOON, "the end of a cancelled call"):
        await asyncio.wait({task})
    return None if task.cancelled() else task.result()
