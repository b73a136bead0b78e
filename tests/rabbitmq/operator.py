"""What strangers and operators do to a server: raw frames, topology by hand."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiormq
from aiormq.abc import AbstractChannel, ChannelFrame

METHOD, HEADER, BODY = 1, 2, 3
# Flags of properties, which stand in this order.
HEADERS, TIMESTAMP, APP_ID = 0x2000, 0x40, 0x08


@asynccontextmanager
async def operator(url: str) -> AsyncIterator[AbstractChannel]:
    """Give a channel of the driver's own."""
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


def text(value: bytes) -> bytes:
    """Return a short string as AMQP has it."""
    return bytes((len(value),)) + value


def table(key: bytes, value: bytes) -> bytes:
    """Return a table of one field, whose value begins with its type."""
    return struct.pack(">I", len(text(key) + value)) + text(key) + value


def long_text(value: bytes) -> bytes:
    """Return a field's value that is a long string."""
    return b"S" + struct.pack(">I", len(value)) + value


async def publish_raw(
    channel: AbstractChannel,
    routing_key: bytes,
    body: bytes,
    flags: int,
    properties: bytes,
    exchange: bytes = b"",
) -> None:
    """Publish with properties that no driver would write, and wait until the server has them."""
    method = struct.pack(">HHH", 60, 40, 0) + text(exchange) + text(routing_key) + b"\0"
    header = struct.pack(">HHQH", 60, 0, len(body), flags) + properties
    frames = b"".join(
        struct.pack(">BHI", kind, channel.number, len(payload)) + payload + b"\xce"
        for kind, payload in ((METHOD, method), (HEADER, header), (BODY, body))
    )
    await channel.connection.write_queue.put(ChannelFrame(frames, False))
    # The channel is served in order.
    await channel.basic_qos(prefetch_count=1)
