"""Many rows in one step of SQLite.

The driver releases the interpreter lock for each step. In a busy process it then waits for the lock
up to the switch interval. So 500 rows one by one take half a second, but some milliseconds in few
steps. Therefore multi-row VALUES insert rows, and queries aggregate their rows into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import sqlite3

    Execute = Callable[..., sqlite3.Cursor]

# Only a few sizes, so that all their statements stay prepared.
_SIZES = (256, 64, 16, 4, 1)
INLINE = 4096
"""Blobs of up to this many bytes are aggregated. For larger ones, one step each is cheaper."""


def insert(execute: Execute, into: str, rows: Sequence[tuple[Any, ...]], then: str = "") -> None:
    """Run `INSERT into VALUES rows then` for all rows, in few steps."""
    done = 0
    for size in _SIZES:
        while len(rows) - done >= size:
            marks = "(" + ",".join("?" * len(rows[0])) + ")"
            statement = f"INSERT {into} VALUES {','.join([marks] * size)} {then}"
            execute(statement, list(chain.from_iterable(rows[done : done + size])))
            done += size


def array(values: Iterable[Any]) -> str:
    """Return values as a JSON array, for `IN (SELECT value FROM json_each(?))`."""
    return msgspec.json.encode(list(values)).decode()


def select(execute: Execute, columns: str, rest: str, parameters: Sequence[Any]) -> list[list[Any]]:
    """Return the rows of `SELECT columns rest`, which must not contain blobs, in one step."""
    (rows,) = execute(
        f"SELECT json_group_array(json_array({columns})) {rest}", parameters
    ).fetchone()
    return msgspec.json.decode(rows, type=list[list[Any]])


def select_blobs(
    execute: Execute, table: str, key: str, columns: str, where: str, parameters: Sequence[Any]
) -> Iterator[tuple[list[Any], bytes]]:
    """Yield `[key, *columns]` and `data` of the rows of a table, all small blobs in one step.

    `key` must be unique among the rows that `where` selects.
    """
    rows, blobs = execute(
        f"SELECT json_group_array(json_array({key}, {columns})), "
        f"group_concat(CASE WHEN length(data) <= {INLINE} THEN hex(data) ELSE '' END) "
        f"FROM {table} WHERE {where}",
        parameters,
    ).fetchone()
    if blobs is None:
        return
    decoded = msgspec.json.decode(rows, type=list[list[Any]])
    for row, blob in zip(decoded, blobs.split(","), strict=True):
        if blob:
            yield row, bytes.fromhex(blob)
        else:
            one = f"SELECT data FROM {table} WHERE ({where}) AND {key} = ?"
            yield row, execute(one, [*parameters, row[0]]).fetchone()[0]
