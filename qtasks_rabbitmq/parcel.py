"""Messages on their way to the server, encoded, and what their headers say."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Protocol

from msgspec import Struct

from qtasks_core import Delivery, Outcome, TaskMessage
from qtasks_rabbitmq.delays import number_of

LONGEST_MESSAGE_ID = 255
"""Bytes: a short string of AMQP."""
COUNT = "qtasks-count"
"""Header: deliveries of earlier copies of a message."""


class Parcel(Struct, frozen=True, gc=False):
    """An encoded message, the queue it is for, and how long it has to wait (seconds)."""

    queue: str
    delay: float
    message_id: str
    body: bytes
    count: int = 0
    """How often it was delivered before, where the server cannot know."""


class Dispatcher(Protocol):
    """What a lane asks of its broker."""

    heartbeat: int

    async def publish(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish messages."""

    async def dispatch(self, parcels: Sequence[Parcel]) -> list[Outcome]:
        """Publish encoded messages."""


def message_id_of(uuid: str) -> str:
    """Return what the server knows a message by: the uuid, or its digest where that is too long.

    Nothing reads the uuid back from it; the body has that.
    """
    encoded = uuid.encode()
    return uuid if len(encoded) <= LONGEST_MESSAGE_ID else sha256(encoded).hexdigest()


def copy_of(delivery: Delivery, body: bytes) -> Parcel:
    """Return a message as it came, for another receiver."""
    message = delivery.message
    name = message_id_of(message.uuid) if isinstance(message, TaskMessage) else ""
    return Parcel(delivery.queue, 0.0, name, body, (delivery.count or 1) - 1)


def count_of(headers: dict[str, Any]) -> int:
    """Return how often a message was delivered, this time and earlier copies included.

    Raises `ValueError` for a header that is none of ours.
    """
    returned = headers.get("x-delivery-count", 0)
    count = 1 + returned if isinstance(returned, int) else 1
    return count + number_of(headers, COUNT)
