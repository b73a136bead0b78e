"""Listing and deleting records in short transactions, so that many records block nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from qtasks_core import Task, TaskQuery
from qtasks_core.errors import WireError
from qtasks_core.queries import Place
from qtasks_core.records import RANK, RANKS, unreadable
from qtasks_core.wire import decode_task
from qtasks_sqlite.connection import Transaction, array
from qtasks_sqlite.schema import REMARKABLE

LOOKED_AT = 5000
"""Records that one transaction looks at if few of them match."""
DELETED = 2000
"""Records that one transaction deletes."""
_COLUMNS = "uuid, created_at, ord, execution, task_name, queue, dead, data"
_ORDER = "ORDER BY created_at DESC, uuid DESC"


Look = tuple[list[Task], Place | None, bool]
"""The matching records, where to continue, and whether there may be more."""


def looking(
    namespace: int, query: TaskQuery, last: Place | None, missing: int
) -> Callable[[Transaction], Look]:
    """Return the work that finds the next matching records after a place, at most `missing`."""
    records, values = _among(namespace, query)
    if last is not None:
        records += " AND (created_at, uuid) < (?, ?)"
        values += last
    fits, wanted = _filter(query)

    def look(turn: Transaction) -> Look:
        border = turn.execute(
            f"SELECT created_at, uuid {records} {_ORDER} LIMIT 1 OFFSET {LOOKED_AT - 1}", values
        ).fetchone()
        within = "" if border is None else " AND (created_at, uuid) >= (?, ?)"
        rows = turn.execute(
            f"SELECT {_COLUMNS} {records}{within}{fits} {_ORDER} LIMIT ?",
            [*values, *(border or ()), *wanted, missing + 1],
        ).fetchall()
        tasks = [_task_of(row) for row in rows[:missing]]
        if len(rows) > missing:
            uuid, created_at, *_ = rows[missing - 1]
            return tasks, (created_at, uuid), True
        return tasks, border, border is not None

    return look


def _among(namespace: int, query: TaskQuery) -> tuple[str, list[Any]]:
    """Return the records to look at, by the index that selects the fewest."""
    statuses = query.status or (("error",) if query.dead else ())
    remarkable = bool(statuses) and not {"new", "success"} & set(statuses)
    records = f"FROM qtasks_records INDEXED BY qtasks_{'remarkable' if remarkable else 'newest'}"
    records += " WHERE namespace = ?"
    values: list[Any] = [namespace]
    if remarkable:
        records += f" AND {REMARKABLE}"
    for limit, sign in ((query.created_after, ">="), (query.created_before, "<")):
        if limit is not None:
            records += f" AND created_at {sign} ?"
            values.append(limit)
    return records, values


def _filter(query: TaskQuery) -> tuple[str, list[Any]]:
    fits, values = "", []
    if query.status is not None:
        fits += f" AND ord % {RANKS} IN ({','.join(str(RANK[status]) for status in query.status)})"
    for column in ("task_name", "queue"):
        if (wanted := getattr(query, column)) is not None:
            fits += f" AND {column} = ?"
            values.append(wanted)
    if query.dead is not None:
        fits += f" AND dead = {int(query.dead)}"
    return fits, values


def readable(turn: Transaction, namespace: int, uuid: str) -> Task:
    """Return an existing record. If it cannot be decoded, build it from its columns."""
    row = turn.execute(
        f"SELECT {_COLUMNS} FROM qtasks_records WHERE namespace = ? AND uuid = ?", (namespace, uuid)
    ).fetchone()
    return _task_of(row)


def _task_of(row: tuple[Any, ...]) -> Task:
    uuid, created_at, order, execution, task_name, queue, dead, data = row
    try:
        return decode_task(data)
    except WireError as error:
        return unreadable(
            uuid, order, execution, error,
            task_name=task_name, queue=queue, created_at=created_at, dead=bool(dead),
        )  # fmt: skip


def deleting(namespace: int, uuids: Sequence[str]) -> Callable[[Transaction], int]:
    """Return the work that deletes records and the items appended to them."""
    these = "namespace = ? AND uuid IN (SELECT value FROM json_each(?))"

    def delete(turn: Transaction) -> int:
        which = namespace, array(uuids)
        turn.execute(f"DELETE FROM qtasks_streams WHERE {these}", which)
        return turn.execute(f"DELETE FROM qtasks_records WHERE {these}", which).rowcount

    return delete


def expiring(namespace: int) -> Callable[[Transaction], tuple[int, bool]]:
    """Return the work that deletes some expired records.

    The work returns their number, and whether none is left.
    """

    def expire(turn: Transaction) -> tuple[int, bool]:
        rows = turn.select(
            "uuid",
            "FROM (SELECT uuid FROM qtasks_records INDEXED BY qtasks_expiring "
            f"WHERE namespace = ? AND expires_at <= ? LIMIT {DELETED})",
            (namespace, time.time()),
        )
        deleting(namespace, [uuid for (uuid,) in rows])(turn)
        return len(rows), len(rows) < DELETED

    return expire
