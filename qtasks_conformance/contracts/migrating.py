"""`migrate` creates what the server must have. It can be repeated, and called concurrently."""

from __future__ import annotations

import asyncio

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.contracts.delivering import assert_done, uuids
from qtasks_conformance.rig import Rig
from qtasks_conformance.waiting import collect


class BrokerMigrationContract(Contract):
    """`migrate` of a broker, if it has it."""

    async def test_migrating_a_broker_changes_nothing_that_is_there(self, rig: Rig) -> None:
        """`migrate` works before and after `start`, again, and concurrently; it keeps all data.

        When there is nothing to change, it returns an empty list.
        """
        needs(rig.subject.broker, "migrate")
        unstarted = [rig.subject.broker.broker() for _ in range(3)]
        await asyncio.gather(*(part.migrate(rig.namespace) for part in unstarted))
        broker = await rig.broker()
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
        needs(rig.subject.storage, "migrate")
        unstarted = [rig.subject.storage.storage() for _ in range(3)]
        await asyncio.gather(*(part.migrate(rig.namespace) for part in unstarted))
        storage = await rig.storage()
        record = rig.record("success")
        assert_done(await storage.save([record]))
        parts = [storage, await rig.storage(), storage, rig.subject.storage.storage()]
        got = await asyncio.gather(*(part.migrate(rig.namespace) for part in parts))
        assert got == [[]] * 4, "a repeated `migrate` reports changes though nothing was to change"
        assert await storage.get([record.uuid]) == [record]
