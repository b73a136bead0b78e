"""The other data that processes share: values, claims and streams, as statements."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from qtasks_core.names import checked_id

VALUE = "SELECT value FROM qtasks.values WHERE namespace = $1 AND key = $2"

VALUES = """
    SELECT key, value FROM qtasks.values
    WHERE namespace = $1 AND key >= $2 AND starts_with(key, $2)
"""

CLAIM = """
    INSERT INTO qtasks.claims AS held (namespace, key, owner, expires_at)
    VALUES ($1, $2, $3, clock_timestamp() + $4::float8 * interval '1 second')
    ON CONFLICT (namespace, key) DO UPDATE
    SET owner = excluded.owner, expires_at = excluded.expires_at
    WHERE held.owner = excluded.owner OR held.expires_at <= clock_timestamp()
    RETURNING extract(epoch FROM expires_at)::float8 AS expires_at
"""
RELEASE = "DELETE FROM qtasks.claims WHERE namespace = $1 AND key = $2 AND owner = $3"

# The row in `streams` stays locked until the commit. So positions rise in the order of the commits,
# and a reader never misses a lower one.
APPEND = """
    WITH stream AS (
        INSERT INTO qtasks.streams AS stored (namespace, uuid, last)
        VALUES ($1, $2, cardinality($3::bytea[]))
        ON CONFLICT (namespace, uuid) DO UPDATE SET last = stored.last + excluded.last
        RETURNING last
    )
    INSERT INTO qtasks.items (namespace, uuid, position, data)
    SELECT $1, $2, stream.last - cardinality($3::bytea[]) + place, data
    FROM stream CROSS JOIN unnest($3::bytea[]) WITH ORDINALITY AS given (data, place)
"""

READ_AT_ONCE = 500
READ = f"""
    SELECT position, data FROM qtasks.items
    WHERE namespace = $1 AND uuid = $2 AND position > $3
    ORDER BY position LIMIT {READ_AT_ONCE}
"""

CLAIMS_OVER = "DELETE FROM qtasks.claims WHERE namespace = $1 AND expires_at <= clock_timestamp()"

TIDIED = 1000
STREAMS_OVER = f"""
    WITH over AS (
        SELECT uuid FROM qtasks.streams AS stream
        WHERE namespace = $1 AND created_at < to_timestamp($2) AND NOT EXISTS (
            SELECT 1 FROM qtasks.records
            WHERE namespace = $1 AND uuid = stream.uuid AND record IS NOT NULL
        )
        ORDER BY namespace, created_at LIMIT {TIDIED}
    ), items AS (
        DELETE FROM qtasks.items WHERE namespace = $1 AND uuid = ANY(ARRAY(SELECT uuid FROM over))
    )
    DELETE FROM qtasks.streams WHERE namespace = $1 AND uuid = ANY(ARRAY(SELECT uuid FROM over))
    RETURNING uuid
"""
"""Old streams whose task was never recorded, or was deleted before they began."""


def setting(
    namespace: str, key: str, value: bytes | None, expect: bytes | UnsetType | None
) -> tuple[str, list[Any]]:
    """Return the statement that sets a value, and its parameters.

    It returns a row if the value was the expected one.
    """
    checked_id(key, "the key of a value")
    here = "namespace = $1 AND key = $2"
    values: list[Any] = [namespace, key]
    if value is None and expect is UNSET:
        return f"WITH gone AS (DELETE FROM qtasks.values WHERE {here}) SELECT 1", values
    if value is None and expect is None:
        absent = f"NOT EXISTS (SELECT 1 FROM qtasks.values WHERE {here})"
        return f"SELECT 1 WHERE {absent}", values
    if value is None:
        expected = f"{here} AND value = $3"
        return f"DELETE FROM qtasks.values WHERE {expected} RETURNING 1", [*values, expect]
    if isinstance(expect, bytes):
        expected = f"{here} AND value = $4"
        update = f"UPDATE qtasks.values SET value = $3 WHERE {expected} RETURNING 1"
        return update, [*values, value, expect]
    then = "UPDATE SET value = excluded.value" if expect is UNSET else "NOTHING"
    return (
        "INSERT INTO qtasks.values (namespace, key, value) VALUES ($1, $2, $3)"
        f" ON CONFLICT (namespace, key) DO {then} RETURNING 1",
        [*values, value],
    )
