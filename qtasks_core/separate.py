"""The default composition: any broker with any storage, on two servers without a transaction."""

from __future__ import annotations

import logging
import time
from asyncio import gather
from collections.abc import Hashable, Mapping, Sequence

from msgspec.structs import replace

from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.composition import Composition
from qtasks_core.contracts.storage import Storage
from qtasks_core.contracts.subscription import Subscription
from qtasks_core.records import FINAL, not_taken, within
from qtasks_core.schemas import (
    DONE,
    Completion,
    Delivery,
    Outcome,
    Raw,
    Retry,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.settling import Recent
from qtasks_core.transactions import refuse_pair

logger = logging.getLogger("qtasks")


def compose(broker: Broker, storage: Storage) -> Composition:
    """Return the best way to use this broker with this storage."""
    return broker.join(storage) or SeparateComposition(broker, storage)


class SeparateComposition(Composition):
    """Orders the two halves of each step so that a crash in between loses nothing."""

    def __init__(self, broker: Broker, storage: Storage) -> None:
        self._broker = broker
        self._storage = storage
        self._unsaved = Recent()
        """Messages that were published and could not be saved. If they are submitted again, they
        are only saved."""

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        """Publish and save at the same time. A `new` that comes late is refused, which is harmless.

        A message with a key is saved after it is published, because its record holds the key. A
        message that already has a record is not published again.

        Two servers have no common transaction, so the caller's is refused before anything is
        written.
        """
        if transaction is not None:
            refuse_pair(self._broker, self._storage)
        there = await self._there(messages)
        if not there:
            return await self._submit(messages)
        fresh = [message for message in messages if message.uuid not in there]
        outcomes = iter(await self._submit(fresh))
        return [taken(there[m.uuid]) if m.uuid in there else next(outcomes) for m in messages]

    async def _there(self, messages: Sequence[TaskMessage]) -> dict[str, Task]:
        """Return the existing records of messages with a key."""
        uuids = [message.uuid for message in messages if message.submission]
        found = await self._storage.get(uuids) if uuids else ()
        return {record.uuid: record for record in found if record is not None}

    async def _submit(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        plain = [record_of(message) for message in messages if not message.submission]
        # If one half fails, do not cancel the other: its effect would then be unknown.
        published, saved = await gather(
            self._publish(messages), self._storage.save(plain), return_exceptions=True
        )
        if isinstance(published, BaseException):
            raise published
        try:
            if isinstance(saved, BaseException):
                raise saved
            outcomes = published
            if len(plain) < len(messages) or published.count(DONE) < len(published):
                outcomes = await self._record(messages, published)
        except Exception:
            self._remember(messages, published)
            raise
        if self._unsaved:
            for message in messages:
                self._unsaved.discard(_sending(message))
        return outcomes

    async def _publish(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish all messages, except those that an earlier call published and could not save."""
        if not self._unsaved:
            return await self._broker.publish(messages)
        done = [_sending(message) in self._unsaved for message in messages]
        left = [message for message, was in zip(messages, done, strict=True) if not was]
        outcomes = iter(await self._broker.publish(left))
        return [DONE if was else next(outcomes) for was in done]

    def _remember(self, messages: Sequence[TaskMessage], published: Sequence[Outcome]) -> None:
        for message, outcome in zip(messages, published, strict=True):
            if outcome.status == "done":
                self._unsaved.add(_sending(message))

    async def _record(
        self, messages: Sequence[TaskMessage], published: Sequence[Outcome]
    ) -> list[Outcome]:
        """Save the records that depend on the result of publishing. Return the outcomes of both."""
        outcomes = list(published)
        dead: list[Task] = []
        keyed: list[int] = []
        for at, (message, outcome) in enumerate(zip(messages, published, strict=True)):
            if message.submission:
                # A refused message gets no record: the record would hold the key.
                keyed += [at] if outcome.status == "done" else []
            elif outcome.status == "refused":
                dead.append(_dead(message, outcome.reason))
        if dead:
            await self._save_within(dead)
        if keyed:
            records = [record_of(messages[at]) for at in keyed]
            saved = await self._save_within(records)
            for at, outcome in zip(keyed, saved, strict=True):
                outcomes[at] = taken(outcome.current) if outcome.current else outcome
        return outcomes

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        """Read the records of all deliveries at once, and compare."""
        messages = [d.message for d in deliveries if isinstance(d.message, TaskMessage)]
        found = iter(await self._records(messages) if messages else ())
        verdicts: list[tuple[Verdict, Task | None]] = []
        for delivery in deliveries:
            if isinstance(delivery.message, Raw):
                verdicts.append(("dead", None))
            else:
                record = next(found)
                verdicts.append((verdict_of(delivery.message, record), record))
        return verdicts

    async def _records(self, messages: Sequence[TaskMessage]) -> list[Task | None]:
        """Return the records of messages. First save the missing records of messages with a key.

        Their publisher has not saved them yet, or never will. The first to save gets the key.
        """
        records = await self._storage.get([message.uuid for message in messages])
        missing = [
            at
            for at, (message, record) in enumerate(zip(messages, records, strict=True))
            if record is None and message.submission
        ]
        if missing:
            first = [record_of(messages[at]) for at in missing]
            saved = await self._save_within(first)
            for at, record, outcome in zip(missing, first, saved, strict=True):
                records[at] = outcome.current if outcome.status == "refused" else record
        return records

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        """Save, then settle. A retry is settled first, and recorded only if it took effect.

        If a retry were recorded first, a crash in between would make the only message stale. A run
        is not settled if its record may be missing: it runs again. If the storage refuses a record,
        it is saved without arguments and result.
        """
        outcomes: list[Outcome] = [DONE] * len(completions)
        first: list[int] = []
        settling: list[int] = []
        later: list[int] = []
        for at, completion in enumerate(completions):
            if completion.settlement is not None:
                settling.append(at)
            if completion.task is not None:
                (later if isinstance(completion.settlement, Retry) else first).append(at)
        await self._save(completions, first, outcomes)
        settling = [at for at in settling if outcomes[at].status != "unknown"]
        if settling:
            settlements = [s for at in settling if (s := completions[at].settlement) is not None]
            retried = set(later)
            for at, outcome in zip(settling, await subscription.settle(settlements), strict=True):
                if completions[at].task is None or at in retried:
                    outcomes[at] = outcome
        obeyed = [at for at in later if outcomes[at].status != "refused"]
        await self._save(completions, obeyed, outcomes)
        return outcomes

    async def _save(
        self, completions: Sequence[Completion], which: list[int], outcomes: list[Outcome]
    ) -> None:
        if which:
            tasks = [task for at in which if (task := completions[at].task) is not None]
            for at, outcome in zip(which, await self._save_within(tasks), strict=True):
                outcomes[at] = outcome

    async def _save_within(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Save records. If the storage refuses one, save it without the payload.

        The outcome is `unknown` if even that is refused: its message must not be acknowledged.
        """
        outcomes = await self._storage.save(tasks)
        if smaller := smaller_of(tasks, outcomes):
            saved = await self._storage.save(list(smaller.values()))
            say_not_taken(tasks, outcomes, dict(zip(smaller, saved, strict=True)))
            for at, outcome in zip(smaller, saved, strict=True):
                outcomes[at] = instead(outcome)
        return outcomes


def smaller_of(tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> dict[int, Task]:
    """Return, by place, the records to save instead of those that the storage refuses."""
    if outcomes.count(DONE) == len(outcomes):
        return {}
    return {
        at: within(tasks[at], outcome.reason)
        for at, outcome in enumerate(outcomes)
        if not_taken(outcome)
    }


def instead(smaller: Outcome) -> Outcome:
    """Return the outcome of a record after its smaller version was saved or refused."""
    return Outcome("unknown", smaller.reason) if not_taken(smaller) else smaller


def say_not_taken(
    tasks: Sequence[Task], outcomes: Sequence[Outcome], smaller: Mapping[int, Outcome]
) -> None:
    """Log what happened to the records that the storage refused.

    `outcomes` are those of the first save, `smaller` those of the smaller records.
    """
    for at, outcome in smaller.items():
        name, uuid, reason = tasks[at].task_name, tasks[at].uuid, outcomes[at].reason
        if not_taken(outcome):
            logger.error("task %s %s: its record is not taken: %s", name, uuid, reason)
        else:
            logger.error(
                "task %s %s: its record is not taken (%s); it is kept without arguments and result",
                name, uuid, reason,
            )  # fmt: skip


def record_of(message: TaskMessage) -> Task:
    """Return the first record of a message: `new`, or `scheduled` if it has a delay.

    Its execution is the submission, so that the record of one submission is no repeat of another's.
    """
    record = Task(
        uuid=message.uuid,
        task_name=message.task_name,
        status="scheduled" if message.delay > 0 else "new",
        queue=message.queue,
        args=message.args,
        kwargs=message.kwargs,
        encoding=message.encoding,
        priority=message.priority,
        attempt=message.attempt,
        reply_to=message.reply_to,
        created_at=message.created_at,
        due_at=message.created_at + message.delay if message.delay > 0 else None,
        retention=message.retention,
        headers=message.headers,
    )
    if not message.submission:
        # Python builds a dict for calls with more than 15 keywords, which takes three times as
        # long.
        return record
    return replace(record, execution=message.submission, submission=message.submission)


def taken(record: Task) -> Outcome:
    """Return the outcome of a submission whose key this record already has."""
    return Outcome("taken", "a task with that key exists", record)


def _dead(message: TaskMessage, reason: str) -> Task:
    return replace(
        record_of(message),
        status="error",
        error=reason,
        dead="the broker refused it",
        finished_at=time.time(),
    )


def _sending(message: TaskMessage) -> Hashable:
    """Return what identifies a message among others with the same effect.

    `reply_to` belongs to it, because it says where the result goes.
    """
    return message.uuid, message.submission, message.reply_to


def verdict_of(message: TaskMessage, record: Task | None) -> Verdict:
    """Say whether a delivered message still has to run, given the existing record."""
    if record is None:
        return "run"
    if record.status == "cancel":
        return "cancelled"
    if record.status in FINAL:
        return "final"
    if message.submission and record.submission and message.submission != record.submission:
        return "stale"
    # A `retry` record says that this attempt is over and that the next message is on its way.
    ended = record.attempt if record.status == "retry" else record.attempt - 1
    return "stale" if message.attempt <= ended else "run"
