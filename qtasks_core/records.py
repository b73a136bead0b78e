"""Records: their order, and what they say about a message.

The order decides which saves a storage accepts and which it refuses.

A storage that compares integers stores `order_of(task)`, `task.execution` and the record itself:

    repeat  = stored.execution = new.execution and stored.order = new.order     -> done
    refused = not may_replace(new.order, stored.order)                          -> refused
    else the new record replaces the stored one                                 -> done

A storage that compares them on its server (SQL, Lua) implements `may_replace` in that language. It
uses the constants `RANKS`, `FIRST_BEGUN` and `FIRST_FINAL` of this module.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal

from msgspec.structs import replace

from qtasks_core.errors import WireError
from qtasks_core.schemas import (
    DONE,
    Delivery,
    Outcome,
    Raw,
    Status,
    Task,
    TaskMessage,
    Verdict,
)

logger = logging.getLogger("qtasks")

RANK: dict[Status, int] = {
    "new": 0,
    "scheduled": 1,
    "process": 2,
    "retry": 3,
    "success": 4,
    "error": 5,
    "cancel": 6,
}
_STATUS = {rank: status for status, rank in RANK.items()}
RANKS = 8
"""The number of ranks of one attempt. A power of 2, so `order & (RANKS - 1)` is `order % RANKS`."""
FIRST_BEGUN = 2
"""Lower ranks are those of first records, which never replace an existing record."""
FIRST_FINAL = 4
"""This rank and higher ones are those of final records, which nothing replaces."""
RETENTION = 7 * 86_400.0
"""Seconds that final records are kept by default, if neither they nor the storage say otherwise."""
_SAID = 2000
"""Characters of an error, or of all headers, that are kept if a record must be small."""
ENVELOPE = 1024
"""Bytes reserved for the rest of an encoded item, beside its arguments and result."""
FINAL: frozenset[Status] = frozenset({"success", "error", "cancel"})


def order_of(task: Task) -> int:
    """Return `(attempt, rank of status)` as one integer, `attempt * 8 + rank`."""
    return task.attempt * RANKS + RANK[task.status]


def may_replace(order: int, stored: int) -> bool:
    """Say whether a record of this order replaces one of the order `stored`, if it is no repeat."""
    return stored % RANKS < FIRST_FINAL and order >= stored and order % RANKS >= FIRST_BEGUN


def judge(new: Task, stored: Task | None) -> Literal["accept", "repeat", "refuse"]:
    """Say how a storage that holds `stored` treats a save of `new`.

    A final record refuses every other record, whatever its attempt. Among the others, the order
    must not go back. A first record (`new`, `scheduled`) never replaces another. So if several
    clients enqueue one uuid, only one of them gets it. A save of the existing order and execution
    is a repeat and counts as done.
    """
    if stored is None:
        return "accept"
    order, stored_order = order_of(new), order_of(stored)
    if order == stored_order and new.execution == stored.execution:
        return "repeat"
    return "accept" if may_replace(order, stored_order) else "refuse"


def refused_by(stored: Task | None) -> Outcome:
    """Return the outcome of a save that is refused because of the existing record."""
    return Outcome("refused", "a newer record is there", stored)


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


def verdicts_of(
    deliveries: Sequence[Delivery], found: Mapping[str, Task]
) -> list[tuple[Verdict, Task | None]]:
    """Say which deliveries still have to run. `found` are the existing records, by uuid."""
    verdicts: list[tuple[Verdict, Task | None]] = []
    for delivery in deliveries:
        if isinstance(delivery.message, Raw):
            verdicts.append(("dead", None))
        else:
            record = found.get(delivery.message.uuid)
            verdicts.append((verdict_of(delivery.message, record), record))
    return verdicts


def not_taken(outcome: Outcome) -> bool:
    """Whether a storage refused the record itself, not because of a newer record."""
    return outcome.status == "refused" and outcome.current is None


def within(task: Task, reason: str) -> Task:
    """Return the record to save if the storage refuses the original because of its size.

    It has neither arguments nor result. A `success` becomes an `error` that says why. Another
    status stays, and so does the text of its error.
    """
    said = f"the record of this task is too large to be stored: {reason}"
    if task.status == "success":
        task = replace(task, status="error", error=said, dead="unstorable result")
    else:
        task = replace(task, error=f"{task.error[:_SAID]} ({said})" if task.error else said)
    headers = task.headers if sum(map(len, task.headers.values())) < _SAID else {}
    return replace(task, args=b"", kwargs=b"", returning=None, traceback=None, headers=headers)


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


def unreadable(
    uuid: str,
    order: int,
    execution: str,
    error: WireError,
    *,
    task_name: str = "",
    queue: str = "",
    created_at: float = 0.0,
    dead: bool = False,
) -> Task:
    """Return the substitute for a record whose bytes cannot be read.

    It is made of the data that is stored beside the bytes. Its `error` says that the record cannot
    be read. A `success` becomes an `error`, because its result is lost. A rank that this release
    does not know counts as final, because all high ranks are final.
    """
    status = _STATUS.get(order % RANKS, "error")
    why = f"the record cannot be read: {error}"
    return Task(
        uuid=uuid,
        task_name=task_name,
        status="error" if status == "success" else status,
        queue=queue,
        attempt=order // RANKS,
        execution=execution,
        error=why,
        dead=why if dead else None,
        created_at=created_at,
    )


def retention_note(retention: float) -> str:
    """Return the note on this retention for the guarantees of a storage."""
    if retention == inf:
        return "final records are kept for ever unless they say otherwise"
    return f"final records are kept for {retention / 86_400:g} days unless they say otherwise"


def expiry_of(task: Task, retention: float) -> float | None:
    """Return the Unix time from which a record that is saved now counts as deleted. None: never.

    `retention` is that of the storage, for records without their own; infinity means for ever. It
    counts from `finished_at`. A record without that time counts as finished now.
    """
    if task.status not in FINAL:
        return None
    keep = retention if task.retention is None else task.retention
    finished = time.time() if task.finished_at is None else task.finished_at
    return None if keep == inf else finished + keep
