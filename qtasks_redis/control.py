"""Operations on queues and workers from outside: counting, purging, commands."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Final

from qtasks_core import Command, QueueDepth
from qtasks_core.errors import WireError
from qtasks_core.wire import decode_command, encode_command
from qtasks_redis.connection import Connection
from qtasks_redis.keys import Keys
from qtasks_redis.listening import Listeners
from qtasks_redis.scripts import COUNT, PURGE

logger = logging.getLogger("qtasks.redis")

COMMANDS: Final = "commands"
"""The kind of the key that names the channel of commands."""
_PURGED: Final = 500
"""Messages of each kind that one script deletes."""


async def depth(connection: Connection, queue: str) -> QueueDepth:
    """Count messages as a receiver would find them now."""
    keys = Keys(connection)
    keys.queue(queue)
    ready, delayed, in_flight, age = await connection.run(COUNT, keys.keys, ())
    return QueueDepth(ready, delayed, in_flight, None if age < 0 else age / 1000)


async def purge(connection: Connection, queue: str) -> int:
    """Drop the messages that are not in flight. Return their number."""
    keys = Keys(connection)
    keys.queue(queue)
    count, some = 0, 1
    while some:
        some = await connection.run(PURGE, keys.keys, [str(_PURGED)])
        count += some
    return count


async def broadcast(connection: Connection, command: Command) -> None:
    """Send a command to all listeners."""
    await connection.call("PUBLISH", connection.key(COMMANDS, ""), encode_command(command))


async def commands(connection: Connection, listeners: Listeners) -> AsyncIterator[Command]:
    """Yield the commands that are sent from now on."""
    async for data in listeners.follow(connection, connection.key(COMMANDS, "")):
        if not data:
            continue  # the server has confirmed that it sends commands from here on
        try:
            yield decode_command(data)
        except WireError as error:
            logger.warning("a command was passed over: %s", error)
