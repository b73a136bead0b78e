"""The server is killed and started again, while the same broker and storage objects are used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled, uuids
from qtasks_conformance.contracts.inboxes import hear_despite_outages
from qtasks_conformance.patience import server_away
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.subject import Server
from qtasks_conformance.waiting import PATIENCE, collect, retry_call
from qtasks_core import Ack, Guarantees
from qtasks_core.errors import Unavailable
from qtasks_core.schemas import EVENTS

GIVES_UP_WITHIN = min(12.0, PATIENCE)
"""Seconds within which a call must raise `Unavailable` if the server is away, on a busy machine."""


class BrokerOutageContract(Contract):
    """Invariants 1 and 5, for messages. Needs `server=` and `survives="server crash"`."""

    async def test_messages_outlive_the_server(self, rig: Rig) -> None:
        """Messages survive a crash of the server; an existing subscription receives them.

        So do messages that were in flight: another receiver gets them when the holder has stopped.
        """
        broker, receiver = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        server = server_of(rig, broker.guarantees)
        holder = await rig.broker()
        subscription = await receiver.subscribe({"q": 100})
        assert_done(await broker.publish(rig.messages(2, queue="held")))
        held = await collect(await holder.subscribe({"held": 2}), 2, queue="held")
        # Nothing is due, or halfway due, during the crash: a server that is killed while it moves a
        # message may then have it twice, or move it again only minutes later.
        before = rig.messages(20) + rig.messages(2, delay=min(12.0, float(PATIENCE)))
        assert_done(await broker.publish(before))
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        await holder.stop()
        again = await receiver.subscribe({"held": 2})
        assert uuids(await collect(again, 2, 2 * PATIENCE, "held")) == uuids(held)
        deliveries = await collect(subscription, len(before), 2 * PATIENCE)
        assert uuids(deliveries) == sorted(message.uuid for message in before)
        assert_settled(
            await retry_call(lambda: subscription.settle([Ack(d) for d in deliveries])),
            receiver.guarantees,
        )
        after = rig.messages(5)
        assert_done(await retry_call(lambda: broker.publish(after)))
        expected = {message.uuid for message in after}
        deliveries = await collect(subscription, len(after))
        assert {message_of(delivery).uuid for delivery in deliveries} <= expected

    async def test_leases_outlive_the_server_where_declared(self, rig: Rig) -> None:
        """If `leases_survive` is declared, the holder keeps its lease through a crash."""
        broker, other = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        server = server_of(rig, broker.guarantees)
        if not broker.guarantees.leases_survive:
            pytest.skip("the guarantees declare leases_survive=False")
        assert_done(await broker.publish(rig.messages(4)))
        holder, rival = await broker.subscribe({"q": 4}), await other.subscribe({"q": 4})
        held = await collect(holder, 4)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        assert None not in await retry_call(lambda: holder.extend(held[:2]))
        assert_done(await retry_call(lambda: holder.settle([Ack(delivery) for delivery in held])))
        message = rig.message()
        assert_done(await retry_call(lambda: broker.publish([message])))
        (delivery,) = await collect(rival, 1)
        assert message_of(delivery).uuid == message.uuid, (
            "a message that was held through the crash was delivered to another receiver"
        )

    async def test_a_waiting_receive_outlives_the_server(self, rig: Rig) -> None:
        """A waiting `receive` survives a crash of the server and gets later messages.

        While the server is away, other calls raise `Unavailable` within seconds. A broker whose
        `start` failed can be started later.
        """
        broker, receiver = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        server = server_of(rig, broker.guarantees)
        subscription = await receiver.subscribe({"q": 100})
        waiting = rig.background(collect(subscription, 3, 2 * PATIENCE))
        idle = await broker.subscribe({"other": 1})
        await asyncio.sleep(0.3)
        late = rig.subject.broker.broker()
        async with killed(server):
            await gives_up(lambda: broker.publish(rig.messages(1)))
            await gives_up(lambda: idle.receive({"other": 1}, 1))
            await gives_up(lambda: late.start(rig.namespace))
        await retry_call(lambda: late.start(rig.namespace))
        await late.stop()
        messages = rig.messages(3)
        assert_done(await retry_call(lambda: broker.publish(messages)))
        assert len(await waiting) == 3


class StorageOutageContract(Contract):
    """Invariants 1, 2 and 5, for records. Needs `server=` and `survives="server crash"`."""

    async def test_records_outlive_the_server(self, rig: Rig) -> None:
        """Records survive a crash of the server, and the order of records still holds.

        While the server is away, calls raise `Unavailable` within seconds. A storage whose `start`
        failed can be started later.
        """
        storage = await rig.storage()
        server = server_of(rig, storage.guarantees)
        final = rig.record("success", returning=b"1", execution="a")
        open_ = rig.record("process", execution="b")
        assert_done(await storage.save([final, open_]))
        late = rig.subject.storage.storage()
        async with killed(server):
            await gives_up(lambda: storage.save([rig.record("new")]))
            await gives_up(lambda: storage.get([final.uuid]))
            await gives_up(lambda: late.start(rig.namespace))
        await retry_call(lambda: late.start(rig.namespace))
        assert await late.get([final.uuid]) == [final]
        await late.stop()
        assert await retry_call(lambda: storage.get([final.uuid, open_.uuid])) == [final, open_]
        other = rig.record("error", uuid=final.uuid, execution="c")
        (outcome,) = await retry_call(lambda: storage.save([other]))
        assert (outcome.status, outcome.current) == ("refused", final)

    async def test_an_inbox_outlives_the_server(self, rig: Rig) -> None:
        """An inbox receives what became final before and after a crash of the server.

        Its address stays the same. This also holds for an inbox on which nobody called `receive`
        meanwhile, and for a task that was first watched while the server was away.
        """
        storage, saver = await rig.storage(), await rig.storage()
        server = server_of(rig, storage.guarantees)
        inbox = await rig.inbox(storage)
        address = inbox.address
        early, mine = [rig.record("success", reply_to=address) for _ in range(2)]
        watched, late = rig.record("error"), rig.record("cancel")
        deaf = await rig.inbox(storage)
        own = rig.record("success", reply_to=deaf.address)
        deaf.expect([own.uuid])
        await deaf.watch([watched.uuid])
        inbox.expect([early.uuid, mine.uuid])
        await inbox.watch([watched.uuid])
        assert_done(await saver.save([early]))
        async with killed(server):
            waiting = rig.background(
                hear_despite_outages(inbox, {early.uuid, mine.uuid, watched.uuid})
            )
            with suppress(Unavailable):
                async with asyncio.timeout(GIVES_UP_WITHIN):
                    await deaf.watch([late.uuid])
        assert_done(await retry_call(lambda: saver.save([mine, own, watched, late])))
        heard = await waiting
        assert heard == {record.uuid: record for record in (early, mine, watched)}
        assert inbox.address == address
        got = await hear_despite_outages(deaf, {own.uuid, watched.uuid, late.uuid})
        assert got == {record.uuid: record for record in (own, watched, late)}


async def gives_up(call: Callable[[], Awaitable[object]]) -> None:
    """Fail unless a call without a server raises `Unavailable` within seconds."""
    with pytest.raises(Unavailable):
        async with asyncio.timeout(GIVES_UP_WITHIN):
            await call()


@asynccontextmanager
async def killed(server: Server) -> AsyncIterator[None]:
    """Kill the server for the block; start it again afterwards, also if the block fails."""
    with server_away():
        await asyncio.to_thread(server.kill)
        try:
            yield
        finally:
            await asyncio.to_thread(server.restart)


def server_of(rig: Rig, guarantees: Guarantees) -> Server:
    """Return the server. Skip the test if there is none, or if a crash may lose data."""
    if rig.subject.server is None:
        pytest.skip("the subject has no server")
    if EVENTS.index(guarantees.survives) < EVENTS.index("server crash"):
        pytest.skip(
            f"the guarantees declare survives={guarantees.survives!r}: {guarantees.durability}"
        )
    return rig.subject.server
