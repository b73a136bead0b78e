"""What is written and read without the driver is what the driver would write and read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from qtasks_rabbitmq.frames import (
    BODY,
    HEAD,
    PERSISTENT,
    Properties,
    framed,
    properties_frame,
    read_properties,
)

names = st.text(min_size=1, max_size=255).filter(lambda text: len(text.encode()) <= 255)
sizes = st.integers(0, 2**32)


@given(names, sizes, st.integers(1, 65535), st.none() | st.integers(0, 9))
def test_the_properties_of_a_message(
    name: str, size: int, channel: int, priority: int | None
) -> None:
    properties = commands.Basic.Properties(
        delivery_mode=PERSISTENT, message_id=name, priority=priority
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


def test_a_name_that_is_no_text() -> None:
    payload = properties_frame(1, 5, "ab", None)[HEAD:-1]
    found = read_properties(payload[:-2] + b"\xc3\x28")
    assert (found.size, found.headers) == (5, {})
    assert found.error.startswith("its properties: UnicodeDecodeError")
