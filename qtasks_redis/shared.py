"""The other data that processes share: values, claims and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from msgspec import UNSET, UnsetType

from qtasks_core import Claim
from qtasks_core.names import checked_id
from qtasks_redis.connection import Connection
from qtasks_redis.keys import STREAM, STREAMS, milliseconds
from qtasks_redis.listening import Listeners
from qtasks_redis.record_scripts import APPEND, CLAIM, RELEASE, SET_VALUE, VALUES

_MOST_READ = 1000
"""Items of a stream that one command reads."""


async def get_value(connection: Connection, key: str) -> bytes | None:
    """Return a value."""
    value: bytes | None = await connection.call(
        "HGET", connection.key("values", ""), checked_id(key, "the key of a value")
    )
    return value


async def values(connection: Connection, prefix: str) -> dict[str, bytes]:
    """Return the values whose key starts with a prefix."""
    flat = await connection.run(VALUES, _keys(connection), [prefix])
    return {flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)}


async def set_value(
    connection: Connection, key: str, value: bytes | None, expect: bytes | UnsetType | None
) -> bool:
    """Set a value if it is the expected one, and notify its watchers."""
    checked_id(key, "the key of a value")
    args: list[str | bytes] = [key]
    if expect is UNSET:
        args += ("any", "")
    elif expect is None:
        args += ("none", "")
    else:
        args += ("is", expect)
    args += ("delete", "") if value is None else ("set", value)
    args.append(connection.key("value", key))
    return bool(await connection.run(SET_VALUE, _keys(connection), args))


def _keys(connection: Connection) -> tuple[str, str]:
    return connection.key("values", ""), connection.key("value-names", "")


async def watch_value(
    connection: Connection, listeners: Listeners, key: str
) -> AsyncIterator[bytes | None]:
    """Yield the value now, and whenever a look after a push finds another one."""
    seen: bytes | UnsetType | None = UNSET
    async for _ in listeners.follow(connection, connection.key("value", key)):
        value = await get_value(connection, key)
        if value != seen:
            seen = value
            yield value


async def claim(connection: Connection, key: str, owner: str, ttl: float) -> Claim | None:
    """Claim a key that is free, expired, or held by the same owner."""
    checked_id(key, "the key of a claim")
    checked_id(owner, "the owner of a claim")
    keep = max(int(milliseconds(ttl)), 1)
    until = await connection.run(CLAIM, [connection.key("claim", key)], [owner, str(keep)])
    return None if until is None else Claim(key, owner, float(until))


async def release(connection: Connection, claim: Claim) -> None:
    """Release a key if the owner still holds it."""
    await connection.run(RELEASE, [connection.key("claim", claim.key)], [claim.owner])


async def append(connection: Connection, uuid: str, items: Sequence[bytes]) -> None:
    """Append items after the existing ones."""
    checked_id(uuid, "a uuid")
    if items:
        keys = connection.key(STREAM, uuid), connection.key(STREAMS, "")
        await connection.run(APPEND, keys, [uuid, *items])


async def read(connection: Connection, uuid: str, after: int) -> list[tuple[int, bytes]]:
    """Return the items after a position. The first item has the position 1."""
    items: list[bytes] = []
    key = connection.key(STREAM, uuid)
    while True:
        start = after + len(items)
        some = await connection.call("LRANGE", key, start, start + _MOST_READ - 1)
        items += some
        if len(some) < _MOST_READ:
            return list(enumerate(items, after + 1))
