"""The values of a log's entries: records, and what else processes share.

A record is encoded as everywhere (`qtasks_core.wire`). Other values begin with a zero byte, which
no version of the wire format is, then their own version. So an older release skips them as entries
that it cannot read, and every release skips the kinds that it does not know.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import Struct

from qtasks_core import Task
from qtasks_core.errors import WireError
from qtasks_core.wire import decode_task, encode_task

_HEADER = b"\x00\x01"
"""A release raises the second byte if older ones would misread its entries."""


class Setting(Struct, frozen=True, array_like=True, tag="value", gc=False):
    """A new shared value, or None without a value. The partition key is the value's key.

    It counts only if it follows the entry `after`: the entry that has the current value. Empty: the
    key has never had a value.
    """

    value: bytes | None
    after: str


class Claiming(Struct, frozen=True, array_like=True, tag="claim", gc=False):
    """A new owner of a claim, or None if it is released. The partition key is the claim's key.

    It counts only if it follows the entry `after`, as a `Setting` does.
    """

    owner: str | None
    ttl: float
    after: str


class Items(Struct, frozen=True, array_like=True, tag="items", gc=False):
    """Items that one call appends to a task. The partition key is the task's uuid."""

    items: tuple[bytes, ...]
    appended_at: float
    """Unix time, by the writer's clock. Only `expire` uses it, for items without a record."""


class Deletion(Struct, frozen=True, array_like=True, tag="delete", gc=False):
    """Deletes a record and the items that were appended so far. The partition key is the uuid.

    With `of`, it counts only if that entry has the current record; empty: if there is no record.
    """

    of: str | None = None


Shared: TypeAlias = Setting | Claiming | Items | Deletion
Content: TypeAlias = Task | Shared

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Shared] = msgspec.msgpack.Decoder(Shared)


def encode(content: Content) -> bytes:
    """Return the value of an entry."""
    if isinstance(content, Task):
        return encode_task(content)
    return _HEADER + _encoder.encode(content)


def decode(value: bytes) -> Content:
    """Return the content of an entry's value. Raises `WireError` when there is none."""
    if value[:1] != b"\x00":
        return decode_task(value)
    if value[:2] != _HEADER:
        raise WireError(f"entry of version {value[1:2].hex()}, this release reads 01")
    try:
        return _decoder.decode(memoryview(value)[2:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(str(error)) from error
