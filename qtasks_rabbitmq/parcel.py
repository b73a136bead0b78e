"""Encoded messages on their way to the server, and the meaning of their headers."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from qtasks_core import Delivery, Outcome, Raw, TaskMessage
from qtasks_core.wire import encode_message
from qtasks_rabbitmq.delays import number_of
from qtasks_rabbitmq.topology import PRIORITIES, USUAL

if TYPE_CHECKING:
    from qtasks_rabbitmq.channel import Sending

LONGEST_MESSAGE_ID = 255
"""In bytes: AMQP's limit of a short string."""
COUNT = "qtasks-count"
"""Header: the number of deliveries of earlier copies of a message."""


class Parcel(Struct, frozen=True, gc=False):
    """An encoded message, its queue, and its delay in seconds."""

    queue: str
    delay: float
    message_id: str
    body: bytes
    count: int = 0
    """The number of earlier deliveries that the server cannot know."""
    priority: int = USUAL


class Dispatcher(Protocol):
    """The methods of the broker that a lane uses."""

    heartbeat: int

    async def publish(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish messages."""

    async def dispatch(self, parcels: Sequence[Parcel]) -> list[Outcome]:
        """Publish encoded messages."""

    async def send(self, sendings: Sequence[Sending]) -> dict[int, str]:
        """Publish to exchanges that exist. Return the refused messages, by index, with why."""


def message_id_of(uuid: str) -> str:
    """Return the server's id of a message: the uuid, or its digest if the uuid is too long.

    Nothing reads the uuid from this id, because the body contains it.
    """
    encoded = uuid.encode()
    return uuid if len(encoded) <= LONGEST_MESSAGE_ID else sha256(encoded).hexdigest()


def parcel_of(message: TaskMessage) -> Parcel:
    """Return an encoded message as a parcel, with its own queue, delay and priority."""
    return Parcel(
        message.queue,
        message.delay,
        message_id_of(message.uuid),
        encode_message(message),
        priority=lane_of(message),
    )


def copy_of(delivery: Delivery, body: bytes) -> Parcel:
    """Return an unchanged message as a parcel, for another receiver."""
    message = delivery.message
    name = message_id_of(message.uuid) if isinstance(message, TaskMessage) else ""
    earlier = (delivery.count or 1) - 1
    return Parcel(delivery.queue, 0.0, name, body, earlier, lane_of(message))


def lane_of(message: TaskMessage | Raw) -> int:
    """Return a message's priority, from 0 to 9. What cannot be decoded has the usual one."""
    if isinstance(message, Raw):
        return USUAL
    return min(max(message.priority, PRIORITIES[-1]), PRIORITIES[0])


def count_of(headers: dict[str, Any]) -> int:
    """Return how often a message was delivered, including this time and earlier copies.

    Raises `ValueError` if QTasks did not write the header.
    """
    returned = headers.get("x-delivery-count", 0)
    count = 1 + returned if isinstance(returned, int) else 1
    return count + number_of(headers, COUNT)
