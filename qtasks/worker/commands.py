"""Commands that are broadcast to workers: cancel a task, pause or resume a queue, show itself."""

from __future__ import annotations

import asyncio

from qtasks.client.retrying import Backoff, Outage
from qtasks.worker.cancelling import Cancelling
from qtasks.worker.consumer import Consumer
from qtasks.worker.registry import Registration
from qtasks_core import Broker, Command
from qtasks_core.errors import NotSupported, Unavailable


class Commands:
    """Receives the commands of one broker, and passes each to the object that carries it out."""

    def __init__(
        self,
        broker: Broker,
        consumer: Consumer,
        cancelling: Cancelling,
        registration: Registration,
    ) -> None:
        self._broker = broker
        self._consumer = consumer
        self._cancelling = cancelling
        self._registration = registration

    async def listen(self) -> None:
        """Carry out commands, for ever. Return at once if the broker has no channel for them."""
        backoff, outage = Backoff(), Outage("listening for commands")
        while True:
            try:
                async for command in self._broker.commands():
                    backoff.reset()
                    outage.over()
                    self._obey(command)
            except NotSupported:
                return
            except Unavailable as error:
                outage.failed(error)
            await asyncio.sleep(backoff.next())

    def _obey(self, command: Command) -> None:
        match command.name:
            case "cancel" if command.target is not None:
                self._cancelling.check_soon(command.target)
            case "pause":
                self._consumer.pause(command.target)
            case "resume":
                self._consumer.resume(command.target)
            case "ping":
                self._registration.announce()
            case _:
                pass  # a command of a later release
