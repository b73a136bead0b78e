"""Deleting records: by hand with `delete`, or with `expire` after their retention."""

from __future__ import annotations

import asyncio
import time

import pytest
from msgspec.structs import replace

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.contracts.delivering import assert_done
from qtasks_conformance.rig import Rig, new_uuid
from qtasks_core import Status, Storage, Task, TaskQuery


class RetentionContract(Contract):
    """`delete` and `expire`, if the storage has them."""

    async def test_what_is_deleted_is_gone(self, rig: Rig) -> None:
        """A deleted record is gone for every client, whatever its status; its uuid is reusable."""
        needs(rig.subject.storage, "delete")
        storage, other = await rig.storage(), await rig.storage()
        one, two, kept = rig.record("success"), rig.record("process"), rig.record("success")
        assert_done(await storage.save([one, two, kept]))
        assert await other.delete([one.uuid, new_uuid(), two.uuid]) == 2
        assert await storage.get([one.uuid, two.uuid, kept.uuid]) == [None, None, kept]
        assert await storage.delete([one.uuid]) == 0
        assert await storage.delete([]) == 0
        again = replace(one, status="new")
        assert_done(await storage.save([again]))
        assert await other.get([one.uuid]) == [again]

    async def test_what_is_deleted_is_gone_from_lists_and_streams(self, rig: Rig) -> None:
        """`delete` also removes the record from lists, and its stream. Others are not touched."""
        needs(rig.subject.storage, "delete", "query", "append", "read")
        storage = await rig.storage()
        gone, kept = rig.record("error", created_at=1.0), rig.record("error", created_at=2.0)
        assert_done(await storage.save([gone, kept]))
        for record in (gone, kept):
            await storage.append(record.uuid, [b"item"])
        assert await storage.delete([gone.uuid]) == 1
        for query in (TaskQuery(), TaskQuery(status=("error",))):
            assert (await storage.query(query)).tasks == [kept]
        assert await storage.read(gone.uuid, 0) == []
        assert [item for _, item in await storage.read(kept.uuid, 0)] == [b"item"]

    async def test_what_has_had_its_time_expires(self, rig: Rig) -> None:
        """`expire` deletes final records whose retention has passed since they finished."""
        needs(rig.subject.storage, "expire")
        storage = await rig.storage()
        over = [
            finished_record(rig, status, 100.0, retention=50.0) for status in ("success", "error")
        ]
        over.append(finished_record(rig, "cancel", 0.0, retention=0.0))
        kept = [
            finished_record(rig, "success", 100.0, retention=5000.0),
            finished_record(rig, "success", 100.0, retention=float("inf")),
            finished_record(rig, "success", 100.0),
            *(rig.record(s, retention=1.0, created_at=1.0) for s in ("new", "process", "retry")),
        ]
        assert_done(await storage.save([*over, *kept]))
        assert await storage.expire() == len(over)
        assert await storage.get([r.uuid for r in over]) == [None] * len(over)
        assert await storage.get([r.uuid for r in kept]) == kept
        assert await storage.expire() == 0

    async def test_what_has_had_its_time_is_gone_by_itself(self, rig: Rig) -> None:
        """If a retention is declared, records expire by themselves, at most 10 s late.

        Then the uuid is free again for a first record.
        """
        storage, other = await rig.storage(), await rig.storage()
        if storage.guarantees.retention is None:
            pytest.skip("the guarantees declare no retention: records stay until they are deleted")
        kept = finished_record(rig, "success", 0.0, retention=3600.0)
        record = finished_record(rig, "success", 0.0, retention=1.0)
        assert_done(await storage.save([kept, record]))
        first = replace(rig.record("new"), execution="another publishing")
        (outcome,) = await other.save([replace(first, uuid=kept.uuid)])
        assert outcome.status == "refused"
        assert outcome.current == kept
        again = replace(first, uuid=record.uuid)
        await until_gone(other, record.uuid)
        assert_done(await other.save([again]))
        assert await storage.get([record.uuid]) == [again]

    async def test_what_expires_takes_its_stream_along(self, rig: Rig) -> None:
        """`expire` also deletes the stream of an expired task, and no other stream."""
        needs(rig.subject.storage, "expire", "append", "read")
        storage = await rig.storage()
        over, kept = (finished_record(rig, "success", 100.0, retention=r) for r in (50.0, 5000.0))
        assert_done(await storage.save([over, kept]))
        for record in (over, kept):
            await storage.append(record.uuid, [b"item"])
        assert await storage.expire() == 1
        assert await storage.read(over.uuid, 0) == []
        assert await storage.read(kept.uuid, 0) == [(1, b"item")]

    async def test_a_storage_has_a_retention_of_its_own(self, rig: Rig) -> None:
        """The storage's `retention` applies to records without a retention of their own."""
        needs(rig.subject.storage, "expire")
        storage = await rig.storage(retention=50.0)
        assert storage.guarantees.retention == 50.0
        over, kept = finished_record(rig, "success", 100.0), finished_record(rig, "success", 10.0)
        longer = finished_record(rig, "success", 100.0, retention=5000.0)
        assert_done(await storage.save([over, kept, longer]))
        assert await storage.expire() == 1
        assert await storage.get([over.uuid, kept.uuid, longer.uuid]) == [None, kept, longer]

    async def test_records_expire_in_their_namespace(self, rig: Rig) -> None:
        """`delete` and `expire` do not touch the records of another app."""
        needs(rig.subject.storage, "delete", "expire")
        storage = await rig.storage()
        other = await rig.storage(namespace="other" + rig.namespace)
        record = finished_record(rig, "success", 100.0, retention=1.0)
        assert_done(await other.save([record]))
        assert await storage.delete([record.uuid]) == 0
        assert await storage.expire() == 0
        assert await other.expire() == 1


async def until_gone(storage: Storage, uuid: str) -> None:
    """Wait until an expired record is gone; fail after 12 s (10 s are allowed, 2 s for slack)."""
    began = time.monotonic()
    while await storage.get([uuid]) != [None]:
        assert time.monotonic() - began < 12.0, (
            "a record can still be read 10 s after its retention has passed"
        )
        await asyncio.sleep(0.1)


def finished_record(rig: Rig, status: Status, ago: float, retention: float | None = None) -> Task:
    """Return a final record that finished `ago` seconds ago."""
    finished = time.time() - ago
    return rig.record(
        status, created_at=finished - 1000.0, finished_at=finished, retention=retention
    )
