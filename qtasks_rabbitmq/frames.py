"""Reads frames so that bad data in a foreign message harms only that message.

The driver decodes every frame on the connection's reader. For example, it cannot decode text that
is not UTF-8, or a time that Python cannot represent. Then it closes the connection for all users.
The server then delivers the message again, and the connection breaks again.

Two frames contain data from other programs: a delivery and its properties. `FrameReader` passes
them to the driver within bodies, which the driver does not decode. `channel.py` decodes them with
the functions below. One such body has the frames of many messages, because each frame costs the
driver more than all else that is done with a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from struct import pack
from typing import Any, cast

from msgspec import Struct
from pamqp.header import ContentHeader

CHUNK = 65536
"""The most bytes to read from the socket at once."""
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
HAS_HEADERS, HAS_MODE, HAS_PRIORITY, HAS_ID = 0x2000, 0x1000, 0x0800, 0x0080
"""Flags of properties, which follow each other in this order."""
OURS = pack(">H", HAS_MODE | HAS_ID)
OURS_BY_PRIORITY = pack(">H", HAS_MODE | HAS_PRIORITY | HAS_ID)
END = b"\xce"
PERSISTENT = 2
"""The delivery mode of a message that survives a restart of the server."""
TLS_ALERT = b"\x15\x03"
OFFSET = b"\x0fx-stream-offsetl"
"""How the server encodes a record's offset among its headers: name, type, then eight bytes."""
RECORD = pack(">HI", HAS_HEADERS | HAS_MODE, len(OFFSET) + 8) + OFFSET
"""How the properties of a stream's record begin that has no other headers."""


class FrameReader(asyncio.StreamReader):
    """A stream of AMQP frames. The driver decodes only frames with the server's own data."""

    def __init__(self) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._frame = b""
        self._at = 0
        """How many bytes of the frame the driver has read."""
        self._data = b""
        self._start = 0
        """How many bytes of the data are done with."""
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

    def at_eof(self) -> bool:
        """Return whether everything was read."""
        return super().at_eof() and self._start == len(self._data)

    async def _next(self) -> bytes:
        await self._have(HEAD)
        head = self._data[self._start : self._start + HEAD]
        if head.startswith(b"AMQP"):
            self._start += HEAD
            return head  # another version of the protocol; the driver reports it
        if head.startswith(TLS_ALERT):
            self.tls = True
            raise asyncio.IncompleteReadError(head, HEAD + 1)
        size = HEAD + int.from_bytes(head[3:]) + 1
        await self._have(size)
        if content := self._content(head[1:3]):
            return content
        payload = self._data[self._start + HEAD : self._start + size]
        self._start += size
        kind, method = head[0], payload[:4]
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

    async def _have(self, size: int) -> None:
        """Read until `size` bytes are here."""
        while len(self._data) - self._start < size:
            more = await self.read(CHUNK)
            if not more:
                raise asyncio.IncompleteReadError(self._data[self._start :], size)
            self._data = self._data[self._start :] + more
            self._start = 0

    def _content(self, channel: bytes) -> bytes:
        """Return the frames of messages that come next on a channel, as one body. May be empty.

        It has all of them that are here completely. So the driver handles one frame for many.
        """
        data = self._data
        at, most = self._start, len(data)
        while at + HEAD < most and data[at + 1 : at + 3] == channel:
            kind, end = data[at], at + HEAD + int.from_bytes(data[at + 3 : at + HEAD])
            if end >= most or data[end : end + 1] != END:
                break
            if kind != HEADER and kind != BODY and data[at + HEAD : at + HEAD + 4] != DELIVER:
                break
            at = end + 1
        frames = data[self._start : at]
        self._start = at
        return framed(BODY, int.from_bytes(channel), frames) if frames else b""


def content_of(frames: bytes) -> Iterator[bytes]:
    """Yield the payloads of the frames in a body from `FrameReader`."""
    at, most = 0, len(frames)
    while at < most:
        end = at + HEAD + int.from_bytes(frames[at + 3 : at + HEAD])
        yield frames[at + HEAD : end]
        at = end + 1


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
    flags, values = HAS_MODE, bytes((PERSISTENT,))
    if priority is not None:
        flags |= HAS_PRIORITY
        values += bytes((priority,))
    if message_id:
        name = message_id.encode()
        flags |= HAS_ID
        values += bytes((len(name),)) + name
    return framed(HEADER, channel, pack(">HHQH", BASIC, 0, size, flags) + values)


def read_properties(payload: bytes) -> Properties:
    """Return the properties of a message. If they are unreadable, `error` says why."""
    size = int.from_bytes(payload[4:12])
    if (flags := payload[12:14]) in (OURS, OURS_BY_PRIORITY):  # most messages; skip the driver
        at = 15 if flags == OURS else 16
        with suppress(UnicodeDecodeError):
            return Properties(size, {}, payload[at + 1 : at + 1 + payload[at]].decode())
    if payload.startswith(RECORD, 12):  # nearly all records of a stream
        at = 12 + len(RECORD)
        return Properties(size, {"x-stream-offset": int.from_bytes(payload[at : at + 8])})
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
