"""What a worker does when it is told: cancel a task, pause or resume a queue, show itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from qtasks.engine.backoff import Backoff
from qtasks_core import Broker, Command
from qtasks_core.errors import NotSupported, Unavailable

logger = logging.getLogger("qtasks")


async def obey(broker: Broker, do: Callable[[Command], Awaitable[None]]) -> None:
    """Do what is broadcast, for ever; return at once where a broker has no such channel."""
    backoff = Backoff()
    while True:
        try:
            async for command in broker.commands():
                backoff.reset()
                await do(command)
        except NotSupported:
            return
        except Unavailable as error:
            logger.warning("listening for commands: %s; trying again", error)
        await asyncio.sleep(backoff.next())
