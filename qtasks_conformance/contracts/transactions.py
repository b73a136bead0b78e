"""The caller's transaction: joined if `transactions` is declared, else refused, never ignored."""

from __future__ import annotations

from contextlib import suppress

import pytest

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.subject import Begin
from qtasks_conformance.waiting import assert_silent, collect
from qtasks_core import Ack, Guarantees
from qtasks_core.errors import NotSupported
from qtasks_core.records import record_of
from qtasks_core.separate import compose


class Undo(Exception):
    """Raised in the caller's transaction to roll it back."""


class BrokerTransactionContract(Contract):
    """`publish(messages, transaction)`."""

    async def test_a_transaction_is_joined_or_refused(self, rig: Rig) -> None:
        """Messages are published at the commit of the caller's transaction, or not at all.

        Without `transactions`, `publish` raises `NotSupported` and publishes nothing.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        begin = begin_of(rig, broker.guarantees)
        subscription = await broker.subscribe({"q": 10})
        if begin is None:
            with pytest.raises(NotSupported):
                await broker.publish([rig.message()], object())
            await assert_silent(subscription, 0.3)
            return
        with suppress(Undo):
            async with begin() as transaction:
                assert_done(await broker.publish([rig.message()], transaction))
                raise Undo
        kept = rig.message()
        async with begin() as transaction:
            assert_done(await broker.publish([kept], transaction))
            await assert_silent(subscription, 0.3)
        (delivery,) = await collect(subscription, 1)
        assert delivery.message == kept
        assert_settled(await subscription.settle([Ack(delivery)]), broker.guarantees)
        await assert_silent(subscription, 0.3)


class StorageTransactionContract(Contract):
    """`save(tasks, transaction)`."""

    async def test_a_transaction_is_joined_or_refused(self, rig: Rig) -> None:
        """Records are saved at the commit of the caller's transaction, or not at all.

        Without `transactions`, `save` raises `NotSupported` and saves nothing.
        """
        storage = await rig.storage()
        begin = begin_of(rig, storage.guarantees)
        undone, kept = rig.record("new"), rig.record("new")
        if begin is None:
            with pytest.raises(NotSupported):
                await storage.save([undone], object())
            assert await storage.get([undone.uuid]) == [None]
            return
        with suppress(Undo):
            async with begin() as transaction:
                assert_done(await storage.save([undone], transaction))
                raise Undo
        async with begin() as transaction:
            assert_done(await storage.save([kept], transaction))
            assert await storage.get([kept.uuid]) == [None]
        assert await storage.get([undone.uuid, kept.uuid]) == [None, kept]


class CompositionTransactionContract(Contract):
    """`Composition.submit(messages, transaction)`."""

    async def test_a_transaction_is_joined_or_refused(self, rig: Rig) -> None:
        """Messages and records exist from the caller's commit on, or not at all.

        Only a joint composition of a broker and a storage with `transactions` joins a transaction.
        Any other raises `NotSupported`, and writes neither messages nor records.
        """
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        joins = broker.guarantees.transactions and storage.guarantees.transactions
        begin = begin_of(rig, broker.guarantees) if joins and broker.join(storage) else None
        subscription = await broker.subscribe({"q": 10})
        undone, kept = rig.message(), rig.message(submission="one")
        if begin is None:
            with pytest.raises(NotSupported):
                await composition.submit([undone, kept], object())
            await assert_silent(subscription, 0.3)
            assert await storage.get([undone.uuid, kept.uuid]) == [None, None]
            return
        with suppress(Undo):
            async with begin() as transaction:
                assert_done(await composition.submit([undone], transaction))
                raise Undo
        async with begin() as transaction:
            assert_done(await composition.submit([kept], transaction))
            await assert_silent(subscription, 0.3)
            assert await storage.get([kept.uuid]) == [None]
        assert await storage.get([undone.uuid, kept.uuid]) == [None, record_of(kept)]
        (delivery,) = await collect(subscription, 1)
        assert delivery.message == kept
        await assert_silent(subscription, 0.3)


def begin_of(rig: Rig, guarantees: Guarantees) -> Begin | None:
    """Return how a caller begins a transaction; None if `transactions` is not declared."""
    if not guarantees.transactions:
        return None
    assert rig.subject.begin is not None, (
        "the guarantees declare `transactions`: give the subject `begin=`, which opens one"
    )
    return rig.subject.begin
