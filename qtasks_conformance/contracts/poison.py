"""Messages that kill their workers (poison), and messages of tasks that no worker knows."""

from __future__ import annotations

from msgspec.structs import replace

from qtasks.worker.job import counted, is_candidate, isolated_runs
from qtasks.worker.poison import poisoned
from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delays import assert_on_time, clock
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.contracts.pairs import completion
from qtasks_conformance.elsewhere import Elsewhere
from qtasks_conformance.patience import measure_lag
from qtasks_conformance.rig import LONG_LEASE, Rig, new_uuid
from qtasks_conformance.waiting import assert_silent, collect
from qtasks_core import Completion, Delivery, Retry, Storage
from qtasks_core.records import FINAL, record_of
from qtasks_core.separate import compose

LIVES = 10
"""How many workers one message may kill, including those that the broker does not count."""


class PoisonContract(Contract):
    """Invariants 6 (poison) and 7 (unknown tasks), as far as broker and storage matter.

    The engine decides which message is a poison candidate and which is poisoned. It needs the
    broker's count of deliveries, and it keeps a count of isolated runs in the record.
    """

    async def test_what_kills_each_time_is_dead_at_last(self, rig: Rig) -> None:
        """A message that kills every worker is dead after a bounded number of deliveries.

        Messages that were in flight at the same time succeed.
        """
        broker, storage = await rig.broker(), await rig.storage()
        messages = rig.messages(4)
        assert_done(await compose(broker, storage).submit(messages))
        culprit, *innocents = [message.uuid for message in messages]
        worker = await rig.elsewhere()
        await worker.receive(4)
        await worker.settle(*((place, "release") for place in range(4)))
        await worker.receive(4)
        await worker.kill()
        ended: set[str] = set()
        for _ in range(LIVES):
            worker = await rig.elsewhere()
            await self._work(worker, storage, culprit, ended)
            await worker.kill()
            if len(ended) == len(messages):
                break
        else:
            raise AssertionError(
                f"one message has killed {LIVES} workers and is not dead: count deliveries, "
                "and keep the headers of records"
            )
        there = await storage.get([culprit, *innocents])
        assert [record and record.status for record in there] == ["error", *["success"] * 3]
        await assert_silent(await broker.subscribe({"q": 10}), 0.5)

    async def _work(
        self, worker: Elsewhere, storage: Storage, culprit: str, ended: set[str]
    ) -> None:
        """Let a worker run its messages one by one, until all are finished or the poison runs."""
        while len(ended) < 4:
            held = await worker.receive(1)
            place, message = len(held) - 1, held[-1].message
            (record,) = await storage.get([message.uuid])
            assert record is not None
            if record.status in FINAL:
                await worker.settle((place, "ack"))
                continue
            if poisoned(record) is not None:
                assert message.uuid == culprit, "a message that killed no worker counts as poisoned"
                await worker.complete((place, "ack", "error"))
                ended.add(culprit)
                continue
            if is_candidate(Delivery(message, "q", None, held[-1].count), record):
                begun = replace(record_of(message), status="process", execution=new_uuid())
                assert_done(await worker.save(counted(begun, isolated_runs(record) + 1)))
            if message.uuid == culprit:
                return
            await worker.complete((place, "ack", "success"))
            ended.add(message.uuid)

    async def test_what_no_worker_knows_is_put_back(self, rig: Rig) -> None:
        """A message of an unknown task is put back with a delay, as the same attempt.

        It can be put back several times, and be recorded as dead at last.
        """
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        message = rig.message()
        assert_done(await composition.submit([message]))
        rig.background(measure_lag())
        subscription = await broker.subscribe({"q": 10})
        for tries in ("1", "2"):
            (delivery,) = await collect(subscription, 1)
            assert message_of(delivery) == message
            message = replace(message, headers={"tries": tries}, delay=0.4)
            before = clock()
            back = [Completion(Retry(delivery, message), None)]
            assert_settled(await composition.complete(subscription, back), broker.guarantees)
            after = clock()
        (delivery,) = await collect(subscription, 1)
        assert_on_time(0.4, before, after)
        assert message_of(delivery) == message
        assert [verdict for verdict, _ in await composition.admit([delivery])] == ["run"]
        dead = completion(delivery, "ack", "error")
        assert_settled(await composition.complete(subscription, [dead]), broker.guarantees)
        assert await storage.get([message.uuid]) == [dead.task]
        await assert_silent(subscription, 0.5)
