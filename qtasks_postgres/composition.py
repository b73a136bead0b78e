"""The joint composition: broker and storage are in one schema, and each step is one statement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
)
from qtasks_core.receivers import SettleCall
from qtasks_core.records import record_of, taken
from qtasks_core.separate import SeparateComposition
from qtasks_core.wire import encode_message, encode_task
from qtasks_postgres.batches import LARGEST, TOO_LARGE, batches, size_of
from qtasks_postgres.callers import callers_connection
from qtasks_postgres.connection import Database, storable
from qtasks_postgres.doorbell import RING
from qtasks_postgres.doorbell import columns_of as in_columns
from qtasks_postgres.rows import columns_of
from qtasks_postgres.storage import PostgresStorage, saving
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
        WITH {saving(7, final=False)}, published AS (
            INSERT INTO qtasks.messages (namespace, queue, priority, wake_at, body)
            SELECT $1, queue, priority,
                   CASE WHEN delay > 0 THEN clock_timestamp() + delay * interval '1 second' END,
                   body
            FROM unnest($2::text[], $3::smallint[], $4::float8[], $5::bytea[], $6::text[])
                 AS given (queue, priority, delay, body, key)
            {which}
        )
        SELECT uuid FROM saved
    """


SUBMIT = submitting("")
# A message with a key is published only together with the record that takes the key.
SUBMIT_ONCE = submitting("WHERE key IS NULL OR key IN (SELECT uuid FROM saved)")

COMPLETE = f"""
    WITH {saving(4)}, {settling(2)}
    SELECT NULL::bigint AS id, uuid, watchers FROM saved
    UNION ALL
    SELECT id, NULL, NULL FROM gone
"""

# The record of a retry is saved only if the retry took effect.
COMPLETE_RETRIES = f"""
    WITH {retrying(2)}, {saving(9, settled=True)}
    SELECT NULL::bigint AS id, uuid FROM saved
    UNION ALL
    SELECT id, NULL FROM gone
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
        keys = [storable(keyed[at]) if at in keyed else None for at in sent]
        # All saves lock rows in the same order. Otherwise they could deadlock.
        kept = [records[first[uuid]] for uuid in sorted(first)]
        messages = [batch[at] for at in sent]
        rows = await self._database.fetch(
            SUBMIT_ONCE if keyed else SUBMIT, namespace, *columns_of(messages), keys,
            *self._storage.columns_of(kept), transaction=transaction,
            size=size_of(messages) + size_of(kept),
        )  # fmt: skip
        await self._wake({message.queue for message, _ in messages}, namespace, transaction)
        if not keyed:
            return [DONE] * len(batch)
        accepted = {row["uuid"] for row in rows}
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
            outcomes |= zip(unsaved, await self._storage.save(tasks), strict=True)
        return [outcomes.get(at, DONE) for at in range(len(completions))]

    async def _end(self, flush: Flush, batch: Sequence[int]) -> None:
        """Save records and acknowledge deliveries."""
        kept = flush.kept(batch)
        acks = sorted(set(flush.left(Ack)) & set(batch), key=flush.fence)
        rows = await self._database.fetch(
            COMPLETE, self._storage.started(), *fences_of(flush.deliveries(acks)),
            *self._storage.columns_of(kept), size=size_of(kept),
        )  # fmt: skip
        flush.saved.update(row["uuid"] for row in rows if row["uuid"] is not None)
        flush.note(acks, {row["id"] for row in rows})
        self._storage.push(kept, [row for row in rows if row["uuid"] is not None])

    async def _retry(self, flush: Flush, batch: Sequence[tuple[int, bytes]]) -> None:
        """Replace deliveries, and save the records of those that were replaced."""
        places = sorted(_of(batch), key=flush.fence)
        bodies = dict(batch)
        messages = [(flush.retry(at), bodies[at]) for at in places]
        recorded = flush.recorded(places)
        kept = flush.kept(recorded)
        rows = await self._database.fetch(
            COMPLETE_RETRIES, self._storage.started(), *fences_of(flush.deliveries(places)),
            *columns_of(messages), [flush.fence(at).id for at in recorded],
            *self._storage.columns_of(kept), size=size_of(messages) + size_of(kept),
        )  # fmt: skip
        flush.saved.update(row["uuid"] for row in rows if row["uuid"] is not None)
        flush.note(places, {row["id"] for row in rows})
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
        settled = [at for at, c in enumerate(completions) if c.settlement is not None]
        self._places = {at: place for place, at in enumerate(settled)}
        """The places in the settle call."""
        self._left = {settled[place]: settlement for place, settlement in call.first.items()}
        """The settlements that had no effect in an earlier call."""
        self.saved: set[str] = set()
        """The uuids of the records that were accepted."""

    @property
    def ends(self) -> list[int]:
        """The completions with a record that does not depend on a retry, or to be acknowledged."""
        return [
            at
            for at, c in enumerate(self._completions)
            if isinstance(self._left.get(at), Ack)
            or (c.task is not None and not isinstance(c.settlement, Retry))
        ]

    def left(self, kind: type[Settlement]) -> list[int]:
        """Return the deliveries that are still to be settled in this way, by ascending ids."""
        return sorted((at for at, s in self._left.items() if isinstance(s, kind)), key=self.fence)

    def fence(self, at: int) -> Fence:
        """Return the fence of a delivery."""
        fence: Fence = self._left[at].delivery.fence
        return fence

    def deliveries(self, places: Iterable[int]) -> list[Delivery]:
        """Return the deliveries of these completions."""
        return [self._left[at].delivery for at in places]

    def retry(self, at: int) -> TaskMessage:
        """Return the message that replaces a delivery."""
        settlement = self._left[at]
        assert isinstance(settlement, Retry)
        return settlement.message

    def message(self, at: int) -> bytes:
        """Return the same, encoded."""
        return encode_message(self.retry(at))

    def recorded(self, places: Iterable[int]) -> list[int]:
        """Return those of these completions that have a record.

        All saves lock rows in the order of uuids. Otherwise they could deadlock.
        """
        return sorted(
            (at for at in places if at in self._records), key=lambda at: self._task(at).uuid
        )

    def kept(self, places: Iterable[int]) -> list[tuple[Task, bytes]]:
        """Return the records of these completions, in that order."""
        return [(self._task(at), self._records[at]) for at in self.recorded(places)]

    def _task(self, at: int) -> Task:
        task = self._completions[at].task
        assert task is not None
        return task

    def note(self, places: Sequence[int], ids: set[int]) -> None:
        """Note which of these deliveries were settled, by the ids of their messages."""
        self._subscription.settled(self._call, [self._places[at] for at in places], ids)

    def outcomes(self) -> dict[int, Outcome]:
        """Return the outcomes of all settlements, and `done` for records apart from those."""
        settled = self._call.outcomes()
        outcomes = {at: settled[place] for at, place in self._places.items()}
        outcomes |= {
            at: DONE
            for at in self._records
            if not isinstance(self._completions[at].settlement, Retry)
        }
        return outcomes

    def unsaved(self, outcomes: Mapping[int, Outcome]) -> list[int]:
        """Return the completions whose records were not accepted: there is the same or a newer one.

        The record of a retry that had no effect is not one of them.
        """
        return [
            at
            for at in self._records
            if outcomes[at].status == "done" and storable(self._task(at).uuid) not in self.saved
        ]


def _of(batch: Iterable[tuple[T, bytes]]) -> list[T]:
    """Return the items of a batch without their encodings."""
    return [item for item, _ in batch]
