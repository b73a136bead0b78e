"""A broker for each queue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from qtasks.compose.composed import ComposedBroker, commands_of
from qtasks.compose.members import Member
from qtasks.compose.merged import spread
from qtasks_core import Broker, Command, Outcome, QueueDepth, TaskMessage
from qtasks_core.names import checked_name


class RoutedBroker(ComposedBroker):
    """Moves the messages of each queue through a broker of its own.

        broker = RoutedBroker("redis://localhost", {"events": "kafka://kafka:9092"})
        app = QueueTasks("shop", broker, "postgresql://localhost/shop")

    `default` has all queues that `routes` does not name, and the commands to workers. Brokers are
    given as URLs or as objects. All processes of an app need the same routes. Raises
    `ConfigurationError` for a wrong URL or name.
    """

    keeps_queues_whole = True

    def __init__(self, default: Broker | str, routes: Mapping[str, Broker | str]) -> None:
        names = [checked_name(queue, "a queue") for queue in routes]
        super().__init__(default, *routes.values())
        self._default, *others = self.of_parts
        self._routes = dict(zip(names, others, strict=True))

    def broker_of(self, queue: str) -> Broker:
        """Return the broker of a queue."""
        return self._member_of(queue).broker

    def _member_of(self, queue: str) -> Member:
        return self._routes.get(queue, self._default)

    def keeps(self, member: Member, queue: str) -> bool:
        return self._member_of(queue) is member

    def shares(self, queues: Mapping[str, int]) -> list[tuple[Member, dict[str, int]]]:
        shares: dict[Member, dict[str, int]] = {}
        for queue, most in queues.items():
            shares.setdefault(self._member_of(queue), {})[queue] = most
        return list(shares.items())

    async def send(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        async def publish(member: Member, some: list[TaskMessage]) -> list[Outcome]:
            return await (await member.ready()).publish(some)

        return await spread([(self._member_of(each.queue), each) for each in messages], publish)

    async def clock(self) -> float | None:
        return await (await self._default.ready()).clock()

    async def depth(self, queue: str) -> QueueDepth:
        return await (await self._member_of(queue).ready()).depth(queue)

    async def purge(self, queue: str) -> int:
        return await (await self._member_of(queue).ready()).purge(queue)

    async def broadcast(self, command: Command) -> None:
        await (await self._default.ready()).broadcast(command)

    def commands(self) -> AsyncIterator[Command]:
        return commands_of(self._default)
