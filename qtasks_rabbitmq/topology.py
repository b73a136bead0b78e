"""What a namespace has on the server: the names, and the declarations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtasks_core.errors import ConfigurationError, Unavailable

if TYPE_CHECKING:
    from pamqp.base import Frame

    from qtasks_rabbitmq.channel import Channel

ACCESS_REFUSED = 403
PRECONDITION_FAILED = 406
QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}
UNLIMITED = (4, 0)
"""From this release on the server drops what was delivered 20 times, unless told not to."""

log = logging.getLogger(__name__)


class Names:
    """The names of one namespace. It has no colon, so no two namespaces share a name."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"qtasks:{namespace}"
        self.due = f"{self._prefix}:due"
        """Direct exchange: what has waited long enough goes to the queue it names."""
        self.lost = f"{self._prefix}:lost"
        """Exchange and queue: what has waited and finds no queue is kept here."""
        self.delay = f"{self._prefix}:delay"
        """Headers exchange: the way into the ladder."""
        self.log = f"{self._prefix}:log"
        """The stream of a storage."""

    def queue(self, name: str) -> str:
        """Return the server's name of a task queue."""
        return f"{self._prefix}:queue:{name}"

    def level(self, level: int) -> str:
        """Return the name of a level of the ladder, its queue's and its exchange's."""
        return f"{self._prefix}:level:{level}"


async def declare(channel: Channel, methods: Sequence[Frame], queues: Sequence[str] = ()) -> None:
    """Declare in one write; `queues` names the queues among it.

    Raises `ConfigurationError` when the server will never take it.
    """
    try:
        if queues:
            await channel.create(queues, methods)
        else:
            await channel.call(*methods)
    except Unavailable as error:
        if channel.close_code in (ACCESS_REFUSED, PRECONDITION_FAILED):
            raise ConfigurationError(str(error)) from error
        raise


def namespace_methods(names: Names) -> list[Frame]:
    """Return what declares the exchanges that every queue of a namespace relies on."""
    from pamqp.commands import Exchange

    return [
        Exchange.Declare(exchange=names.lost, exchange_type="fanout", durable=True),
        Exchange.Declare(
            exchange=names.due,
            exchange_type="direct",
            durable=True,
            arguments={"alternate-exchange": names.lost},
        ),
    ]


def queue_methods(names: Names, queue: str, version: tuple[int, ...]) -> list[Frame]:
    """Return what declares a task queue and binds it for the delayed messages.

    The engine counts deliveries, so the server's own limit is off where it has one by default.
    """
    from pamqp.commands import Queue

    arguments = dict(QUORUM)
    if version >= UNLIMITED:
        arguments["x-delivery-limit"] = -1
    name = names.queue(queue)
    return [
        Queue.Declare(queue=name, durable=True, arguments=arguments),
        Queue.Bind(queue=name, exchange=names.due, routing_key=name),
    ]
