"""A broker with a second one for its outages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from weakref import WeakSet

from qtasks.client.retrying import Backoff
from qtasks.compose.commands import MergedCommands, send_to_any
from qtasks.compose.composed import ComposedBroker
from qtasks.compose.members import Member
from qtasks_core import Broker, Command, Outcome, TaskMessage
from qtasks_core.errors import ConfigurationError, NotSupported, QTasksError, Unavailable
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction


class FailoverBroker(ComposedBroker):
    """Publishes to `second` while `first` is away, and takes messages from both.

        broker = FailoverBroker("amqp://localhost", "redis://localhost")
        app = QueueTasks("shop", broker, "postgresql://localhost/shop")

    Both must answer at the start. Commands go through both. If `first` fails in the middle of a
    call, a message may be on both: then it may run twice. Raises `ConfigurationError` for a wrong
    URL, different leases, or the same broker twice.
    """

    is_whole = False

    def __init__(self, first: Broker | str, second: Broker | str) -> None:
        super().__init__(first, second)
        if len(self._members) < 2:
            raise ConfigurationError("first and second are the same broker")
        self._first, self._second = self._members
        self._probing: asyncio.Task[None] | None = None
        """Waits until the first broker answers again; None while it is used."""
        self._listening: WeakSet[MergedCommands] = WeakSet()

    def _home_of(self, message: TaskMessage) -> Member:
        return self._first if self._probing is None else self._second

    def _holders_of(self, queue: str) -> Sequence[Member]:
        return self._members

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        if self._probing is None:
            try:
                with self._first.watched():
                    return await self._first.broker.publish(messages)
            except Unavailable as error:
                self._first.outage.failed(error)
                if self._probing is None:
                    self._probing = asyncio.create_task(self._probe())
        return await self._second.broker.publish(messages)

    async def _probe(self) -> None:
        """Ask the first broker until it answers."""
        pause = Backoff(first=0.5)
        while True:
            await asyncio.sleep(pause.next())
            try:
                await self._first.broker.depth("default")
                break
            except NotSupported:
                break  # the next publish is the question
            except QTasksError:
                continue
        self._first.outage.over()
        self._probing = None

    async def stop(self) -> None:
        probing, self._probing = self._probing, None
        if probing is not None:
            probing.cancel()
            await asyncio.wait({probing})
        try:
            await super().stop()
        finally:
            await together([commands.close() for commands in self._listening])

    async def broadcast(self, command: Command) -> None:
        await send_to_any(command, self._members)

    def commands(self) -> AsyncIterator[Command]:
        commands = MergedCommands(self._members)
        self._listening.add(commands)
        return commands
