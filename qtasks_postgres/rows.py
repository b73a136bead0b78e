"""Converts messages and lists of values to the parameters of statements, column by column.

A list is sent as one text, which the server reads as an array. The driver would check for each
element whether it is a list too, which took a third of the time of a large statement. Many blobs
are sent as one, with the place and the size of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from qtasks_core import TaskMessage
from qtasks_postgres.connection import storable
from qtasks_postgres.floors import PRIORITIES

LONGEST_DELAY = 100 * 365 * 86400.0
"""Seconds. A longer delay may exceed the range of a timestamp."""

MESSAGE = {
    "queue": "text", "priority": "smallint", "delay": "float8", "key": "text",
    "place": "int", "size": "int",
}  # fmt: skip
"""The columns of messages, and their types. A last parameter has all bodies."""


def columns_of(
    batch: Sequence[tuple[TaskMessage, bytes]], keys: Sequence[str | None] = ()
) -> tuple[str | bytes | None, ...]:
    """Return the parameters of messages, for `publishing`."""
    return (
        texts([message.queue for message, _ in batch]),
        numbers(min(max(message.priority, 0), PRIORITIES - 1) for message, _ in batch),
        numbers(min(message.delay, LONGEST_DELAY) for message, _ in batch),
        texts(keys),
        *blobs([body for _, body in batch]),
    )


def publishing(first: int, which: str = "", replaced: str = "NULL") -> str:
    """Return the INSERT of messages. The first of their parameters has the number `first`.

    `which` is a condition. `replaced` has the ids of the messages that these replace.
    """
    return f"""
        INSERT INTO qtasks.messages (namespace, queue, priority, wake_at, body)
        SELECT $1, queue, priority,
               CASE WHEN delay > 0 THEN clock_timestamp() + delay * interval '1 second' END,
               {blob_at(first + len(MESSAGE))}
        FROM unnest({replaced}::bigint[], {arrays(first, MESSAGE.values())})
             AS given (replaced, {", ".join(MESSAGE)})
        {which}
    """


def arrays(first: int, kinds: Iterable[str]) -> str:
    """Return the arrays in the parameters from number `first` on, one of each type."""
    return ", ".join(f"${first + at}::text::{kind}[]" for at, kind in enumerate(kinds))


def blob_at(number: int) -> str:
    """Return the blob of a row with the columns `place` and `size`, out of this parameter."""
    return f"substring(${number}::bytea, place, size)"


def texts(values: Sequence[str | None]) -> str | None:
    """Return texts as one parameter. Without any text that is None."""
    some = [value for value in values if value is not None]
    if not some:
        return None
    quoted = '"' + '","'.join(some) + '"'
    is_plain = "\\" not in quoted and "\0" not in quoted and quoted.count('"') == 2 * len(some)
    if len(some) < len(values) or not is_plain:
        quoted = ",".join(map(_quoted, values))
    return f"{{{quoted}}}"


def _quoted(value: str | None) -> str:
    if value is None:
        return "NULL"
    escaped = storable(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def numbers(values: Iterable[float | None]) -> str:
    """Return numbers as one parameter."""
    return f"{{{str(list(values))[1:-1].replace('None', 'NULL')}}}"


def blobs(values: Sequence[bytes]) -> tuple[str, str, bytes]:
    """Return the places, the sizes and all bytes as parameters."""
    sizes = [len(value) for value in values]
    places = [end - size + 1 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    return numbers(places), numbers(sizes), b"".join(values)
