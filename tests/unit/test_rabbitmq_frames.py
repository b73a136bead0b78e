"""What is written and read without the driver is what the driver would write and read."""

from __future__ import annotations

import asyncio
from struct import pack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from qtasks_rabbitmq.frames import (
    BODY,
    HEAD,
    OFFSET,
    PERSISTENT,
    FrameReader,
    Properties,
    content_of,
    framed,
    properties_frame,
    read_properties,
)

names = st.text(max_size=255).filter(lambda text: len(text.encode()) <= 255)
sizes = st.integers(0, 2**32)


@given(names, sizes, st.integers(1, 65535), st.none() | st.integers(0, 9))
def test_the_properties_of_a_message(
    name: str, size: int, channel: int, priority: int | None
) -> None:
    properties = commands.Basic.Properties(
        delivery_mode=PERSISTENT, message_id=name or None, priority=priority
    )
    marshalled = frame.marshal(ContentHeader(body_size=size, properties=properties), channel)
    assert properties_frame(channel, size, name, priority) == marshalled
    assert read_properties(marshalled[HEAD:-1]) == Properties(size, {}, name)


@given(st.binary(min_size=1), st.integers(1, 65535))
def test_a_body(body: bytes, channel: int) -> None:
    assert framed(BODY, channel, body) == frame.marshal(ContentBody(body), channel)


@pytest.mark.parametrize("headers", [{"x-delivery-count": 3}, {}])
def test_properties_with_headers(headers: dict[str, Any]) -> None:
    properties = commands.Basic.Properties(
        delivery_mode=PERSISTENT, message_id="one", headers=headers
    )
    marshalled = frame.marshal(ContentHeader(body_size=1, properties=properties), 1)
    assert read_properties(marshalled[HEAD:-1]) == Properties(1, headers, "one")


@given(st.integers(0, 2**62), sizes)
def test_the_offset_of_a_record(offset: int, size: int) -> None:
    headers: dict[str, Any] = {"x-stream-offset": offset}
    properties = commands.Basic.Properties(delivery_mode=PERSISTENT, headers=headers)
    marshalled = frame.marshal(ContentHeader(body_size=size, properties=properties), 1)
    payload = marshalled[HEAD:-1]
    # The server writes offsets in eight bytes, the driver small numbers in fewer.
    shown = payload[:14] + pack(">I", len(OFFSET) + 8) + OFFSET + pack(">q", offset) + payload[-1:]
    assert read_properties(shown) == Properties(size, headers)


@given(st.lists(st.binary(max_size=200), max_size=20), st.data())
async def test_frames_that_come_in_pieces(bodies: list[bytes], data: st.DataObject) -> None:
    """What the driver gets has all content frames in order, and each other frame for itself."""
    deliver = commands.Basic.Deliver(consumer_tag="1", delivery_tag=7, routing_key="key")
    sent = [frame.marshal(ContentHeader(body_size=5), 1)]
    for body in bodies:
        channel = data.draw(st.integers(1, 2))
        others: list[Frame | Heartbeat] = [commands.Basic.QosOk(), Heartbeat(), deliver]
        other = data.draw(st.sampled_from(others))
        sent.append(frame.marshal(other, 0 if isinstance(other, Heartbeat) else channel))
        sent.append(frame.marshal(ContentBody(body), channel))
    reader = FrameReader()
    reading = asyncio.create_task(read_all(reader))
    stream, at = b"".join(sent), 0
    while at < len(stream):
        size = data.draw(st.integers(1, 300))
        reader.feed_data(stream[at : at + size])
        at += size
        for _ in range(data.draw(st.integers(0, 5))):
            await asyncio.sleep(0)
    reader.feed_eof()
    assert await reading == [(each[1:3], each[HEAD:-1]) for each in sent]


async def read_all(reader: FrameReader) -> list[tuple[bytes, bytes]]:
    """Read as the driver does; return channel and payload of each frame."""
    frames: list[tuple[bytes, bytes]] = []
    while not reader.at_eof():
        try:
            head = await reader.readexactly(1) + await reader.readexactly(6)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            break
        payload = await reader.readexactly(int.from_bytes(head[3:]) + 1)
        if head[0] == BODY:
            frames += [(head[1:3], each) for each in content_of(payload[:-1])]
        else:
            frames.append((head[1:3], payload[:-1]))
    return frames


def test_a_name_that_is_no_text() -> None:
    payload = properties_frame(1, 5, "ab", None)[HEAD:-1]
    found = read_properties(payload[:-2] + b"\xc3\x28")
    assert (found.size, found.headers) == (5, {})
    assert found.error.startswith("its properties: UnicodeDecodeError")
