"""Reading frames in such a way that what a stranger puts into a message harms that message only.

The driver decodes every frame on the connection's reader, and one that it cannot decode (a text
that is no UTF-8, a time that Python does not know) ends the connection for all who use it; the
message comes again, and so does the end. `FrameReader` therefore hands the driver the two frames
that carry others' words, a delivery and its properties, as bodies, which it does not decode.
`channel.py` decodes them with the functions below.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from msgspec import Struct
from pamqp.header import ContentHeader

HEAD = 7
"""Bytes of a frame before its payload: type, channel, size."""
METHOD, HEADER, BODY = 1, 2, 3
DELIVER = b"\x00\x3c\x00\x3c"
CONNECTION_CLOSE = b"\x00\x0a\x00\x32"
CHANNEL_CLOSE = b"\x00\x14\x00\x28"
TLS_ALERT = b"\x15\x03"
OFFSET = b"\x0fx-stream-offsetl"
"""How the server writes a record's offset among its headers: name, type, then eight bytes."""


class FrameReader(asyncio.StreamReader):
    """A stream of AMQP frames, of which the driver decodes those that the server made alone."""

    def __init__(self) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._frame = b""
        self.closed: tuple[int, str] | None = None
        """Code and text with which the server closed the connection."""
        self.tls = False
        """Whether the server answered in TLS."""

    async def readexactly(self, n: int) -> bytes:
        """Return the next bytes of the current frame, reading it whole first."""
        if not self._frame:
            self._frame = await self._next()
        piece, self._frame = self._frame[:n], self._frame[n:]
        return piece

    async def _next(self) -> bytes:
        head = await super().readexactly(HEAD)
        if head.startswith(b"AMQP"):
            return head  # another version of the protocol; the driver says so
        if head.startswith(TLS_ALERT):
            self.tls = True
            raise asyncio.IncompleteReadError(head, HEAD + 1)
        payload = await super().readexactly(int.from_bytes(head[3:]) + 1)
        kind, method = head[0], payload[:4]
        if kind == HEADER or (kind == METHOD and method == DELIVER):
            return bytes((BODY,)) + head[1:] + payload
        if kind == METHOD and method in (CONNECTION_CLOSE, CHANNEL_CLOSE):
            # The text quotes names, cut off at 255 bytes, perhaps within a character.
            end = 7 + payload[6]
            text = bytes(byte if byte < 128 else ord("?") for byte in payload[7:end])
            payload = payload[:7] + text + payload[end:]
            if method == CONNECTION_CLOSE:
                self.closed = int.from_bytes(payload[4:6]), text.decode("ascii")
        return head + payload


class Deliver(Struct, frozen=True, gc=False):
    """The method that announces a delivery."""

    consumer: str
    tag: int
    routing_key: str


class Properties(Struct, frozen=True):
    """What stands between the announcement of a message and its body."""

    size: int
    headers: dict[str, Any]
    message_id: str = ""
    error: str = ""
    """Why the properties cannot be read; then only `size` and a stream's offset are known."""


def read_deliver(payload: bytes) -> Deliver:
    """Return the announcement; the routing key is its sender's, so what is no UTF-8 is replaced."""
    consumer_end = 5 + payload[4]
    exchange_at = consumer_end + 9
    key_at = exchange_at + 1 + payload[exchange_at]
    key = payload[key_at + 1 : key_at + 1 + payload[key_at]]
    return Deliver(
        payload[5:consumer_end].decode("ascii"),
        int.from_bytes(payload[consumer_end : consumer_end + 8]),
        key.decode("utf-8", "replace"),
    )


def read_properties(payload: bytes) -> Properties:
    """Return what precedes a body, and in `error` why it cannot be read."""
    size = int.from_bytes(payload[4:12])
    header = ContentHeader()
    try:
        header.unmarshal(payload)
    except Exception as error:  # noqa: BLE001  what a stranger's bytes make the driver raise is not known
        return Properties(size, _offset(payload), error=f"its properties: {error!r}")
    properties = header.properties
    headers = cast("dict[str, Any]", properties.headers or {})
    return Properties(size, headers, properties.message_id or "")


def _offset(payload: bytes) -> dict[str, Any]:
    """Return the offset that the server has put among headers which cannot be read otherwise."""
    at = payload.rfind(OFFSET)
    if at < 0:
        return {}
    at += len(OFFSET)
    return {"x-stream-offset": int.from_bytes(payload[at : at + 8], signed=True)}
