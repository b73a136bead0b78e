"""Reads frames so that bad data in a foreign message harms only that message.

The driver decodes every frame on the connection's reader. For example, it cannot decode text that
is not UTF-8, or a time that Python cannot represent. Then it closes the connection for all users.
The server then delivers the message again, and the connection breaks again.

Two frames contain data from other programs: a delivery and its properties. `FrameReader` passes
them to the driver as bodies, which the driver does not decode. `channel.py` decodes them with the
functions below.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from struct import pack
from typing import Any, cast

from msgspec import Struct
from pamqp.header import ContentHeader

HEAD = 7
"""Bytes of a frame before its payload: type, channel, size."""
METHOD, HEADER, BODY = 1, 2, 3
BASIC = 60
"""The AMQP class of methods for messages."""
DELIVER = b"\x00\x3c\x00\x3c"
CONNECTION_CLOSE = b"\x00\x0a\x00\x32"
CHANNEL_CLOSE = b"\x00\x14\x00\x28"
BLOCKED = b"\x00\x0a\x00\x3c"
UNBLOCKED = b"\x00\x0a\x00\x3d"
OURS = b"\x10\x80"
"""Flags of a message without headers: it has a delivery mode (a byte) and an id."""
OURS_BY_PRIORITY = b"\x18\x80"
"""The same with a priority, a byte after the delivery mode."""
END = b"\xce"
PERSISTENT = 2
"""The delivery mode of a message that survives a restart of the server."""
TLS_ALERT = b"\x15\x03"
OFFSET = b"\x0fx-stream-offsetl"
"""How the server encodes a record's offset among its headers: name, type, then eight bytes."""


class FrameReader(asyncio.StreamReader):
    """A stream of AMQP frames. The driver decodes only frames with the server's own data."""

    def __init__(self) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._frame = b""
        self._at = 0
        """How many bytes of the frame the driver has read."""
        self.closed: tuple[int, str] | None = None
        """Code and text with which the server closed the connection."""
        self.blocked = ""
        """Why the server takes no messages from this connection; empty while it does."""
        self.tls = False
        """Whether the server answered in TLS."""

    async def readexactly(self, n: int) -> bytes:
        """Return the next bytes of the current frame. The whole frame is read first."""
        if self._at == len(self._frame):
            self._frame, self._at = await self._next(), 0
        at, self._at = self._at, self._at + n
        return self._frame[at : at + n]

    async def _next(self) -> bytes:
        head = await super().readexactly(HEAD)
        if head.startswith(b"AMQP"):
            return head  # another version of the protocol; the driver reports it
        if head.startswith(TLS_ALERT):
            self.tls = True
            raise asyncio.IncompleteReadError(head, HEAD + 1)
        payload = await super().readexactly(int.from_bytes(head[3:]) + 1)
        kind, method = head[0], payload[:4]
        if kind == HEADER or (kind == METHOD and method == DELIVER):
            return bytes((BODY,)) + head[1:] + payload
        if kind == METHOD and method in (CONNECTION_CLOSE, CHANNEL_CLOSE):
            # The text quotes names. It is cut at 255 bytes, perhaps inside a character.
            end = 7 + payload[6]
            text = bytes(byte if byte < 128 else ord("?") for byte in payload[7:end])
            payload = payload[:7] + text + payload[end:]
            if method == CONNECTION_CLOSE:
                self.closed = int.from_bytes(payload[4:6]), text.decode("ascii")
        if kind == METHOD and method == BLOCKED:
            self.blocked = payload[5 : 5 + payload[4]].decode("utf-8", "replace") or "an alarm"
        elif kind == METHOD and method == UNBLOCKED:
            self.blocked = ""
        return head + payload


class Deliver(Struct, frozen=True, gc=False):
    """The method that announces a delivery."""

    consumer: str
    tag: int
    routing_key: str


class Properties(Struct, frozen=True):
    """The data between the announcement of a message and its body."""

    size: int
    headers: dict[str, Any]
    message_id: str = ""
    error: str = ""
    """The reason why the properties are unreadable.

    In that case only `size` and a stream's offset are known.
    """


def read_deliver(payload: bytes) -> Deliver:
    """Return the announcement of a delivery.

    The sender chose the routing key, so invalid UTF-8 in it is replaced.
    """
    consumer_end = 5 + payload[4]
    exchange_at = consumer_end + 9
    key_at = exchange_at + 1 + payload[exchange_at]
    key = payload[key_at + 1 : key_at + 1 + payload[key_at]]
    return Deliver(
        payload[5:consumer_end].decode("ascii"),
        int.from_bytes(payload[consumer_end : consumer_end + 8]),
        key.decode("utf-8", "replace"),
    )


def framed(kind: int, channel: int, payload: bytes) -> bytes:
    """Return a frame."""
    return pack(">BHI", kind, channel, len(payload)) + payload + END


def properties_frame(channel: int, size: int, message_id: str, priority: int | None) -> bytes:
    """Return the frame before the body of a persistent message. `size` is the body's, in bytes."""
    name = message_id.encode()
    if priority is None:
        flags, values = OURS, bytes((PERSISTENT, len(name)))
    else:
        flags, values = OURS_BY_PRIORITY, bytes((PERSISTENT, priority, len(name)))
    return framed(HEADER, channel, pack(">HHQ", BASIC, 0, size) + flags + values + name)


def read_properties(payload: bytes) -> Properties:
    """Return the properties of a message. If they are unreadable, `error` says why."""
    size = int.from_bytes(payload[4:12])
    if (flags := payload[12:14]) in (OURS, OURS_BY_PRIORITY):  # most messages; skip the driver
        at = 15 if flags == OURS else 16
        with suppress(UnicodeDecodeError):
            return Properties(size, {}, payload[at + 1 : at + 1 + payload[at]].decode())
    header = ContentHeader()
    try:
        header.unmarshal(payload)
    except Exception as error:  # noqa: BLE001  foreign bytes can raise anything in the driver
        return Properties(size, _offset(payload), error=f"its properties: {error!r}")
    properties = header.properties
    headers = cast("dict[str, Any]", properties.headers or {})
    return Properties(size, headers, properties.message_id or "")


def _offset(payload: bytes) -> dict[str, Any]:
    """Return the offset that the server added to headers that are otherwise unreadable."""
    at = payload.rfind(OFFSET)
    if at < 0:
        return {}
    at += len(OFFSET)
    return {"x-stream-offset": int.from_bytes(payload[at : at + 8], signed=True)}
