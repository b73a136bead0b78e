"""A broker that takes the place of another one, while the app works."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from weakref import WeakSet

from msgspec.structs import replace

from qtasks.client.retrying import Backoff
from qtasks.compose.commands import MergedCommands, send_to_all
from qtasks.compose.composed import ComposedBroker
from qtasks.compose.members import Member
from qtasks_core import Broker, Command, Guarantees, QueueDepth, Subscription, TaskMessage
from qtasks_core.errors import ConfigurationError, NotSupported, Unavailable
from qtasks_core.together import together

logger = logging.getLogger("qtasks")

_LONGEST = 10.0
"""Most seconds between two looks at what is left."""


class MigratingBroker(ComposedBroker):
    """Publishes to `new`, and takes messages from `old` and `new`, until `old` is empty.

        broker = MigratingBroker("redis://localhost", "kafka://localhost:9092")
        app = QueueTasks("shop", broker, "postgresql://localhost/shop")

    A retry goes to `new` too. Commands go through both, so they reach workers that know only one of
    them. A worker logs when a queue has nothing left on `old`, and `left` counts it. Raises
    `ConfigurationError` for a wrong URL, different leases, or the same broker twice.
    """

    is_whole = False

    def __init__(self, old: Broker | str, new: Broker | str) -> None:
        super().__init__(old, new)
        if len(self._members) < 2:
            raise ConfigurationError("old and new are the same broker")
        self._old, self._new = self._members
        self._listening: WeakSet[MergedCommands] = WeakSet()
        self._received: set[str] = set()
        """The queues of all subscriptions."""
        self._watching: asyncio.Task[None] | None = None

    def _home_of(self, message: TaskMessage) -> Member:
        return self._new

    def _holders_of(self, queue: str) -> Sequence[Member]:
        return self._members

    def _keeps(self, member: Member, queue: str) -> bool:
        return member is self._new

    @property
    def guarantees(self) -> Guarantees:
        """What both promise. A retry of an old message leaves it and the new one, after a crash."""
        return replace(super().guarantees, atomic_retries=False)

    async def left(self, queue: str) -> QueueDepth:
        """Count what is left of a queue on the old broker. Raises `Unavailable`."""
        return await self._old.broker.depth(queue)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = await super().subscribe(queues)
        self._received.update(queues)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return subscription

    async def _watch(self) -> None:
        """Log when the old broker has nothing left in a queue, each time that it comes to that."""
        pause = Backoff(first=0.2, most=_LONGEST)
        empty: set[str] = set()
        while True:
            for queue in sorted(self._received):
                try:
                    left = await self.left(queue)
                except Unavailable:
                    continue  # the subscription says so
                except NotSupported:
                    return
                if (left.ready, left.delayed, left.in_flight) != (0, 0, 0):
                    empty.discard(queue)
                elif queue not in empty:
                    empty.add(queue)
                    told = self._old.broker.guarantees
                    logger.info(
                        "nothing is left in the queue %r on %s, which this app is leaving",
                        queue, f"{told.part} on {told.server}" if told.server else told.part,
                    )  # fmt: skip
            await asyncio.sleep(pause.next())

    async def stop(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait({watching})
        try:
            await super().stop()
        finally:
            await together([commands.close() for commands in self._listening])

    async def broadcast(self, command: Command) -> None:
        await send_to_all(command, self._members)

    def commands(self) -> AsyncIterator[Command]:
        commands = MergedCommands(self._members)
        self._listening.add(commands)
        return commands
