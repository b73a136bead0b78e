"""`migrate` creates what the server must have. It can be repeated, and called concurrently."""

from __future__ import annotations

import asyncio

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.contracts.delivering import assert_done, uuids
from qtasks_conformance.rig import Rig
from qtasks_conformance.waiting import collect
from qtasks_core import Broker, Storage


class BrokerMigrationContract(Contract):
    """`migrate` of a broker, if it has it."""

    async def test_migrating_a_broker_changes_nothing_that_is_there(self, rig: Rig) -> None:
        """`migrate` works before and after `start`, again, and concurrently; it keeps all data.

        When there is nothing to change, it returns an empty list.
        """
        await asyncio.gather(
            *(first_migrate(rig.subject.broker.broker(), rig.namespace) for _ in range(3))
        )
        broker = await rig.broker()
        needs(broker, "migrate")
        message = rig.message()
        assert_done(await broker.publish([message]))
        parts = [broker, await rig.broker(), broker, rig.subject.broker.broker()]
        got = await asyncio.gather(*(part.migrate(rig.namespace) for part in parts))
        assert got == [[]] * 4, "a repeated `migrate` reports changes though nothing was to change"
        assert uuids(await collect(await broker.subscribe({"q": 1}), 1)) == [message.uuid]


class StorageMigrationContract(Contract):
    """`migrate` of a storage, if it has it."""

    async def test_migrating_a_storage_changes_nothing_that_is_there(self, rig: Rig) -> None:
        """`migrate` works before and after `start`, again, and concurrently; it keeps all data.

        When there is nothing to change, it returns an empty list.
        """
        await asyncio.gather(
            *(first_migrate(rig.subject.storage.storage(), rig.namespace) for _ in range(3))
        )
        storage = await rig.storage()
        needs(storage, "migrate")
        record = rig.record("success")
        assert_done(await storage.save([record]))
        parts = [storage, await rig.storage(), storage, rig.subject.storage.storage()]
        got = await asyncio.gather(*(part.migrate(rig.namespace) for part in parts))
        assert got == [[]] * 4, "a repeated `migrate` reports changes though nothing was to change"
        assert await storage.get([record.uuid]) == [record]


async def first_migrate(part: Broker | Storage, namespace: str) -> None:
    """Migrate with an instance that was never started, if it supports `migrate`."""
    if "migrate" not in part.guarantees.unsupported:
        await part.migrate(namespace)
