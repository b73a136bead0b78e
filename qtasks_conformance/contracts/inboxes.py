"""Inboxes receive final records: of the client's own tasks, and of watched tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from random import Random

import pytest

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done
from qtasks_conformance.elsewhere import Elsewhere
from qtasks_conformance.rig import SCRIPTS, Rig, longest_ids
from qtasks_conformance.waiting import PATIENCE, SOON, patient, retry_call_untimed
from qtasks_core import Inbox, Task
from qtasks_core.errors import Closed


class InboxContract(Contract):
    """What a client that waits for results relies on.

    An inbox receives the final records whose `reply_to` is its address (`expect`), and those of
    tasks that it watches (`watch`).
    """

    @pytest.mark.parametrize("how", ["expect", "watch"])
    async def test_told_while_it_waits(self, rig: Rig, how: str) -> None:
        """A waiting `receive` returns when another process saves the final record."""
        inbox = await rig.inbox(await rig.storage())
        saver = await rig.elsewhere()
        record = self._record(rig, inbox, how)
        await self._ask(inbox, how, record)
        waiting = rig.background(hear(inbox, 1))
        await asyncio.sleep(0.2)
        assert_done(await saver.save(record))
        assert await waiting == {record.uuid: record}

    @pytest.mark.parametrize("how", ["expect", "watch"])
    async def test_told_of_what_came_before_it_received(self, rig: Rig, how: str) -> None:
        """A record that became final before `receive` was called is received."""
        inbox = await rig.inbox(await rig.storage())
        saver = await rig.storage()
        record = self._record(rig, inbox, how)
        await self._ask(inbox, how, record)
        assert_done(await saver.save([record]))
        await asyncio.sleep(0.2)
        assert await hear(inbox, 1) == {record.uuid: record}

    @pytest.mark.parametrize("script", SCRIPTS)
    @pytest.mark.parametrize("how", ["expect", "watch"])
    async def test_told_of_the_longest_uuids(self, rig: Rig, how: str, script: str) -> None:
        """Uuids of 200 characters of any script work, for small records and large ones."""
        inbox = await rig.inbox(await rig.storage())
        saver = await rig.storage()
        reply_to = inbox.address if how == "expect" else None
        records = [
            rig.record("success", uuid=uuid, reply_to=reply_to, returning=b"x" * size)
            for uuid, size in zip(longest_ids(script), (1, 5000, 20_000), strict=True)
        ]
        for record in records[:2]:
            await self._ask(inbox, how, record)
        assert_done(await saver.save(records))
        wanted = {record.uuid: record for record in records[:2]}
        heard = await hear(inbox, 2, wanted.keys())
        assert {uuid: heard[uuid] for uuid in wanted} == wanted

    async def test_told_of_what_was_final_before_it_watched(self, rig: Rig) -> None:
        """A watched task that is already final is received at once."""
        saver = await rig.storage()
        record = rig.record("cancel", reply_to="another-client")
        assert_done(await saver.save([record]))
        inbox = await rig.inbox(await rig.storage())
        await inbox.watch([record.uuid])
        assert await hear(inbox, 1) == {record.uuid: record}

    async def test_told_of_what_becomes_final_while_it_begins_to_watch(self, rig: Rig) -> None:
        """No record is missed if it becomes final while `watch` is called."""
        inbox = await rig.inbox(await rig.storage())
        saver = await rig.elsewhere()
        records = [rig.record("success") for _ in range(60)]
        batches = [records[at : at + 5] for at in range(0, len(records), 5)]

        async def watch() -> None:
            for batch in batches:
                await inbox.watch([record.uuid for record in batch])

        async def save() -> None:
            for batch in batches:
                assert_done(await saver.save(*batch))

        heard, _, _ = await asyncio.gather(hear(inbox, len(records)), watch(), save())
        assert heard == {record.uuid: record for record in records}

    async def test_told_only_of_the_end(self, rig: Rig) -> None:
        """Only final records are received, and they can be read by then."""
        storage, saver = await rig.storage(), await rig.storage()
        inbox = await rig.inbox(storage)
        start = rig.record("new", reply_to=inbox.address)
        inbox.expect([start.uuid])
        await inbox.watch([start.uuid])
        for status in ("new", "process", "retry"):
            record = rig.record(status, uuid=start.uuid, reply_to=inbox.address)
            assert_done(await saver.save([record]))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):
                await inbox.receive()
        final = rig.record("success", uuid=start.uuid, reply_to=inbox.address, attempt=2)
        assert_done(await saver.save([final]))
        assert await hear(inbox, 1) == {final.uuid: final}
        assert await storage.get([final.uuid]) == [final]

    async def test_told_of_what_can_be_read(self, rig: Rig) -> None:
        """A final record is received only when every reader can read it."""
        reader, saver = await rig.storage(), await rig.elsewhere()
        inbox = await rig.inbox(await rig.storage())
        records = [rig.record("success", reply_to=inbox.address) for _ in range(20)]
        inbox.expect([record.uuid for record in records])
        saving = rig.background(save_each(saver, records))
        heard: dict[str, Task] = {}
        async with patient(SOON, "receiving records that are saved one by one"):
            while len(heard) < len(records):
                some = await inbox.receive()
                assert await reader.get([task.uuid for task in some]) == some, (
                    "an inbox received a record that `get` does not return yet"
                )
                heard |= {task.uuid: task for task in some}
        await saving

    async def test_told_only_in_its_namespace(self, rig: Rig) -> None:
        """An inbox of another app that watches the same uuid receives nothing."""
        storage = await rig.storage()
        other = await rig.storage(namespace="other" + rig.namespace)
        mine, theirs = await rig.inbox(storage), await rig.inbox(other)
        record = rig.record("success")
        for inbox in (mine, theirs):
            await inbox.watch([record.uuid])
        assert_done(await storage.save([record]))
        assert await hear(mine, 1) == {record.uuid: record}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):
                await theirs.receive()

    async def test_each_client_hears_its_own(self, rig: Rig) -> None:
        """A final record goes to the inbox with the address `reply_to`, and to all that watch."""
        clients = [await rig.storage() for _ in range(3)]
        inboxes = [await rig.inbox(storage) for storage in clients]
        assert len({inbox.address for inbox in inboxes}) == 3
        records = [rig.record("success", reply_to=inbox.address) for inbox in inboxes[:2]]
        for inbox, record in zip(inboxes, records, strict=False):
            inbox.expect([record.uuid])
        await inboxes[2].watch([record.uuid for record in records])
        assert_done(await (await rig.storage()).save(records))
        for inbox, record in zip(inboxes, records, strict=False):
            assert record.uuid in await hear(inbox, 1, {record.uuid})
        assert await hear(inboxes[2], 2) == {record.uuid: record for record in records}

    async def test_a_refused_final_is_not_told(self, rig: Rig) -> None:
        """An inbox receives the record that was accepted, never one that was refused."""
        saver = await rig.storage()
        inbox = await rig.inbox(await rig.storage())
        first = rig.record("success", execution="a", reply_to=inbox.address)
        second = rig.record("error", uuid=first.uuid, execution="b", reply_to=inbox.address)
        inbox.expect([first.uuid])
        outcomes = await saver.save([first, second])
        assert [outcome.status for outcome in outcomes] == ["done", "refused"]
        assert await hear(inbox, 1) == {first.uuid: first}
        try:
            async with asyncio.timeout(0.3):
                more = await inbox.receive()
        except TimeoutError:
            return
        assert {task.uuid: task for task in more} == {first.uuid: first}

    async def test_cancelled_receives_strand_nothing(self, rig: Rig) -> None:
        """No record is lost if calls of `receive` are cancelled at random times."""
        inbox = await rig.inbox(await rig.storage())
        saver = await rig.elsewhere()
        records = [
            rig.record("success", reply_to=inbox.address if at % 2 else None) for at in range(80)
        ]
        inbox.expect([record.uuid for record in records[1::2]])
        await inbox.watch([record.uuid for record in records[0::2]])

        saving = rig.background(save_each(saver, records))
        heard = await self._cancel_often(inbox)
        missing = {record.uuid for record in records} - heard.keys()
        heard |= await hear(inbox, len(missing), missing)
        await saving
        assert heard == {record.uuid: record for record in records}

    @staticmethod
    async def _cancel_often(inbox: Inbox) -> dict[str, Task]:
        instants = Random()
        heard: dict[str, Task] = {}
        for _ in range(100):
            receiving = asyncio.create_task(inbox.receive())
            await asyncio.wait({receiving}, timeout=instants.uniform(0.0, 0.005))
            receiving.cancel()
            await asyncio.wait({receiving})
            if not receiving.cancelled():
                heard |= {task.uuid: task for task in receiving.result()}
        return heard

    async def test_what_is_forgotten_is_waited_for_no_more(self, rig: Rig) -> None:
        """`forget` stops waiting for some tasks, not for the others. Unknown uuids are ignored."""
        inbox = await rig.inbox(await rig.storage())
        forgotten, wanted = rig.record("success"), rig.record("success")
        await inbox.watch([forgotten.uuid, wanted.uuid])
        inbox.forget([forgotten.uuid, "unknown"])
        assert_done(await (await rig.storage()).save([forgotten, wanted]))
        assert wanted.uuid in await hear(inbox, 1, {wanted.uuid})

    @pytest.mark.parametrize("by", ["close", "stop"])
    async def test_closing_ends_a_waiting_receive(self, rig: Rig, by: str) -> None:
        """Closing the inbox or stopping the storage makes this and the next `receive` raise."""
        storage = await rig.storage()
        inbox = await rig.inbox(storage)
        receiving = rig.background(inbox.receive())
        await asyncio.sleep(0.1)
        await (inbox.close() if by == "close" else storage.stop())
        await asyncio.wait({receiving}, timeout=SOON)
        assert receiving.done(), "`receive` still waits; it must raise `Closed`"
        assert isinstance(receiving.exception(), Closed)
        with pytest.raises(Closed):
            async with asyncio.timeout(SOON):
                await inbox.receive()

    async def test_closing_twice_is_harmless(self, rig: Rig) -> None:
        """`close` may be called twice."""
        inbox = await rig.inbox(await rig.storage())
        await inbox.close()
        await inbox.close()

    @staticmethod
    def _record(rig: Rig, inbox: Inbox, how: str) -> Task:
        return rig.record("success", reply_to=inbox.address if how == "expect" else "another")

    @staticmethod
    async def _ask(inbox: Inbox, how: str, record: Task) -> None:
        if how == "expect":
            inbox.expect([record.uuid])
        else:
            await inbox.watch([record.uuid])


async def save_each(saver: Elsewhere, records: list[Task]) -> None:
    """Save records one by one."""
    for record in records:
        assert_done(await saver.save(record))


async def hear(inbox: Inbox, count: int, wanted: Set[str] | None = None) -> dict[str, Task]:
    """Receive `count` records, of those `wanted` or of any; fail if they do not come soon."""
    heard: dict[str, Task] = {}
    try:
        async with patient(SOON, f"receiving {count} final records"):
            while len(heard.keys() & wanted if wanted is not None else heard) < count:
                heard |= {task.uuid: task for task in await inbox.receive()}
    except TimeoutError:
        raise AssertionError(
            f"the inbox received only {len(heard)} of {count} final records within {SOON:g} s"
        ) from None
    return heard


async def hear_despite_outages(inbox: Inbox, wanted: Set[str]) -> dict[str, Task]:
    """Receive all `wanted` records, although connections break; fail if some do not come."""
    heard: dict[str, Task] = {}
    try:
        async with patient(2 * PATIENCE, f"receiving {len(wanted)} final records"):
            while not wanted <= heard.keys():
                heard |= {task.uuid: task for task in await retry_call_untimed(inbox.receive)}
    except TimeoutError:
        raise AssertionError(
            f"the inbox never received the final records of {wanted - heard.keys()}"
        ) from None
    return heard
