"""The joint composition: broker and storage are in one file, and each step is one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qtasks_core import (
    DONE,
    Broker,
    Completion,
    Delivery,
    Outcome,
    Retry,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.records import (
    instead,
    record_of,
    say_not_taken,
    smaller_of,
    taken,
    verdicts_of,
)
from qtasks_core.separate import SeparateComposition
from qtasks_core.transactions import refuse_pair
from qtasks_sqlite.connection import Database, Transaction
from qtasks_sqlite.storage import SqliteStorage
from qtasks_sqlite.subscription import SqliteSubscription


class SqliteComposition(SeparateComposition):
    """Does the same as the separate composition, but a crash leaves both halves or neither."""

    _storage: SqliteStorage

    def __init__(
        self,
        broker: Broker,
        storage: SqliteStorage,
        publishing: Callable[[Sequence[TaskMessage]], Callable[[Transaction], None]],
        database: Callable[[], Database],
    ) -> None:
        super().__init__(broker, storage)
        self._publishing = publishing
        """Returns the work that inserts messages."""
        self._database = database
        """Returns the open database of both. Raises `Closed`."""

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_pair(self._broker, self._storage)
        if any(message.submission for message in messages):
            return await self._database().write(self._submitting_once(messages))
        publish = self._publishing(messages)
        save = self._storage.saving([record_of(message) for message in messages])

        def submit(turn: Transaction) -> None:
            publish(turn)
            save(turn)

        await self._database().write(submit)
        return [DONE] * len(messages)

    def _submitting_once(
        self, messages: Sequence[TaskMessage]
    ) -> Callable[[Transaction], list[Outcome]]:
        """Return the work that submits messages. A message with an existing record is skipped.

        This check is only for messages with a key.
        """
        look = self._storage.getting([message.uuid for message in messages if message.submission])

        def submit(turn: Transaction) -> list[Outcome]:
            there = look(turn)
            fresh: list[tuple[TaskMessage, Task]] = []
            outcomes: list[Outcome] = []
            for message in messages:
                if message.uuid in there:
                    outcomes.append(taken(there[message.uuid]))
                    continue
                outcomes.append(DONE)
                fresh.append((message, record_of(message)))
                if message.submission:
                    there[message.uuid] = fresh[-1][1]
            self._publishing([message for message, _ in fresh])(turn)
            self._saving([record for _, record in fresh])(turn)
            return outcomes

        return submit

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        messages = [d.message for d in deliveries if isinstance(d.message, TaskMessage)]
        keyed = [message.uuid for message in messages if message.submission]
        look = self._storage.getting([message.uuid for message in messages], "begun")
        if keyed:
            look = self._storage.getting([message.uuid for message in messages])
        found = await self._database().read(look)
        if any(uuid not in found for uuid in keyed):
            found = await self._database().write(self._adopting(messages))
        return verdicts_of(deliveries, found)

    def _adopting(
        self, messages: Sequence[TaskMessage]
    ) -> Callable[[Transaction], dict[str, Task]]:
        """Return the work that reads the records, and saves the missing ones of keyed messages.

        Their publisher is another composition and has not saved them yet, or never will.
        """
        look = self._storage.getting([message.uuid for message in messages])

        def adopt(turn: Transaction) -> dict[str, Task]:
            found = look(turn)
            first: dict[str, Task] = {}
            for message in messages:
                if message.submission and message.uuid not in found:
                    first.setdefault(message.uuid, record_of(message))
            self._saving(list(first.values()))(turn)
            return found | first

        return adopt

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        if not isinstance(subscription, SqliteSubscription):  # a wrapper around it
            return await super().complete(subscription, completions)
        ends = {
            at: completion.task
            for at, completion in enumerate(completions)
            if completion.task is not None and not isinstance(completion.settlement, Retry)
        }
        save = self._saving(list(ends.values()))
        settlements = {
            at: completion.settlement
            for at, completion in enumerate(completions)
            if completion.settlement is not None
        }

        def complete(turn: Transaction) -> list[Outcome]:
            saved = dict(zip(ends, save(turn), strict=True))
            # Without a recorded result it must not be acknowledged: it runs again.
            left = settlements
            if untaken := {at for at, outcome in saved.items() if outcome.status == "unknown"}:
                left = {at: s for at, s in settlements.items() if at not in untaken}
            settled = dict(zip(left, subscription.settling(list(left.values()))(turn), strict=True))
            retried: dict[int, Task] = {
                at: task
                for at, completion in enumerate(completions)
                if (task := completion.task) is not None
                and at not in ends
                and settled[at].status == "done"
            }
            saved |= zip(retried, self._saving(list(retried.values()))(turn), strict=True)
            # The outcome of a record stands for both. A refused retry has no record.
            return [saved.get(at) or settled.get(at, DONE) for at, _ in enumerate(completions)]

        return await self._database().write(complete)

    def _saving(self, tasks: Sequence[Task]) -> Callable[[Transaction], list[Outcome]]:
        """Return the work that saves records. If one is refused, save it without its payload."""
        save = self._storage.saving(tasks)

        def save_within(turn: Transaction) -> list[Outcome]:
            outcomes = save(turn)
            smaller = smaller_of(tasks, outcomes)
            if not smaller:
                return outcomes
            saved = self._storage.saving(list(smaller.values()))(turn)
            became = dict(zip(smaller, saved, strict=True))
            turn.after_commit(lambda: say_not_taken(tasks, outcomes, became))
            return [
                instead(became[at]) if at in became else outcome
                for at, outcome in enumerate(outcomes)
            ]

        return save_within
