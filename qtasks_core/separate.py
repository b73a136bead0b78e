"""The default composition: any broker with any storage, two servers without a transaction."""

from __future__ import annotations

import time
from asyncio import TaskGroup
from collections.abc import Sequence

from msgspec.structs import replace

from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.composition import Composition
from qtasks_core.contracts.storage import Storage
from qtasks_core.contracts.subscription import Subscription
from qtasks_core.records import FINAL
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


class SeparateComposition(Composition):
    """Orders the two halves of each step so that a crash in between loses nothing."""

    def __init__(self, broker: Broker, storage: Storage) -> None:
        self._broker = broker
        self._storage = storage

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        """Publish and save side by side: a `new` that comes late is refused, which is harmless."""
        records = [record_of(message) for message in messages]
        try:
            async with TaskGroup() as group:
                publishing = group.create_task(self._broker.publish(messages, transaction))
                group.create_task(self._storage.save(records))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        outcomes = publishing.result()
        refused = [
            replace(
                record,
                status="error",
                error=outcome.reason,
                dead="the broker refused it",
                finished_at=time.time(),
            )
            for record, outcome in zip(records, outcomes, strict=True)
            if outcome.status == "refused"
        ]
        if refused:
            await self._storage.save(refused)
        return outcomes

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        """Read the records of all deliveries at once and compare."""
        uuids = [d.message.uuid for d in deliveries if isinstance(d.message, TaskMessage)]
        found = iter(await self._storage.get(uuids) if uuids else ())
        verdicts: list[tuple[Verdict, Task | None]] = []
        for delivery in deliveries:
            if isinstance(delivery.message, Raw):
                verdicts.append(("dead", None))
            else:
                record = next(found)
                verdicts.append((verdict_of(delivery.message, record), record))
        return verdicts

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        """Save, then settle; a retry is settled first and recorded only if that was obeyed.

        Were a retry recorded first, a crash in between would make the only message stale. What
        may not have been recorded is not settled either: it runs again.
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
            for at, outcome in zip(which, await self._storage.save(tasks), strict=True):
                outcomes[at] = outcome


def record_of(message: TaskMessage) -> Task:
    """Return the first record of a message: `new`, or `scheduled` when it has a delay."""
    return Task(
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


def verdict_of(message: TaskMessage, record: Task | None) -> Verdict:
    """Say whether a delivered message still has to run, given the record that is there."""
    if record is None:
        return "run"
    if record.status == "cancel":
        return "cancelled"
    if record.status in FINAL:
        return "final"
    # A `retry` record says that this attempt is over and the next message is on its way.
    ended = record.attempt if record.status == "retry" else record.attempt - 1
    return "stale" if message.attempt <= ended else "run"
