"""Creates everything that a namespace needs before its workers start, except the task queues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtasks_core.errors import Unavailable
from qtasks_rabbitmq.control import control_connection
from qtasks_rabbitmq.delays import LEVELS, ladder_methods
from qtasks_rabbitmq.topology import (
    NOT_FOUND,
    Names,
    command_methods,
    declare,
    namespace_methods,
    passive,
)

if TYPE_CHECKING:
    from pamqp.base import Frame

    from qtasks_rabbitmq.channel import Channel
    from qtasks_rabbitmq.connection import Connection


async def migrated(url: str, heartbeat: int, namespace: str) -> list[str]:
    """Create what is missing, and return a line for each thing that was created.

    Task queues are created at their first use, because nothing lists their names.
    """
    names = Names(namespace)
    connection = control_connection(url, "migration", heartbeat)
    created: list[str] = []
    try:
        channel = await connection.channel()
        steps = [namespace_methods(names), command_methods(names)]
        steps += [
            ladder_methods(names, range(level, level + 1), connection.version)
            for level in range(LEVELS)
        ]
        for methods in steps:
            missing = await _missing(connection, channel, methods)
            async with connection.answering():
                await declare(channel, names, methods)
            created += [line for line in missing if line not in created]
        await channel.registered()
    finally:
        await connection.close()
    return created


async def _missing(connection: Connection, channel: Channel, methods: list[Frame]) -> list[str]:
    """Return a line for each queue and exchange that does not exist."""
    from pamqp.commands import Exchange, Queue

    lines: list[str] = []
    for method in methods:
        if not isinstance(method, Queue.Declare | Exchange.Declare):
            continue
        async with connection.answering(), channel.aside() as aside:
            try:
                await aside.call(passive(method))
            except Unavailable:
                if aside.close_code != NOT_FOUND:
                    raise
                if isinstance(method, Exchange.Declare):
                    lines.append(f"exchange {method.exchange} created")
                else:
                    lines.append(f"queue {method.queue} created")
    return lines
