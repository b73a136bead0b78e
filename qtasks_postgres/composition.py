"""The joint composition: broker and storage are in one schema, and each step is one statement."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from qtasks_core import (
    DONE,
    Ack,
    Broker,
    Completion,
    Delivery,
    Outcome,
    Release,
    Retry,
    Settlement,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.receivers import SettleCall
from qtasks_core.records import record_of, taken, verdicts_of
from qtasks_core.separate import SeparateComposition
from qtasks_core.wire import encode_message, encode_task
from qtasks_postgres.batches import LARGEST, TOO_LARGE, batches, size_of
from qtasks_postgres.callers import callers_connection
from qtasks_postgres.connection import Database, storable
from qtasks_postgres.doorbell import RING
from qtasks_postgres.doorbell import columns_of as in_columns
from qtasks_postgres.rows import MESSAGE, columns_of, publishing
from qtasks_postgres.storage import SAVED, PostgresStorage, saving
from qtasks_postgres.subscription import (
    Fence,
    PostgresSubscription,
    fences_of,
    retrying,
    settling,
)

T = TypeVar("T")


def submitting(which: str) -> str:
    """Return the statement that publishes messages, and saves their first records if they may."""
    return f"""
        WITH {saving(3 + len(MESSAGE), final=False)}, published AS ({publishing(2, which)})
        SELECT array_agg(uuid) AS uuids FROM saved
    """


SUBMIT = submitting("")
# A message with a key is published only together with the record that takes the key.
SUBMIT_ONCE = submitting("WHERE key IS NULL OR key IN (SELECT uuid FROM saved)")

COMPLETE = f"""
    WITH {saving(4)}, {settling(2)} SELECT {SAVED}, (SELECT array_agg(id) FROM gone) AS ids
"""

# The record of a retry is saved only if the retry took effect.
COMPLETE_RETRIES = f"""
    WITH {retrying(2)}, {saving(6 + len(MESSAGE), settled=True)}
    SELECT {SAVED}, (SELECT array_agg(id) FROM gone) AS ids
"""


class PostgresComposition(SeparateComposition):
    """Does the same as the separate composition, but a crash leaves both halves or neither."""

    _storage: PostgresStorage

    def __init__(
        self,
        broker: Broker,
        storage: PostgresStorage,
        database: Database,
        ring: Callable[[Iterable[str]], None],
    ) -> None:
        super().__init__(broker, storage)
        self._database = database
        self._ring = ring
        """Wakes the receivers of queues."""

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is None:
            # If the caller is cancelled, the receivers must still be woken.
            return await self._database.calls.run(self._submit_all(messages, None))
        with self._database.translated():
            connection = await callers_connection(transaction)
        return await self._submit_all(messages, connection)

    async def _submit_all(
        self, messages: Sequence[TaskMessage], transaction: object | None
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for batch in batches(messages, encode_message):
            records = [(record, encode_task(record)) for record in map(record_of, _of(batch))]
            if max(len(data) for _, data in [*batch, *records]) <= LARGEST:
                outcomes += await self._submit_batch(batch, records, transaction)
            elif transaction is None:
                outcomes += await super().submit(_of(batch))
            else:
                outcomes += [Outcome("refused", TOO_LARGE)] * len(batch)
        return outcomes

    async def _submit_batch(
        self,
        batch: Sequence[tuple[TaskMessage, bytes]],
        records: Sequence[tuple[Task, bytes]],
        transaction: object | None,
    ) -> list[Outcome]:
        namespace = self._storage.started()
        # Of several messages with one uuid, the first has the record. It also has the key.
        first: dict[str, int] = {}
        for at, (message, _) in enumerate(batch):
            first.setdefault(message.uuid, at)
        keyed = {at: message.uuid for at, message in enumerate(_of(batch)) if message.submission}
        sent = [at for at in range(len(batch)) if at not in keyed or first[keyed[at]] == at]
        keys = [keyed.get(at) for at in sent]
        # All saves lock rows in the same order. Otherwise they could deadlock.
        kept = [records[first[uuid]] for uuid in sorted(first)]
        messages = [batch[at] for at in sent]
        (row,) = await self._database.fetch(
            SUBMIT_ONCE if keyed else SUBMIT, namespace, *columns_of(messages, keys),
            *self._storage.columns_of(kept), transaction=transaction,
            size=size_of(messages) + size_of(kept),
        )  # fmt: skip
        await self._wake({message.queue for message, _ in messages}, namespace, transaction)
        if not keyed:
            return [DONE] * len(batch)
        accepted = set(row["uuids"] or ())
        return await self._answers(batch, first, keyed, accepted, transaction)

    async def _wake(self, queues: set[str], namespace: str, transaction: object | None) -> None:
        if transaction is None:
            self._ring(queues)
            return
        channels = [(self._database.channel_of(namespace, queue), "") for queue in sorted(queues)]
        await self._database.fetch(RING, *in_columns(channels), transaction=transaction)

    async def _answers(
        self,
        batch: Sequence[tuple[TaskMessage, bytes]],
        first: Mapping[str, int],
        keyed: Mapping[int, str],
        accepted: set[str],
        transaction: object | None,
    ) -> list[Outcome]:
        """Return the outcomes of a batch with keys: `taken`, with the record that has the key."""
        outcomes = [DONE] * len(batch)
        lost = [
            at for at, uuid in keyed.items() if first[uuid] != at or storable(uuid) not in accepted
        ]
        there = await self._storage.get_in([keyed[at] for at in lost], transaction) if lost else ()
        for at, record in zip(lost, there, strict=True):
            if record is None:
                outcomes[at] = Outcome("unknown", "the record of its key was deleted meanwhile")
            elif record.submission != batch[at][0].submission:
                outcomes[at] = taken(record)
        return outcomes

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        """Read the records that are more than the first one, in one statement.

        The record of a message with a key may be the first one and still decide.
        """
        messages = [d.message for d in deliveries if isinstance(d.message, TaskMessage)]
        if any(message.submission for message in messages):
            return await super().admit(deliveries)
        begun = await self._storage.begun([message.uuid for message in messages])
        return verdicts_of(deliveries, {record.uuid: record for record in begun})

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        records = {at: encode_task(c.task) for at, c in enumerate(completions) if c.task}
        uuids = {c.task.uuid for c in completions if c.task}
        if (
            not isinstance(subscription, PostgresSubscription)  # a wrapper around it
            or len(uuids) < len(records)
            or max(map(len, records.values()), default=0) > LARGEST
        ):
            return await super().complete(subscription, completions)
        settlements = [c.settlement for c in completions if c.settlement is not None]
        complete = partial(self._complete, subscription, completions, records)
        return await subscription.settling(settlements, complete)

    async def _complete(
        self,
        subscription: PostgresSubscription,
        completions: Sequence[Completion],
        records: Mapping[int, bytes],
        call: SettleCall,
    ) -> list[Outcome]:
        flush = Flush(subscription, completions, records, call)
        for batch in batches(flush.ends, lambda at: records.get(at, b"")):
            await self._end(flush, _of(batch))
        for retries in batches(flush.left(Retry), flush.message):
            await self._retry(flush, retries)
        if releases := flush.left(Release):
            flush.note(releases, await subscription.release(flush.deliveries(releases)))
        outcomes = flush.outcomes()
        if unsaved := flush.unsaved(outcomes):
            tasks = [task for at in unsaved if (task := completions[at].task) is not None]
            for at, outcome in zip(unsaved, await self._storage.save(tasks), strict=True):
                outcomes[at] = outcome
        return outcomes

    async def _end(self, flush: Flush, batch: Sequence[int]) -> None:
        """Save records and acknowledge deliveries."""
        kept = flush.kept(batch)
        acks = flush.left(Ack, set(batch))
        (row,) = await self._database.fetch(
            COMPLETE, self._storage.started(), *fences_of(flush.deliveries(acks)),
            *self._storage.columns_of(kept), size=size_of(kept),
        )  # fmt: skip
        flush.saved.update(row["uuids"] or ())
        flush.note(acks, set(row["ids"] or ()))
        self._storage.push(kept, row)

    async def _retry(self, flush: Flush, batch: Sequence[tuple[int, bytes]]) -> None:
        """Replace deliveries, and save the records of those that were replaced."""
        places = _of(batch)
        messages = [(flush.retry(at), body) for at, body in batch]
        recorded = flush.recorded(places)
        kept = flush.kept(recorded)
        (row,) = await self._database.fetch(
            COMPLETE_RETRIES, self._storage.started(), *fences_of(flush.deliveries(places)),
            *columns_of(messages), [flush.fence(at).id for at in recorded],
            *self._storage.columns_of(kept), size=size_of(messages) + size_of(kept),
        )  # fmt: skip
        flush.saved.update(row["uuids"] or ())
        flush.note(places, set(row["ids"] or ()))
        self._ring({message.queue for message, _ in messages})


class Flush:
    """The completions of one call by their places: what is to be sent, and what became of it."""

    def __init__(
        self,
        subscription: PostgresSubscription,
        completions: Sequence[Completion],
        records: Mapping[int, bytes],
        call: SettleCall,
    ) -> None:
        self._subscription = subscription
        self._completions = completions
        self._records = records
        self._call = call
        self._settled = [at for at, c in enumerate(completions) if c.settlement is not None]
        """The completion at each place of the settle call."""
        self._places = {self._settled[place]: place for place in call.first}
        """The places of the settlements that had no effect in an earlier call."""
        self.saved: set[str] = set()
        """The uuids of the records that were accepted."""

    @property
    def ends(self) -> list[int]:
        """The completions with a record that does not depend on a retry, or to be acknowledged."""
        return [
            at
            for at, c in enumerate(self._completions)
            if (c.task is not None and not isinstance(c.settlement, Retry))
            or (isinstance(c.settlement, Ack) and at in self._places)
        ]

    def left(self, kind: type[Settlement], among: Container[int] | None = None) -> list[int]:
        """Return the deliveries that are still to be settled in this way, by ascending ids."""
        fences = [
            (settlement.delivery.fence, at)
            for at in self._places
            if isinstance(settlement := self._completions[at].settlement, kind)
            and (among is None or at in among)
        ]
        return [at for _, at in sorted(fences)]

    def fence(self, at: int) -> Fence:
        """Return the fence of a delivery."""
        fence: Fence = self._settlement(at).delivery.fence
        return fence

    def deliveries(self, places: Iterable[int]) -> list[Delivery]:
        """Return the deliveries of these completions."""
        return [self._settlement(at).delivery for at in places]

    def retry(self, at: int) -> TaskMessage:
        """Return the message that replaces a delivery."""
        settlement = self._settlement(at)
        assert isinstance(settlement, Retry)
        return settlement.message

    def message(self, at: int) -> bytes:
        """Return the same, encoded."""
        return encode_message(self.retry(at))

    def _settlement(self, at: int) -> Settlement:
        settlement = self._completions[at].settlement
        assert settlement is not None
        return settlement

    def recorded(self, places: Iterable[int]) -> list[int]:
        """Return those of these completions that have a record.

        All saves lock rows in the order of uuids. Otherwise they could deadlock.
        """
        found = [
            (task.uuid, at) for at in places if (task := self._completions[at].task) is not None
        ]
        return [at for _, at in sorted(found)]

    def kept(self, places: Iterable[int]) -> list[tuple[Task, bytes]]:
        """Return the records of these completions, in that order."""
        return [
            (task, self._records[at])
            for at in self.recorded(places)
            if (task := self._completions[at].task) is not None
        ]

    def note(self, places: Sequence[int], ids: set[int]) -> None:
        """Note which of these deliveries were settled, by the ids of their messages."""
        self._subscription.settled(self._call, [self._places[at] for at in places], ids)

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes of all settlements, and `done` for records apart from those.

        If a completion has both, the outcome is that of the record, but a retry that had no effect
        is not recorded.
        """
        outcomes = [DONE] * len(self._completions)
        for at, outcome in zip(self._settled, self._call.outcomes(), strict=True):
            completion = self._completions[at]
            if completion.task is None or isinstance(completion.settlement, Retry):
                outcomes[at] = outcome
        return outcomes

    def unsaved(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Return the completions whose records were not accepted: there is the same or a newer one.

        The record of a retry that had no effect is not one of them.
        """
        return [
            at
            for at, completion in enumerate(self._completions)
            if completion.task is not None
            and storable(completion.task.uuid) not in self.saved
            and outcomes[at].status == "done"
        ]


def _of(batch: Iterable[tuple[T, bytes]]) -> list[T]:
    """Return the items of a batch without their encodings."""
    return [item for item, _ in batch]
