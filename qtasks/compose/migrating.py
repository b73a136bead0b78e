"""A move from one broker to another while the app works."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing

from msgspec.structs import replace

from qtasks.compose.composed import ComposedBroker, commands_of_all
from qtasks.compose.members import Member
from qtasks_core import Broker, Command, Outcome, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_core.together import together

_COPY = "copy"
"""An argument of commands that are sent to the old broker beside the new one."""


class MigratingBroker(ComposedBroker):
    """Publishes to a new broker, and receives from it and from the old one.

        broker = MigratingBroker("redis://localhost", "kafka://kafka:9092")

    Deploy it to all clients and workers, in any order: those that have only the old broker still
    work beside. Once the old broker is empty, deploy the new one alone (docs/compose.md). Raises
    `ConfigurationError` for a wrong URL, or if both are the same broker.
    """

    def __init__(self, old: Broker | str, new: Broker | str) -> None:
        super().__init__(old, new)
        if len(self.members) == 1:
            raise ConfigurationError("the old and the new broker are the same")
        self._old, self._new = self.of_parts

    def keeps(self, member: Member, queue: str) -> bool:
        return member is self._new

    def shares(self, queues: Mapping[str, int]) -> list[tuple[Member, dict[str, int]]]:
        return [(self._old, dict(queues)), (self._new, dict(queues))]

    async def send(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        return await (await self._new.ready()).publish(messages)

    async def broadcast(self, command: Command) -> None:
        old, new = await self.all_ready()
        # Who listens to both hears the one, who has only the old broker the other.
        copy = replace(command, arguments={**command.arguments, _COPY: "1"})
        await together([new.broadcast(command), old.broadcast(copy)])

    async def commands(self) -> AsyncIterator[Command]:
        async with aclosing(commands_of_all(self.members)) as commands:
            async for command in commands:
                if _COPY not in command.arguments:
                    yield command
