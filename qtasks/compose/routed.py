"""A broker for each queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtasks.compose.composed import ComposedBroker
from qtasks.compose.members import Member
from qtasks_core import Broker, TaskMessage
from qtasks_core.names import checked_name


class RoutedBroker(ComposedBroker):
    """Moves the messages of each queue through the broker of that queue.

        broker = RoutedBroker("redis://localhost", {"events": "kafka://kafka:9092"})
        app = QueueTasks("shop", broker, "postgresql://localhost/shop")

    `default` has all queues that `routes` does not name, and the commands to workers. Brokers are
    URLs or objects. All processes of an app need the same routes. Raises `ConfigurationError` for
    a wrong URL or name, or if the brokers have different leases.
    """

    is_whole = True

    def __init__(self, default: Broker | str, routes: Mapping[str, Broker | str]) -> None:
        names = [checked_name(queue, "a queue") for queue in routes]
        super().__init__(default, *routes.values())
        self._default, *others = self._of_parts
        self._routes = dict(zip(names, others, strict=True))

    def _home_of(self, message: TaskMessage) -> Member:
        return self._routes.get(message.queue, self._default)

    def _holders_of(self, queue: str) -> Sequence[Member]:
        return (self._routes.get(queue, self._default),)
