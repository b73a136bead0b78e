"""The order of records: which save a storage takes and which it refuses.

A storage that compares integers keeps `order_of(task)`, `task.execution` and the record itself:

    repeat  = stored.execution = new.execution and stored.order = new.order     -> done
    refused = not may_replace(new.order, stored.order)                          -> refused
    else the new record replaces the stored one                                 -> done

One that compares them on its server (SQL, Lua) repeats `may_replace` in that language, with the
constants `RANKS`, `FIRST_BEGUN` and `FIRST_FINAL` of this module.
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
"""Ranks that an attempt has room for. A power of 2, so `order & (RANKS - 1)` is `order % RANKS`."""
FIRST_BEGUN = 2
"""Ranks below it are those of first records, which never replace what is there."""
FIRST_FINAL = 4
"""Ranks from it on are those of final records, which nothing replaces."""
RETENTION = 7 * 86_400.0
"""Seconds that a storage keeps final records where neither they nor it say otherwise."""
_SAID = 2000
"""Characters of an error, or of all headers, that are kept where a record must be small."""
ENVELOPE = 1024
"""Bytes that are left for what surrounds arguments and results in an encoded item."""
FINAL: frozenset[Status] = frozenset({"success", "error", "cancel"})


def order_of(task: Task) -> int:
    """Return `(attempt, rank of status)` as one integer, `attempt * 8 + rank`."""
    return task.attempt * RANKS + RANK[task.status]


def may_replace(order: int, stored: int) -> bool:
    """Say whether a record of this order replaces one of the order `stored`, if it is no repeat."""
    return stored % RANKS < FIRST_FINAL and order >= stored and order % RANKS >= FIRST_BEGUN


def judge(new: Task, stored: Task | None) -> Literal["accept", "repeat", "refuse"]:
    """Say what a storage that holds `stored` does with a save of `new`.

    A final record refuses every other, whatever its attempt; among the rest the order must not
    go back. A first record (`new`, `scheduled`) replaces none, so that of several enqueuings under
    one uuid one has it. What is there already, from the same execution, is a repeat and counts as
    done.
    """
    if stored is None:
        return "accept"
    order, stored_order = order_of(new), order_of(stored)
    if order == stored_order and new.execution == stored.execution:
        return "repeat"
    return "accept" if may_replace(order, stored_order) else "refuse"


def refused_by(stored: Task | None) -> Outcome:
    """Return the outcome of a save that is refused because of the record that is there."""
    return Outcome("refused", "a newer record is there", stored)


def not_taken(outcome: Outcome) -> bool:
    """Whether a storage has refused a record for itself, not for a newer one."""
    return outcome.status == "refused" and outcome.current is None


def within(task: Task, reason: str) -> Task:
    """Return the record to save in place of one that the storage does not take for its size.

    It has neither arguments nor result. A `success` becomes an `error` that says why; another
    status stays, with what its error says.
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
    """Return what stands for a record whose bytes cannot be read, of what is known beside them.

    `error` says so. A `success` whose result is lost is an `error`; a rank that this release does
    not know is final, as all high ones are.
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
    """Return what the guarantees of a storage with this retention have to say of it."""
    if retention == inf:
        return "final records are kept for ever unless they say otherwise"
    return f"final records are kept for {retention / 86_400:g} days unless they say otherwise"


def expiry_of(task: Task, retention: float) -> float | None:
    """Return the Unix time from which a record that is saved now counts as gone; None: never.

    `retention` is the storage's own, for records that have none; infinity keeps for ever. It counts
    from `finished_at`; a record that does not say it has ended now.
    """
    if task.status not in FINAL:
        return None
    keep = retention if task.retention is None else task.retention
    finished = time.time() if task.finished_at is None else task.finished_at
    return None if keep == inf else finished + keep
