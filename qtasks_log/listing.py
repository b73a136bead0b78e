"""What is there of a record, and which records have to be deleted."""

from __future__ import annotations

import time
from collections.abc import Iterable

from qtasks_core import Task
from qtasks_log.entries import Claiming, Deletion, Setting
from qtasks_log.store import Records
from qtasks_log.view import Proposal, View


def record_of(proposal: Proposal[Task | Deletion] | None) -> Task | None:
    """Return the record, unless it is deleted or its retention has passed."""
    if proposal is None or not isinstance(proposal.content, Task):
        return None
    return None if is_over(proposal) else proposal.content


def is_over(proposal: Proposal[Task | Deletion]) -> bool:
    """Say whether the retention of a record has passed."""
    return proposal.over_at is not None and proposal.over_at <= time.time()


def exists(proposal: Proposal[Task | Deletion] | None) -> bool:
    """Say whether there is a record, even one whose retention has passed."""
    return proposal is not None and isinstance(proposal.content, Task)


def deletions(records: Records, uuids: Iterable[str], retention: float) -> dict[str, Deletion]:
    """Return by uuid what to propose for expired records, and for old streams without a record.

    It names what it deletes, so that it cannot delete a newer record.
    """
    found: dict[str, Deletion] = {}
    for uuid in uuids:
        current = records.get(uuid)
        if current is not None and isinstance(current.content, Task):
            if is_over(current):
                found[uuid] = Deletion(current.key)
        elif (stream := records.stream(uuid)) and stream[-1].appended_at < time.time() - retention:
            found[uuid] = Deletion("")
    return found


def deleted(records: Records, uuids: Iterable[str]) -> list[str]:
    """Return the uuids whose deletion is still in the log."""
    return [
        uuid
        for uuid in uuids
        if (current := records.get(uuid)) is not None and isinstance(current.content, Deletion)
    ]


def spent(
    view: View[Setting] | View[Claiming], subjects: Iterable[str], before: float
) -> dict[str, list[str]]:
    """Return by subject the keys to discard if the current one was over before this time."""
    found: dict[str, list[str]] = {}
    for subject in subjects:
        current = view.get(subject)
        if current is not None and current.over_at is not None and current.over_at < before:
            found[subject] = view.all_keys(subject)
    return found
