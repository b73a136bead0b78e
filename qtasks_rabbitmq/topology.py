"""The queues and exchanges of a namespace: their names and declarations."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtasks_core import TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.names import is_name

if TYPE_CHECKING:
    from pamqp.base import Frame
    from pamqp.commands import Exchange, Queue

    from qtasks_rabbitmq.channel import Channel

ACCESS_REFUSED = 403
NOT_FOUND = 404
PRECONDITION_FAILED = 406
ESSENTIAL = re.compile("inequivalent arg '(x-queue-type|durable|type|exclusive|auto_delete)'")
"""The arguments of a queue or exchange that must match. If others differ, it is used as it is."""
QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}
COMMANDS: dict[str, Any] = {
    "x-queue-type": "stream",
    "x-max-length-bytes": 4_000_000,
    "x-stream-max-segment-size-bytes": 1_000_000,
}
"""A stream of commands stays small: nobody reads old commands."""
UNLIMITED = (4, 0)
"""From this release on, the server drops a message after 20 deliveries by default."""
STRICT = (4, 3)
"""From this release on, quorum queues deliver by the `priority` of messages, in 32 levels."""
OWN_TIMEOUTS = (4, 3)
"""From this release on, a consumer may set its own timeout for acknowledgements."""
PRIORITIES = range(9, -1, -1)
"""From the one that is delivered first."""
USUAL = TaskMessage(uuid="-", task_name="-").priority
"""The priority of most messages. Its lane exists in every queue."""

logger = logging.getLogger("qtasks.rabbitmq")


class Names:
    """The names of one namespace. A namespace has no colon, so two of them never share a name."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"qtasks:{namespace}"
        self._told: set[str] = set()
        self.due = f"{self._prefix}:due"
        """Direct exchange: a message whose delay is over goes to the queue that it names."""
        self.lost = f"{self._prefix}:lost"
        """Exchange and queue: they keep delayed messages that find no queue."""
        self.delay = f"{self._prefix}:delay"
        """Headers exchange: the entry of the ladder."""
        self.lanes = f"{self._prefix}:lanes"
        """Exchange without a use but to exist: some queue has more lanes than the usual one."""
        self.handed = f"{self._prefix}:handed"
        """Headers exchange: it leads to the queues of long tasks."""
        self.commands = f"{self._prefix}:commands"
        """The stream of commands to all workers."""
        self.log = f"{self._prefix}:log"
        """The stream of a storage."""

    def queue(self, name: str, priority: int = USUAL) -> str:
        """Return the server's name of a lane: the messages of one priority in a task queue."""
        if priority == USUAL:
            return f"{self._prefix}:queue:{name}"
        return f"{self._prefix}:queue:{name}:{priority}"

    def of(self, queue: str) -> str | None:
        """Return the task queue of a lane that the server calls `queue`.

        None: it is not one of ours.
        """
        rest = queue.removeprefix(f"{self._prefix}:queue:")
        name = rest.partition(":")[0]
        ours = rest != queue and is_name(name) and queue in self.all_lanes(name)
        return name if ours else None

    def all_lanes(self, queue: str) -> list[str]:
        """Return the server's names of all lanes that a queue may have, the first one first."""
        return [self.queue(queue, priority) for priority in PRIORITIES]

    def handed_to(self, holder: str) -> str:
        """Return the name of the queue in which a subscription holds its long tasks."""
        return f"{self._prefix}:handed:{holder}"

    def level(self, level: int) -> str:
        """Return the name of a level of the ladder, which its queue and its exchange share."""
        return f"{self._prefix}:level:{level}"

    def tell(self, difference: str, *, serves: bool) -> None:
        """Log once that an object differs from its declaration. Raise if it cannot be used."""
        if not serves:
            raise ConfigurationError(f"{difference}. Delete it: it is then created correctly")
        if difference not in self._told:
            self._told.add(difference)
            logger.warning("used as it is: %s", difference)
            if "x-delivery-limit" in difference:
                logger.warning(
                    "RabbitMQ drops what was delivered more often than a queue's delivery limit "
                    "(20 from release 4.0 on); rabbitmqctl set_policy can raise it"
                )


async def declare(channel: Channel, names: Names, methods: Sequence[Frame]) -> None:
    """Declare on separate channels, so that a failure does not close `channel`.

    Existing queues and exchanges are used as they are. An operator may have created them, for a
    user without the right to. Or another release or server created them differently. Raises
    `ConfigurationError` if an object is missing and may not be created, or if an existing one
    cannot be used.
    """
    from pamqp.commands import Queue

    queues = [m for m in methods if isinstance(m, Queue.Declare)]
    known = await _there(channel, queues)
    differs = False
    # Open each channel outside the `try`. If a channel cannot be opened, it has no close code, and
    # the error is an outage.
    async with channel.aside() as aside:
        try:
            await aside.call(*methods)
        except (Unavailable, ConfigurationError):
            differs = aside.close_code in (ACCESS_REFUSED, PRECONDITION_FAILED)
            if not differs:
                raise
    if differs:
        await _one_by_one(channel, names, methods)
    if not known:
        channel.note_creation()


async def _there(channel: Channel, methods: Sequence[Queue.Declare]) -> bool:
    """Return whether all these queues exist. If not, the question costs a channel."""
    if not methods:
        return True
    async with channel.aside() as aside:
        try:
            await aside.call(*(passive(method) for method in methods))
        except Unavailable:
            if aside.close_code != NOT_FOUND:
                raise
            return False
        except ConfigurationError:
            # The user may not ask. Then this user did not create the queues either, and missing
            # ones are found later.
            return True
    return True


async def _one_by_one(channel: Channel, names: Names, methods: Sequence[Frame]) -> None:
    """Declare missing objects. Leave different ones as they are, and log each once."""
    from pamqp.commands import Exchange, Queue

    may_create = True
    for method in methods:
        if not isinstance(method, Queue.Declare | Exchange.Declare):
            async with channel.aside() as aside:
                await aside.call(method)
            continue
        if may_create:
            async with channel.aside() as aside:
                try:
                    await aside.call(method)
                except ConfigurationError:
                    may_create = False
                except Unavailable as error:
                    if aside.close_code != PRECONDITION_FAILED:
                        raise
                    names.tell(str(error), serves=not ESSENTIAL.search(str(error)))
            if may_create:
                continue
        await _need(channel, method)


async def _need(channel: Channel, method: Queue.Declare | Exchange.Declare) -> None:
    """Raise `ConfigurationError` if an object is missing that the user may not create."""
    async with channel.aside() as aside:
        try:
            await aside.call(passive(method))
        except Unavailable as error:
            if aside.close_code != NOT_FOUND:
                raise
            raise ConfigurationError(
                f"{error}. The user may not create it: create it beforehand, or grant the right to "
                "configure it (docs/rights.md lists what is needed)"
            ) from error


def passive(method: Queue.Declare | Exchange.Declare) -> Queue.Declare | Exchange.Declare:
    """Return the method that asks whether a queue or exchange exists."""
    from pamqp.commands import Exchange, Queue

    if isinstance(method, Queue.Declare):
        return Queue.Declare(queue=method.queue, passive=True)
    return Exchange.Declare(exchange=method.exchange, passive=True)


def quorum(version: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of a quorum queue.

    The engine counts deliveries. So if the server has a delivery limit by default, it is turned
    off.
    """
    return QUORUM | {"x-delivery-limit": -1} if version >= UNLIMITED else dict(QUORUM)


def namespace_methods(names: Names) -> list[Frame]:
    """Return the methods that declare what all queues of a namespace need."""
    from pamqp.commands import Exchange, Queue

    return [
        Queue.Declare(queue=names.lost, durable=True, arguments=dict(QUORUM)),
        Exchange.Declare(exchange=names.lost, exchange_type="fanout", durable=True),
        Queue.Bind(queue=names.lost, exchange=names.lost),
        Exchange.Declare(
            exchange=names.due,
            exchange_type="direct",
            durable=True,
            arguments={"alternate-exchange": names.lost},
        ),
    ]


def command_methods(names: Names) -> list[Frame]:
    """Return the methods that declare the stream of commands.

    A stream needs no queue for each listener. So a user without the right to configure can listen.
    """
    from pamqp.commands import Queue

    return [Queue.Declare(queue=names.commands, durable=True, arguments=dict(COMMANDS))]


def queue_methods(
    names: Names, queue: str, version: tuple[int, ...], priority: int = USUAL
) -> list[Frame]:
    """Return the methods that declare a lane of a task queue and bind it for delayed messages."""
    from pamqp.commands import Exchange, Queue

    name = names.queue(queue, priority)
    methods: list[Frame] = [
        Queue.Declare(queue=name, durable=True, arguments=quorum(version)),
        Queue.Bind(queue=name, exchange=names.due, routing_key=name),
    ]
    if priority != USUAL:
        methods.append(Exchange.Declare(exchange=names.lanes, exchange_type="fanout", durable=True))
    return methods
