"""What a worker does when it is told: cancel a task, pause or resume a queue, show itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from qtasks.client.backoff import Backoff
from qtasks.client.outage import Outage
from qtasks_core import Broker, Command
from qtasks_core.errors import NotSupported, Unavailable


async def obey(broker: Broker, do: Callable[[Command], None]) -> None:
    """Do what is broadcast, for ever; return at once where a broker has no such channel."""
    backoff, outage = Backoff(), Outage("listening for commands")
    while True:
        try:
            async for command in broker.commands():
                backoff.reset()
                outage.over()
                do(command)
        except NotSupported:
            return
        except Unavailable as error:
            outage.failed(error)
        await asyncio.sleep(backoff.next())
