"""The joint composition: broker and storage are on one cluster, and each step is one transaction.

A save is a proposal: whether it counts is known when it is read back, and that is after the
transaction. A delivery may be acknowledged all the same. If its record is refused, that is because
a newer one is there, and the separate composition acknowledges it then too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from qtasks_core import (
    DONE,
    Broker,
    Completion,
    Outcome,
    Subscription,
    TaskMessage,
)
from qtasks_core.records import instead, record_of, say_not_taken, taken, within
from qtasks_core.separate import SeparateComposition
from qtasks_core.together import together
from qtasks_kafka.storage import KafkaStorage
from qtasks_log import Entry

if TYPE_CHECKING:
    from qtasks_core.errors import QTasksError
    from qtasks_kafka.transactional_subscription import Settled, TransactionalSubscription
    from qtasks_kafka.writer import Record


class JoiningBroker(Protocol):
    """The methods of the broker that a composition uses, besides those of every broker."""

    def record(self, message: TaskMessage) -> Record:
        """Return the record that carries a message to its queue, now or after its delay."""

    async def prepare(self, records: Sequence[Record]) -> None:
        """Make sure that the topics of messages exist."""

    async def prepare_log(self, topic: str) -> None:
        """Learn how large a record the topic of a log takes."""

    def refusal(self, record: Record) -> QTasksError | None:
        """Return why a record is larger than its topic takes, as far as that is known."""

    async def append_together(self, records: Sequence[Record]) -> None:
        """Append records in one transaction. Raises `Unavailable` and `RecordRefused`."""


class KafkaComposition(SeparateComposition):
    """Does the same as the separate composition, but a crash leaves both halves or neither."""

    _storage: KafkaStorage

    def __init__(self, broker: Broker, joining: JoiningBroker, storage: KafkaStorage) -> None:
        super().__init__(broker, storage)
        self._joining = joining

    async def _submit(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish and save in one transaction, unless a message or its record is too large."""
        from qtasks_kafka.transactions import RecordRefused

        sent = [self._joining.record(message) for message in messages]
        await self._joining.prepare(sent)

        async def append(entries: Sequence[Entry]) -> list[str | None]:
            records = [*sent, *await self._records_of(entries)]
            for record in records:
                if (refusal := self._joining.refusal(record)) is not None:
                    raise RecordRefused(record.topic, refusal)
            await self._joining.append_together(records)
            return [None] * len(entries)

        if not messages:
            return []
        try:
            saved = await self._storage.save_by([record_of(m) for m in messages], append)
        except RecordRefused:
            return await self._submit_apart(messages)
        return [
            taken(outcome.current) if message.submission and outcome.current else DONE
            for message, outcome in zip(messages, saved, strict=True)
        ]

    async def _submit_apart(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Submit each message in a transaction of its own; those that are refused, in two steps."""
        if len(messages) == 1:
            return await super()._submit(messages)
        return [outcome for message in messages for outcome in await self._submit([message])]

    async def _records_of(self, entries: Sequence[Entry]) -> list[Record]:
        """Return the records that append entries to the storage's log."""
        records = await self._storage.log.records(entries)
        if records:
            await self._joining.prepare_log(records[0].topic)
        return records

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        from qtasks_kafka.transactional_subscription import TransactionalSubscription

        if not isinstance(subscription, TransactionalSubscription) or not any(
            each.settlement is not None and each.task is not None for each in completions
        ):
            return await super().complete(subscription, completions)
        # Settlements without a record go along.
        joint = [at for at, each in enumerate(completions) if each.settlement is not None]
        alone = {
            at: each.task
            for at, each in enumerate(completions)
            if each.settlement is None and each.task is not None
        }
        calls = [self._complete(subscription, [completions[at] for at in joint])]
        if alone:
            calls.append(self._save_within(list(alone.values())))
        outcomes = [DONE] * len(completions)
        for places, answers in zip((joint, alone), await together(calls), strict=False):
            for at, outcome in zip(places, answers, strict=True):
                outcomes[at] = outcome
        return outcomes

    async def _complete(
        self, subscription: TransactionalSubscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        """Record and settle in one transaction. Each completion has a settlement."""
        from qtasks_kafka.transactional_subscription import Item

        recorded = [at for at, each in enumerate(completions) if each.task is not None]
        settled: list[Settled] = []

        async def append(entries: Sequence[Entry]) -> list[str | None]:
            records = dict(zip(recorded, await self._records_of(entries), strict=True))
            items = [
                Item(settlement, records.get(at))
                for at, each in enumerate(completions)
                if (settlement := each.settlement) is not None
            ]
            settled[:] = await subscription.transact(items)
            # An earlier call has settled these, and recorded them: this only looks what became
            # of the record.
            again = [
                entry
                for at, entry in zip(recorded, entries, strict=True)
                if settled[at].outcome == DONE and not settled[at].appended
            ]
            refused = iter(await self._storage.log.append(again) if again else ())
            return [
                None if settled[at].appended
                else next(refused) if settled[at].outcome == DONE
                else settled[at].outcome.reason
                for at in recorded
            ]  # fmt: skip

        tasks = [task for each in completions if (task := each.task) is not None]
        saved = await self._storage.save_by(tasks, append)
        outcomes = [each.outcome for each in settled]
        for at, outcome in zip(recorded, saved, strict=True):
            if settled[at].outcome == DONE:
                outcomes[at] = outcome
        if large := {at: each.too_large for at, each in enumerate(settled) if each.too_large}:
            small = await self._complete_small(subscription, completions, large)
            for at, outcome in small.items():
                outcomes[at] = outcome
        return outcomes

    async def _complete_small(
        self,
        subscription: TransactionalSubscription,
        completions: Sequence[Completion],
        large: dict[int, str],
    ) -> dict[int, Outcome]:
        """Record what is left of records that the log does not take, and settle with that.

        The outcome is `unknown` if even that is refused: its message is not acknowledged.
        """
        tasks = {at: task for at in large if (task := completions[at].task) is not None}
        small = {at: within(task, large[at]) for at, task in tasks.items()}
        if small == tasks:
            return {at: Outcome("unknown", reason) for at, reason in large.items()}
        smaller = [replace(completions[at], task=task) for at, task in small.items()]
        saved = await self._complete(subscription, smaller)
        say_not_taken(
            [tasks[at] for at in small],
            [Outcome("refused", large[at]) for at in small],
            dict(enumerate(saved)),
        )
        return {at: instead(outcome) for at, outcome in zip(small, saved, strict=True)}
