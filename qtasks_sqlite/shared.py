"""The other data that processes share: values, claims and streams, as work for a transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from msgspec import UNSET, UnsetType

from qtasks_core import Claim
from qtasks_core.names import checked_id
from qtasks_core.schemas import LONGEST_ID
from qtasks_sqlite.connection import Transaction
from qtasks_sqlite.listening import channel

_LAST = "\U0010ffff" * (LONGEST_ID + 1)
"""Sorts after everything that may follow a prefix."""


def getting(namespace: int, key: str) -> Callable[[Transaction], bytes | None]:
    """Return the work that reads a value."""
    checked_id(key, "the key of a value")

    def get(turn: Transaction) -> bytes | None:
        row: tuple[bytes] | None = turn.execute(
            "SELECT value FROM qtasks_values WHERE namespace = ? AND key = ?", (namespace, key)
        ).fetchone()
        return None if row is None else row[0]

    return get


def listing(namespace: int, prefix: str) -> Callable[[Transaction], dict[str, bytes]]:
    """Return the work that reads the values whose key starts with a prefix."""

    def values(turn: Transaction) -> dict[str, bytes]:
        rows = turn.execute(
            "SELECT key, value FROM qtasks_values WHERE namespace = ? AND key >= ? AND key < ?",
            (namespace, prefix, prefix + _LAST),
        )
        return dict(rows.fetchall())

    return values


def setting(
    namespace: int, key: str, value: bytes | None, expect: bytes | UnsetType | None
) -> Callable[[Transaction], bool]:
    """Return the work that sets a value if it is the expected one, and notifies its watchers."""
    get = getting(namespace, key)

    def set_value(turn: Transaction) -> bool:
        there = get(turn)
        if expect is not UNSET and there != expect:
            return False
        if there == value:
            return True
        if value is None:
            turn.execute(
                "DELETE FROM qtasks_values WHERE namespace = ? AND key = ?", (namespace, key)
            )
        else:
            turn.execute("REPLACE INTO qtasks_values VALUES (?, ?, ?)", (namespace, key, value))
        # Only a key that was watched before has a channel.
        number = turn.known_queue(namespace, channel(f"value {key}"))
        if number is not None:
            turn.rung_queues.add(number)
        return True

    return set_value


class Changes:
    """Reads a shared value for one watcher. A look finds it if it differs from the last look."""

    def __init__(self, namespace: int, key: str) -> None:
        self._channel = namespace, channel(f"value {key}")
        self._get = getting(namespace, key)
        self._seen: bytes | UnsetType | None = UNSET

    def number(self, turn: Transaction) -> int:
        """Return the number of the channel."""
        return turn.queue(*self._channel)

    def look(self, turn: Transaction) -> list[bytes | None]:
        """Return the value if it is new."""
        value = self._get(turn)
        if value == self._seen:
            return []
        # After the commit, because a failed transaction is repeated and must find it again.
        turn.after_commit(lambda: self._saw(value))
        return [value]

    def _saw(self, value: bytes | None) -> None:
        self._seen = value


def claiming(
    namespace: int, key: str, owner: str, ttl: float
) -> Callable[[Transaction], Claim | None]:
    """Return the work that claims a key that is free, expired, or held by the same owner."""
    checked_id(key, "the key of a claim")
    checked_id(owner, "the owner of a claim")

    def claim(turn: Transaction) -> Claim | None:
        now = time.time()
        claimed = turn.execute(
            "INSERT INTO qtasks_claims (namespace, key, owner, expires_at) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at "
            "WHERE owner = excluded.owner OR expires_at <= ?",
            (namespace, key, owner, now + ttl, now),
        )
        return Claim(key, owner, now + ttl) if claimed.rowcount else None

    return claim


def releasing(namespace: int, claim: Claim) -> Callable[[Transaction], None]:
    """Return the work that releases a key if the owner still holds it."""

    def release(turn: Transaction) -> None:
        turn.execute(
            "DELETE FROM qtasks_claims WHERE namespace = ? AND key = ? AND owner = ?",
            (namespace, claim.key, claim.owner),
        )

    return release


def appending(namespace: int, uuid: str, items: Sequence[bytes]) -> Callable[[Transaction], None]:
    """Return the work that appends items after the existing ones."""
    checked_id(uuid, "a uuid")

    def append(turn: Transaction) -> None:
        (last,) = turn.execute(
            "SELECT coalesce(max(position), 0) FROM qtasks_streams "
            "WHERE namespace = ? AND uuid = ?",
            (namespace, uuid),
        ).fetchone()
        now = time.time()
        turn.insert(
            "INTO qtasks_streams (namespace, uuid, position, appended_at, data)",
            [(namespace, uuid, at, now, item) for at, item in enumerate(items, last + 1)],
        )

    return append


def reading(
    namespace: int, uuid: str, after: int
) -> Callable[[Transaction], list[tuple[int, bytes]]]:
    """Return the work that reads the items after a position."""
    where = "namespace = ? AND uuid = ? AND position > ?"

    def read(turn: Transaction) -> list[tuple[int, bytes]]:
        rows = turn.select_blobs(
            "qtasks_streams", "position", "uuid", where, (namespace, uuid, after)
        )
        return sorted((position, data) for (position, _), data in rows)

    return read


def tidying(namespace: int, before: float) -> Callable[[Transaction], None]:
    """Return the work that deletes expired claims, and old items without a record."""

    def tidy(turn: Transaction) -> None:
        turn.execute(
            "DELETE FROM qtasks_claims WHERE namespace = ? AND expires_at <= ?",
            (namespace, time.time()),
        )
        turn.execute(
            "DELETE FROM qtasks_streams WHERE namespace = ? AND appended_at < ? AND NOT EXISTS "
            "(SELECT 1 FROM qtasks_records AS r "
            "WHERE r.namespace = qtasks_streams.namespace AND r.uuid = qtasks_streams.uuid)",
            (namespace, before),
        )

    return tidy
