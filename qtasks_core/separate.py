"""The default composition: any broker with any storage, on two servers without a transaction."""

from __future__ import annotations

import time
from asyncio import gather
from collections.abc import Hashable, Sequence

from msgspec.structs import replace

from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.composition import Composition
from qtasks_core.contracts.storage import Storage
from qtasks_core.contracts.subscription import Subscription
from qtasks_core.receivers import Recent
from qtasks_core.records import (
    instead,
    record_of,
    say_not_taken,
    smaller_of,
    taken,
    verdicts_of,
)
from qtasks_core.schemas import (
    DONE,
    Completion,
    Delivery,
    Outcome,
    Retry,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.transactions import refuse_pair


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
        return verdicts_of(deliveries, await self._records(messages) if messages else {})

    async def _records(self, messages: Sequence[TaskMessage]) -> dict[str, Task]:
        """Return the records of messages. First save the missing records of messages with a key.

        Their publisher has not saved them yet, or never will. The first to save gets the key.
        """
        records = await self._storage.get([message.uuid for message in messages])
        found = {record.uuid: record for record in records if record is not None}
        first = [record_of(m) for m in messages if m.submission and m.uuid not in found]
        if first:
            for record, outcome in zip(first, await self._save_within(first), strict=True):
                current = outcome.current if outcome.status == "refused" else record
                if current is not None:
                    found[record.uuid] = current
        return found

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
