"""A second broker for the time in which the first is away."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from msgspec.structs import replace

from qtasks.compose.merged import PAUSE, ComposedBroker, Member, commands_of_all, sum_of
from qtasks_core import Broker, Command, Guarantees, Outcome, QueueDepth, TaskMessage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.together import together

T = TypeVar("T")


class FailoverBroker(ComposedBroker):
    """Publishes to the second broker while the first is away, and receives from both.

        broker = FailoverBroker("redis://one", "redis://two")

    Enqueuing fails only if both are away. Messages that are on a server wait there until it is
    back. Raises `ConfigurationError` for a wrong URL, or if both are the same broker.
    """

    def __init__(self, first: Broker | str, second: Broker | str) -> None:
        super().__init__(first, second)
        if len(self.members) == 1:
            raise ConfigurationError("the first and the second broker are the same")
        self._away_until = 0.0
        """The time before which the first broker is not tried again, while the second is there."""

    @property
    def guarantees(self) -> Guarantees:
        """What both promise, but for the order: what waits at one comes after what is at both."""
        return replace(super().guarantees, order="none")

    def keeps(self, member: Member, queue: str) -> bool:
        return True

    def shares(self, queues: Mapping[str, int]) -> list[tuple[Member, dict[str, int]]]:
        return [(member, dict(queues)) for member in self.members]

    async def send(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        return await self._at_one(lambda broker: broker.publish(messages))

    async def clock(self) -> float | None:
        return await self._at_one(lambda broker: broker.clock())

    async def depth(self, queue: str) -> QueueDepth:
        return sum_of(await together([broker.depth(queue) for broker in await self._both()]))

    async def purge(self, queue: str) -> int:
        counts = await together([broker.purge(queue) for broker in await self._both()])
        return -1 if -1 in counts else sum(counts)

    async def broadcast(self, command: Command) -> None:
        await self._at_one(lambda broker: broker.broadcast(command))

    def commands(self) -> AsyncIterator[Command]:
        return commands_of_all(self.members)

    async def _at_one(self, call: Callable[[Broker], Awaitable[T]]) -> T:
        """Call at the first broker; if it is away, at the second.

        It is unknown whether a call had an effect at a broker that is away. A message that is
        published at both is delivered twice at worst, as after any outage.
        """
        first, second = self.members
        error: Unavailable | None = None
        if time.monotonic() >= self._away_until:
            try:
                return await call(await first.ready())
            except Unavailable as unavailable:
                error = unavailable
                self._away_until = time.monotonic() + PAUSE
        try:
            return await call(await second.ready())
        except Unavailable:
            if error is not None:
                raise
            # Perhaps the first is there again.
            return await call(await first.ready())

    async def _both(self) -> list[Broker]:
        return [await member.ready() for member in self.members]
