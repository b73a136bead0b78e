"""Listing and deleting records in short statements, so that many records block nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qtasks_core import Task, TaskQuery
from qtasks_core.errors import WireError
from qtasks_core.queries import Place
from qtasks_core.records import FIRST_FINAL, RANKS, unreadable
from qtasks_core.schemas import Status
from qtasks_core.wire import decode_task
from qtasks_postgres.connection import storable

UNREMARKABLE: tuple[Status, ...] = ("new", "success")
"""The statuses of most records. The others have an index, see `schema`."""

LOOKED_AT = 2000
"""Records that one statement looks at if few of them match."""

NOW = "extract(epoch FROM statement_timestamp())"
KEPT = f"(expires_at IS NULL OR expires_at > {NOW})"
"""An expired record counts as deleted, even if `expire` has not deleted it yet."""

COLUMNS = 'uuid, progress AS "order", execution, task_name, queue, created_at, dead, record'
NEWEST = "ORDER BY created_at DESC, uuid DESC"

# Most lists merge the lanes of an index, which are the queues and task names of an app. Each step
# of the recursion jumps to the next lane, so all other entries are skipped.
LANES = """
    RECURSIVE lanes AS (
        (
            SELECT queue, task_name FROM qtasks.records
            WHERE namespace = $1 ORDER BY queue, task_name LIMIT 1
        )
        UNION ALL
        SELECT further.queue, further.task_name FROM lanes CROSS JOIN LATERAL (
            SELECT queue, task_name FROM qtasks.records
            WHERE namespace = $1 AND (queue, task_name) > (lanes.queue, lanes.task_name)
            ORDER BY queue, task_name LIMIT 1
        ) AS further
    )
"""
IN_LANE = "queue = lane.queue AND task_name = lane.task_name"

DELETE = f"""
    WITH removed AS (
        DELETE FROM qtasks.records
        WHERE namespace = $1 AND uuid = ANY($2::text[]) AND (
            progress & {RANKS - 1} >= {FIRST_FINAL} OR coalesce(cardinality(watchers), 0) = 0
        )
        RETURNING record IS NOT NULL AND {KEPT} AS counts
    ), emptied AS (
        UPDATE qtasks.records SET
            progress = 0, execution = NULL, status = NULL, task_name = NULL, queue = NULL,
            remarkable = NULL, record = NULL
        WHERE namespace = $1 AND uuid = ANY($2::text[])
            AND progress & {RANKS - 1} < {FIRST_FINAL} AND cardinality(watchers) > 0
            AND record IS NOT NULL
        RETURNING true AS counts
    ), streams AS (
        DELETE FROM qtasks.streams WHERE namespace = $1 AND uuid = ANY($2::text[])
    ), items AS (
        DELETE FROM qtasks.items WHERE namespace = $1 AND uuid = ANY($2::text[])
    )
    SELECT count(*) FILTER (WHERE counts) AS count
    FROM (SELECT counts FROM removed UNION ALL SELECT counts FROM emptied) AS gone
"""
"""A row that others watch stays, without its record, so that they get the next final one."""

DELETED = 2000
"""Records that one statement deletes, if one row of `expiries` has no more."""

OLDEST = f"""
    SELECT expires_at, id, uuids FROM qtasks.expiries
    WHERE namespace = $1 AND expires_at <= {NOW}
    ORDER BY namespace, expires_at, id
    LIMIT 500
"""
EXPIRE = f"""
    WITH due AS (
        DELETE FROM qtasks.expiries
        WHERE namespace = $1 AND expires_at = ANY($2::float8[]) AND id = ANY($3::bigint[])
    ), removed AS (
        DELETE FROM qtasks.records
        WHERE namespace = $1 AND uuid = ANY($4::text[]) AND expires_at <= {NOW}
        RETURNING uuid
    ), streams AS (
        DELETE FROM qtasks.streams
        WHERE namespace = $1 AND uuid = ANY(ARRAY(SELECT uuid FROM removed))
    ), items AS (
        DELETE FROM qtasks.items
        WHERE namespace = $1 AND uuid = ANY(ARRAY(SELECT uuid FROM removed))
    )
    SELECT count(*) FROM removed
"""

Look = tuple[list[Task], Place | None, bool]
"""The matching records, where to continue, and whether there may be more."""


class Values:
    """The values of a statement. Each gets the next number."""

    def __init__(self, *values: Any) -> None:
        self.all = list(values)

    def add(self, value: Any) -> str:
        """Return the text that stands for a value in the statement."""
        self.all.append(value)
        return f"${len(self.all)}"


def looking(
    namespace: str, query: TaskQuery, last: Place | None, missing: int
) -> tuple[str, list[Any]]:
    """Return the statement that finds the next matching records after a place, and its values.

    `found` makes of its rows what they mean.
    """
    values = Values(namespace)
    bounds = "namespace = $1"
    for limit, sign in ((query.created_after, ">="), (query.created_before, "<")):
        if limit is not None:
            bounds += f" AND created_at {sign} {values.add(limit)}::float8"
    if last is not None:
        created_at, uuid = last
        bounds += (
            f" AND (created_at, uuid) < ({values.add(created_at)}::float8, {values.add(uuid)})"
        )
    named = ""
    for column, wanted in (("task_name", query.task_name), ("queue", query.queue)):
        if wanted is not None:
            named += f" AND {column} = {values.add(storable(wanted))}"
    fits = ""
    if query.dead is not None:
        fits += f" AND dead IS {'NOT ' if query.dead else ''}NULL"
    statuses = query.status or (("error",) if query.dead else ())
    if statuses and not set(UNREMARKABLE) & set(statuses):
        lanes = f"lanes AS (SELECT unnest({values.add(list(statuses))}::text[]) AS status)"
        chosen, in_lane = "lanes", "remarkable = lane.status"
        fits += named
    else:
        lanes = LANES
        chosen, in_lane = f"(SELECT * FROM lanes WHERE true{named})", IN_LANE
        if query.status is not None:
            fits += f" AND status = ANY({values.add(list(query.status))}::text[])"
    most = LOOKED_AT if fits else missing + 1
    statement = f"""
        WITH {lanes}, places AS MATERIALIZED (
            SELECT place.created_at, place.uuid
            FROM {chosen} AS lane CROSS JOIN LATERAL (
                SELECT created_at, uuid FROM qtasks.records
                WHERE {bounds} AND {in_lane}
                {NEWEST} LIMIT {most}
            ) AS place
            {NEWEST} LIMIT {most}
        )
        (
            SELECT known.* FROM places CROSS JOIN LATERAL (
                SELECT {COLUMNS} FROM qtasks.records
                WHERE namespace = $1 AND uuid = places.uuid AND record IS NOT NULL AND {KEPT}{fits}
                LIMIT 1
            ) AS known
            {NEWEST} LIMIT {missing + 1}
        )
        UNION ALL
        (
            SELECT uuid, NULL, NULL, NULL, NULL, created_at, NULL, NULL FROM places
            WHERE (SELECT count(*) FROM places) = {most}
            ORDER BY created_at, uuid LIMIT 1
        )
    """
    return statement, values.all


def found(rows: Sequence[Any], missing: int) -> Look:
    """Return what the rows of `looking` mean. The last one has no record if more may follow."""
    border: Place | None = None
    if rows and rows[-1]["record"] is None:
        border = rows[-1]["created_at"], rows[-1]["uuid"]
        rows = rows[:-1]
    tasks = [task_of(row) for row in rows[:missing]]
    if len(rows) > missing:
        last = rows[missing - 1]
        return tasks, (last["created_at"], last["uuid"]), True
    return tasks, border, border is not None


def task_of(row: Any) -> Task:
    """Return the record of a row. If it cannot be decoded, build it from the other columns."""
    try:
        return decode_task(row["record"])
    except WireError as error:
        return unreadable(
            row["uuid"], row["order"], row["execution"], error,
            task_name=row["task_name"], queue=row["queue"], created_at=row["created_at"],
            dead=row["dead"] is not None,
        )  # fmt: skip
