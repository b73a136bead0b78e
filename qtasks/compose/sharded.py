"""One queue on several brokers, each of which has a share of the tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

from qtasks.compose.composed import ComposedBroker
from qtasks.compose.members import Member
from qtasks.compose.merged import spread
from qtasks_core import Broker, Outcome, TaskMessage
from qtasks_core.errors import ConfigurationError


class ShardedBroker(ComposedBroker):
    """Spreads the tasks of all queues over several brokers, by their uuids.

        broker = ShardedBroker({"one": "redis://one", "two": "redis://two"})

    A shard that is added gets its share of the new tasks, and the other tasks go where they went
    before (https://en.wikipedia.org/wiki/Rendezvous_hashing). Shards in `draining` get no new
    tasks. Workers receive from all. Raises `ConfigurationError` for a wrong URL, an unknown name,
    or if no shard is left.
    """

    def __init__(
        self, shards: Mapping[str, Broker | str], *, draining: Collection[str] = ()
    ) -> None:
        super().__init__(*shards.values())
        if len(self.members) < len(shards):
            raise ConfigurationError("two shards are the same broker")
        if unknown := sorted(set(draining) - shards.keys()):
            raise ConfigurationError(f"draining={unknown!r} names no shard; there are {[*shards]}")
        self._filling = {
            name.encode() + b"\0": member
            for name, member in zip(shards, self.of_parts, strict=True)
            if name not in draining
        }
        if not self._filling:
            raise ConfigurationError("there is no shard for new tasks: all are draining")

    def shard_of(self, uuid: str) -> Broker:
        """Return the broker of a new task."""
        return self._member_of(uuid).broker

    def _member_of(self, uuid: str) -> Member:
        data = uuid.encode()
        name = max(self._filling, key=lambda name: blake2b(name + data, digest_size=8).digest())
        return self._filling[name]

    def keeps(self, member: Member, queue: str) -> bool:
        return member in self._filling.values()

    def shares(self, queues: Mapping[str, int]) -> list[tuple[Member, dict[str, int]]]:
        return [(member, dict(queues)) for member in self.members]

    async def send(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        async def publish(member: Member, some: list[TaskMessage]) -> list[Outcome]:
            return await (await member.ready()).publish(some)

        return await spread([(self._member_of(each.uuid), each) for each in messages], publish)
