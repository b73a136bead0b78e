"""A second broker for the time in which the first is away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtasks.compose.composed import ComposedBroker
from qtasks.compose.members import Member
from qtasks_core import Broker, Outcome, TaskMessage
from qtasks_core.errors import ConfigurationError


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

    def keeps(self, member: Member, queue: str) -> bool:
        return True

    def shares(self, queues: Mapping[str, int]) -> list[tuple[Member, dict[str, int]]]:
        return [(member, dict(queues)) for member in self.members]

    async def send(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        # It is unknown whether a broker that is away has them. If both have one, it is delivered
        # twice at worst, as after any outage.
        return await self.at_one(lambda broker: broker.publish(messages))
