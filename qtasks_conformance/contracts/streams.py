"""Streams: the items that a task appends while it runs (progress, streamed results)."""

from __future__ import annotations

import asyncio

import pytest

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.rig import SCRIPTS, Rig, longest_ids, new_uuid


class StreamContract(Contract):
    """`append` and `read`, if the storage has them."""

    async def test_items_are_read_in_order(self, rig: Rig) -> None:
        """Items of any bytes are read in order, from any position, by any client.

        The positions rise, and start at 1 or more. The task need not have a record.
        """
        needs(rig.subject.storage, "append", "read")
        storage, other = await rig.storage(), await rig.storage()
        uuid = new_uuid()
        assert await other.read(uuid, 0) == []
        items = [bytes(range(256)), b"", *(b"item %d" % at for at in range(300)), b"x" * 5000]
        await storage.append(uuid, items[:1])
        await storage.append(uuid, [])
        await storage.append(uuid, items[1:])
        got = await other.read(uuid, 0)
        assert [item for _, item in got] == items
        positions = [position for position, _ in got]
        assert positions == sorted(set(positions))
        assert positions[0] >= 1
        for at in (0, 1, 150, len(items) - 1):
            assert await other.read(uuid, positions[at]) == got[at + 1 :]
        assert await other.read(new_uuid(), 0) == []

    @pytest.mark.parametrize("script", SCRIPTS)
    async def test_the_longest_uuids_have_streams(self, rig: Rig, script: str) -> None:
        """Uuids of 200 characters of any script work; each has its own stream."""
        needs(rig.subject.storage, "append", "read")
        storage, other = await rig.storage(), await rig.storage()
        for uuid in longest_ids(script):
            await storage.append(uuid, [uuid.encode()])
        for uuid in longest_ids(script):
            assert [item for _, item in await other.read(uuid, 0)] == [uuid.encode()]

    async def test_processes_append_together(self, rig: Rig) -> None:
        """Batches that two processes append at once are kept whole, in order, and without loss."""
        needs(rig.subject.storage, "append", "read")
        storage = await rig.storage()
        other, uuid = await rig.elsewhere(), new_uuid()
        batches = {
            who: [[b"%s %d %d" % (who, at, part) for part in range(3)] for at in range(20)]
            for who in (b"here", b"there")
        }

        async def append() -> None:
            for batch in batches[b"here"]:
                await storage.append(uuid, batch)

        await asyncio.gather(append(), other.append(uuid, batches[b"there"]))
        got = [item for _, item in await storage.read(uuid, 0)]
        whole = [got[at : at + 3] for at in range(0, len(got), 3)]
        for who, sent in batches.items():
            assert [batch for batch in whole if batch[0].startswith(who + b" ")] == sent

    async def test_items_outlive_their_process(self, rig: Rig) -> None:
        """Items stay after the process that appended them was killed."""
        needs(rig.subject.storage, "append", "read")
        storage = await rig.storage()
        other, uuid = await rig.elsewhere(), new_uuid()
        await other.append(uuid, [[b"1", b"2"]])
        await other.kill()
        assert [item for _, item in await storage.read(uuid, 0)] == [b"1", b"2"]

    async def test_streams_stay_in_their_namespace(self, rig: Rig) -> None:
        """The same uuid of another app has its own stream."""
        needs(rig.subject.storage, "append", "read")
        storage = await rig.storage()
        other, uuid = await rig.storage(namespace="other" + rig.namespace), new_uuid()
        await storage.append(uuid, [b"mine"])
        assert await other.read(uuid, 0) == []
        await other.append(uuid, [b"theirs"])
        assert [item for _, item in await storage.read(uuid, 0)] == [b"mine"]
