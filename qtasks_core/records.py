"""The order of records: which saves a storage accepts and which it refuses.

A storage that compares integers stores `order_of(task)`, `task.execution` and the record itself:

    repeat  = stored.execution = new.execution and stored.order = new.order     -> done
    refused = not may_replace(new.order, stored.order)                          -> refused
    else the new record replaces the stored one                                 -> done

A storage that compares them on its server (SQL, Lua) implements `may_replace` in that language. It
uses the constants `RANKS`, `FIRST_BEGUN` and `FIRST_FINAL` of this module.
"""

from __future__ import annotations

import time
from math import inf
from typing import Literal

from msgspec.structs import replace

from qtasks_core.errors import WireError
from qtasks_core.schemas import Outcome, Status, Task

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
