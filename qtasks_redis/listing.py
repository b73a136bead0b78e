"""Listing and deleting records in short scripts, so that many records block nobody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

from msgspec.structs import replace

from qtasks_core import Task, TaskQuery
from qtasks_core.errors import WireError
from qtasks_core.queries import Place, fits
from qtasks_core.records import RANK, RANKS
from qtasks_core.wire import decode_task
from qtasks_redis.connection import Connection
from qtasks_redis.keys import PAIRS, RECORD, STREAM, STREAMS, Keys, group_key
from qtasks_redis.record_scripts import DELETE, EXPIRE, LIST, TIDY
from qtasks_redis.records import CLASSES, class_in, class_of, decode, in_pair, parts_of

_LISTED: Final = 500
"""Rows that one script returns."""
_MERGED: Final = 25
"""Pairs whose sorted sets one script merges."""
_DELETED: Final = 500
"""Records that one script deletes."""
_MOST_READ: Final = 500
"""Records that one command reads."""


class Group(NamedTuple):
    """The records of one queue, one name and one class: a status, or `dead` for dead letters."""

    queue: str
    task_name: str
    kind: str


class Row(NamedTuple):
    """A record's place in the list, and the group in which it was found."""

    created_at: float
    uuid: str
    group: Group


async def pairs_in(connection: Connection) -> list[str]:
    """Return the keys of all pairs that have records."""
    return sorted(
        key.decode() for key in await connection.call("SMEMBERS", connection.key(PAIRS, ""))
    )


async def groups_for(connection: Connection, query: TaskQuery) -> list[list[Group]]:
    """Return the groups whose records may match a query, a list for each pair."""
    kinds = [
        kind
        for kind in CLASSES
        if (query.status is None or ("error" if kind == "dead" else kind) in query.status)
        and query.dead in (None, kind == "dead")
    ]
    groups: list[list[Group]] = []
    for key in await pairs_in(connection):
        queue, task_name = in_pair(connection.name_in(key.encode()))
        if query.queue in (None, queue) and query.task_name in (None, task_name):
            groups.append([Group(queue, task_name, kind) for kind in kinds])
    return groups


async def look(
    connection: Connection, query: TaskQuery, last: Place | None, missing: int
) -> tuple[list[Task], Place | None, bool]:
    """Return the next matching records, where to continue, and whether there may be more.

    There may be fewer records than are missing even if there are more: some have changed meanwhile.
    """
    groups = await groups_for(connection, query)
    rows: list[Row] = []
    horizon: Place | None = None
    # All groups of one pair are in one script: a record that moves among them is not missed.
    for start in range(0, len(groups), _MERGED):
        part = list(chain.from_iterable(groups[start : start + _MERGED]))
        found, end, more = await _rows(connection, query, part, last, min(missing, _LISTED))
        rows += found
        if more and end is not None and (horizon is None or end > horizon):
            horizon = end
    if horizon is not None:
        rows = [row for row in rows if (row.created_at, row.uuid) >= horizon]
    rows.sort(reverse=True)
    return await _tasks(connection, query, rows), horizon, horizon is not None


async def _rows(
    connection: Connection,
    query: TaskQuery,
    groups: Sequence[Group],
    last: Place | None,
    most: int,
) -> tuple[list[Row], Place | None, bool]:
    keys = [group_key(connection, *group) for group in groups]
    args = [connection.key(RECORD, ""), str(most)]
    args += ["" if t is None else repr(t) for t in (query.created_before, query.created_after)]
    args += ("", "") if last is None else (repr(last[0]), last[1])
    args += (str(_rank(group)) for group in groups)
    more, score, uuid, *flat = await connection.run(LIST, keys, args)
    rows = [
        Row(float(flat[at + 1]), flat[at + 2].decode(), groups[flat[at]])
        for at in range(0, len(flat), 3)
    ]
    return rows, (float(score), uuid.decode()) if score else None, bool(more)


async def _tasks(connection: Connection, query: TaskQuery, rows: Sequence[Row]) -> list[Task]:
    """Read the records of these rows. A record that has moved to another group is left out."""
    tasks: list[Task] = []
    for start in range(0, len(rows), _MOST_READ):
        part = rows[start : start + _MOST_READ]
        values = await connection.read([connection.key(RECORD, row.uuid) for row in part])
        for row, value in zip(part, values, strict=True):
            task = None if value is None else _task_of(row, value)
            if task is not None and fits(task, query):
                tasks.append(task)
    return tasks


def _task_of(row: Row, value: bytes) -> Task | None:
    """Return a listed record, or None if it is not in the row's group any more.

    If it cannot be decoded, build it from its row.
    """
    group = row.group
    head, data = parts_of(value)
    if int(head[:10]) % RANKS != _rank(group):
        return None
    try:
        task = decode_task(data)
    except WireError:
        return replace(
            decode(row.uuid, value),
            queue=group.queue, task_name=group.task_name, created_at=row.created_at,
            dead="the record cannot be read" if group.kind == "dead" else None,
        )  # fmt: skip
    return task if Group(task.queue, task.task_name, class_of(task)) == group else None


def _rank(group: Group) -> int:
    return RANK["error" if group.kind == "dead" else group.kind]  # type: ignore[index]


async def delete(connection: Connection, uuids: Sequence[str]) -> int:
    """Delete records and the items appended to them. Return how many records existed."""
    count = 0
    left = list(dict.fromkeys(uuids))
    while left:
        part, left = left[:_DELETED], left[_DELETED:]
        values = await connection.read([connection.key(RECORD, uuid) for uuid in part])
        keys = Keys(connection)
        keys.one(PAIRS)
        keys.one(STREAMS)
        for uuid in part:
            keys.one(RECORD, uuid)
            keys.one(STREAM, uuid)
        args: list[str | bytes | int] = [len(connection.key(RECORD, "")) + 1]
        for value in values:
            args += _seen(keys, value)
        answers = await connection.run(DELETE, keys.keys, args)
        count += answers.count(1)
        # These records were saved again in the meantime.
        left = [uuid for uuid, answer in zip(part, answers, strict=True) if answer == 2] + left
    return count


def _seen(keys: Keys, value: bytes | None) -> tuple[str | bytes | int, ...]:
    """Return the arguments of the script for a record with this value."""
    if value is None:
        return b"", "0", ""
    head, data = parts_of(value)
    try:
        task = decode_task(data)
    except WireError:
        return head, "0", class_in(head)
    return head, keys.group(task.queue, task.task_name, class_of(task)), class_of(task)


async def expire(connection: Connection) -> int:
    """Delete the expired records. Return their number."""
    record = connection.key(RECORD, "")
    starts = record, connection.key(STREAM, "")
    count = 0
    pairs = await pairs_in(connection)
    for start in range(0, len(pairs), _MERGED):
        part = pairs[start : start + _MERGED]
        keys = [connection.key(PAIRS, ""), connection.key(STREAMS, ""), *part]
        left = 0
        while not left:
            some, left = await connection.run(EXPIRE, keys, [*starts, str(_DELETED)])
            count += some
    return count


async def tidy(connection: Connection, retention: float) -> None:
    """Delete old items without a record."""
    args = [
        connection.key(RECORD, ""), connection.key(STREAM, ""),
        str(math.ceil(retention * 1000)), str(_DELETED),
    ]  # fmt: skip
    while await connection.run(TIDY, [connection.key(STREAMS, "")], args) == _DELETED:
        continue
