"""Listing and expiring records. The work is done in turns, so that many records block nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from heapq import heappush, heappushpop
from typing import TypeAlias

from qtasks_core import Task, TaskPage, TaskQuery
from qtasks_core.queries import cursor_at, fits, place_of
from qtasks_log.entries import Claiming, Deletion, Setting
from qtasks_log.view import Proposal, View

_LOOKED_AT = 5000
"""Subjects to look at in one turn of the loop."""

Records: TypeAlias = View[Task | Deletion]


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


async def _in_turns(subjects: list[str]) -> AsyncIterator[str]:
    for at, subject in enumerate(subjects, 1):
        yield subject
        if at % _LOOKED_AT == 0:
            await asyncio.sleep(0)


async def page_of(records: Records, query: TaskQuery) -> TaskPage:
    """Return a page, by one look at each record. Raises `Refused` if the cursor is invalid."""
    end = None if query.cursor is None else place_of(query.cursor)
    newest: list[tuple[float, str, Task]] = []
    """The last item is one more than the page has, and says that there is another page."""
    async for uuid in _in_turns(records.subjects()):
        task = record_of(records.get(uuid))
        if task is None or not fits(task, query):
            continue
        if end is not None and (task.created_at, uuid) >= end:
            continue
        if len(newest) <= query.limit:
            heappush(newest, (task.created_at, uuid, task))
        else:
            heappushpop(newest, (task.created_at, uuid, task))
    newest.sort(reverse=True)
    shown = newest[: query.limit]
    more = len(newest) > len(shown)
    return TaskPage([task for _, _, task in shown], cursor_at(shown[-1][:2]) if more else None)


async def deletions_of_expired(records: Records) -> dict[str, Deletion]:
    """Return by uuid what to propose, so that no newer record is deleted in its place."""
    found: dict[str, Deletion] = {}
    async for uuid in _in_turns(records.subjects()):
        current = records.get(uuid)
        if current is not None and is_over(current) and isinstance(current.content, Task):
            found[uuid] = Deletion(current.key)
    return found


async def deletions_of_orphans(records: Records, before: float) -> dict[str, Deletion]:
    """Return by uuid what to propose for streams without a record that are older than `before`."""
    found: dict[str, Deletion] = {}
    async for uuid in _in_turns(records.streams()):
        if exists(records.get(uuid)):
            continue
        stream = records.stream(uuid)
        if stream and stream[-1].appended_at < before:
            found[uuid] = Deletion("")
    return found


def spent(view: View[Setting] | View[Claiming], before: float) -> dict[str, list[str]]:
    """Return by subject the keys to discard if the current one was over before this time."""
    found: dict[str, list[str]] = {}
    for subject in view.subjects():
        current = view.get(subject)
        if current is not None and current.over_at is not None and current.over_at < before:
            found[subject] = view.all_keys(subject)
    return found
