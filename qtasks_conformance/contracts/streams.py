"""What is appended to a task while it runs."""

from __future__ import annotations

import asyncio

import pytest

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.rig import SCRIPTS, Rig, longest_ids, new_uuid


class StreamContract(Contract):
    """`append` and `read`, where a storage has them."""

    async def test_items_are_read_in_order(self, rig: Rig) -> None:
        """From any position on, by any client, any bytes; there need be no record."""
        needs(rig.subject.storage, "append", "read")
        storage, other = await rig.storage(), await rig.storage()
        uuid = new_uuid()
        assert await other.read(uuid, 0) == []
        items = [bytes(range(256)), b"", *(b"item %d" % at for at in range(300)), b"x" * 5000]
        await storage.append(uuid, items[:1])
        await storage.append(uuid, [])
        await storage.append(uuid, items[1:])
        told = await other.read(uuid, 0)
        assert [item for _, item in told] == items
        positions = [position for position, _ in told]
        assert positions == sorted(set(positions))
        assert positions[0] >= 1
        for at in (0, 1, 150, len(items) - 1):
            assert await other.read(uuid, positions[at]) == told[at + 1 :]
        assert await other.read(new_uuid(), 0) == []

    @pytest.mark.parametrize("script", SCRIPTS)
    async def test_the_longest_uuids_have_streams(self, rig: Rig, script: str) -> None:
        """200 characters of any script; each has a stream of its own."""
        needs(rig.subject.storage, "append", "read")
        storage, other = await rig.storage(), await rig.storage()
        for uuid in longest_ids(script):
            await storage.append(uuid, [uuid.encode()])
        for uuid in longest_ids(script):
            assert [item for _, item in await other.read(uuid, 0)] == [uuid.encode()]

    async def test_processes_append_together(self, rig: Rig) -> None:
        """Batches of two processes follow each other, none is torn, lost or out of order."""
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
        told = [item for _, item in await storage.read(uuid, 0)]
        whole = [told[at : at + 3] for at in range(0, len(told), 3)]
        for who, sent in batches.items():
            assert [batch for batch in whole if batch[0].startswith(who + b" ")] == sent

    async def test_items_outlive_their_process(self, rig: Rig) -> None:
        """What was appended is there after the worker was killed."""
        needs(rig.subject.storage, "append", "read")
        storage = await rig.storage()
        other, uuid = await rig.elsewhere(), new_uuid()
        await other.append(uuid, [[b"1", b"2"]])
        await other.kill()
        assert [item for _, item in await storage.read(uuid, 0)] == [b"1", b"2"]

    async def test_streams_stay_in_their_namespace(self, rig: Rig) -> None:
        """The same uuid of another app is another stream."""
        needs(rig.subject.storage, "append", "read")
        storage = await rig.storage()
        other, uuid = await rig.storage(namespace="other" + rig.namespace), new_uuid()
        await storage.append(uuid, [b"mine"])
        assert await other.read(uuid, 0) == []
        await other.append(uuid, [b"theirs"])
        assert [item for _, item in await storage.read(uuid, 0)] == [b"mine"]
