"""Each queue on several brokers, each of which has a share of the tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qtasks.compose.composed import ComposedBroker
from qtasks.compose.members import Member
from qtasks_core import Broker, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_core.rendezvous import chosen


class ShardedBroker(ComposedBroker):
    """Spreads the tasks of all queues over several brokers, by their uuids.

        broker = ShardedBroker({"one": "redis://one", "two": "redis://two"})

    The name of a shard and the uuid decide (https://en.wikipedia.org/wiki/Rendezvous_hashing): a
    new shard gets its share of the new tasks, and all others go where they went before. Shards in
    `draining` get no new tasks. Workers receive from all shards. Raises `ConfigurationError` for a
    wrong URL, an unknown name, different leases, or if no shard gets new tasks.
    """

    is_whole = False

    def __init__(
        self, shards: Mapping[str, Broker | str], *, draining: Collection[str] = ()
    ) -> None:
        super().__init__(*shards.values())
        if len(self._members) < len(shards):
            raise ConfigurationError("two shards are the same broker")
        if unknown := sorted(set(draining) - shards.keys()):
            raise ConfigurationError(f"draining={unknown!r} names no shard; there are {[*shards]}")
        self._filling = {
            name.encode(): member
            for name, member in zip(shards, self._of_parts, strict=True)
            if name not in draining
        }
        if not self._filling:
            raise ConfigurationError("no shard gets new tasks: there is none, or all are draining")

    def _home_of(self, message: TaskMessage) -> Member:
        return self._filling[chosen(self._filling, message.uuid.encode())]

    def _holders_of(self, queue: str) -> Sequence[Member]:
        return self._members
