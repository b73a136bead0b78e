"""Listing records: which records match a query, in which order, and where the next page begins.

The order is `(created_at, uuid)`, newest first. A cursor names the last record of a page. New
records come before it, so they do not shift the next page.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isnan

from qtasks_core.errors import Refused
from qtasks_core.schemas import Task, TaskPage, TaskQuery

Place = tuple[float, str]
"""The place of a record in the list: `(created_at, uuid)`."""


def cursor_at(place: Place) -> str:
    """Return the cursor of the page that follows this place."""
    created_at, uuid = place
    return f"{created_at!r} {uuid}"


def place_of(cursor: str) -> Place:
    """Return the place that a cursor names. Raises `Refused`."""
    created_at, space, uuid = cursor.partition(" ")
    try:
        if space and not isnan(place := float(created_at)):
            return place, uuid
    except ValueError:
        pass
    raise Refused(f"{cursor!r} is no cursor of a page of tasks")


def fits(task: Task, query: TaskQuery) -> bool:
    """Say whether a record matches a query, apart from the cursor and the limit."""
    return (
        (query.status is None or task.status in query.status)
        and (query.task_name is None or task.task_name == query.task_name)
        and (query.queue is None or task.queue == query.queue)
        and (query.created_after is None or task.created_at >= query.created_after)
        and (query.created_before is None or task.created_at < query.created_before)
        and (query.dead is None or (task.dead is not None) == query.dead)
    )


def page_of(tasks: Iterable[Task], query: TaskQuery) -> TaskPage:
    """Return a page, of records that are all in memory."""
    end = None if query.cursor is None else place_of(query.cursor)
    fitting = [
        task
        for task in tasks
        if (end is None or (task.created_at, task.uuid) < end) and fits(task, query)
    ]
    fitting.sort(key=lambda task: (task.created_at, task.uuid), reverse=True)
    shown = fitting[: query.limit]
    more = len(fitting) > len(shown)
    return TaskPage(shown, cursor_at((shown[-1].created_at, shown[-1].uuid)) if more else None)
