"""Lists of the records of several storages, as one list."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from msgspec.structs import replace

from qtasks_core import Storage, Task, TaskPage, TaskQuery
from qtasks_core.queries import Place, cursor_at, fits, place_of
from qtasks_core.together import together


async def merged_page(
    storages: Sequence[Storage],
    query: TaskQuery,
    get: Callable[[Sequence[str]], Awaitable[list[Task | None]]],
) -> TaskPage:
    """List what `get` returns for the records of all storages, each uuid once, newest first.

    The cursors are those of `qtasks_core.queries`.
    """
    found: dict[str, Task] = {}
    cursor = query.cursor
    while True:
        part = replace(query, cursor=cursor, limit=query.limit + 1)
        pages = await together([storage.query(part) for storage in storages])
        ends = [place_of(page.cursor) for page in pages if page.cursor is not None]
        end = max(ends, default=None)
        uuids = [task.uuid for page in pages for task in page.tasks if _reaches(task, end)]
        for task in await get(list(dict.fromkeys(uuids))):
            if task is not None and fits(task, query):
                found[task.uuid] = task
        if end is None or len(found) > query.limit:
            break
        cursor = cursor_at(end)
    records = sorted(found.values(), key=_place, reverse=True)
    shown = records[: query.limit]
    return TaskPage(shown, cursor_at(_place(shown[-1])) if len(records) > len(shown) else None)


def _place(task: Task) -> Place:
    return task.created_at, task.uuid


def _reaches(task: Task, end: Place | None) -> bool:
    """Say whether a record is in the part of the list that all pages cover."""
    return end is None or _place(task) >= end
