"""The memory backend behind a server to kill and to freeze: the honest one, what wrong ones vary.

Memory ends with its process, so this 'server' is a flag, and what it forgets is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from qtasks_core import (
    Delivery,
    Guarantees,
    Inbox,
    Outcome,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Unavailable
from qtasks_memory import MemoryBroker, MemoryStorage
from qtasks_memory.connection import Memory
from qtasks_memory.inbox import MemoryInbox
from qtasks_memory.subscription import MemorySubscription


class FlagServer:
    """A server that is up, frozen or down; `forgets` names what of a memory a kill removes."""

    def __init__(self, *forgets: str) -> None:
        self.up = True
        self.frozen = False
        self.freezes = 0
        self.memories: set[Memory] = set()
        self._forgets = forgets
        self.on_kill: list[Callable[[], None]] = []

    def kill(self) -> None:
        self.up = False
        for forget in self.on_kill:
            forget()
        for memory in self.memories:
            for what in self._forgets:
                getattr(memory, what).clear()

    def restart(self) -> None:
        self.up = True

    def freeze(self) -> None:
        self.frozen = True
        self.freezes += 1

    def thaw(self) -> None:
        self.frozen = False

    def check(self) -> None:
        if not self.up:
            raise Unavailable("the server is down")
        if self.frozen:
            raise Unavailable("the server does not answer")


servers: dict[str, FlagServer] = {}
"""By name, so that a part can be built from arguments that JSON knows."""


class ServedSubscription(MemorySubscription):
    """A subscription that finds no server where there is none."""

    server: FlagServer

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        self.server.check()
        return await super().receive(wanted, limit)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        self.server.check()
        return await super().settle(settlements)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        self.server.check()
        return await super().extend(deliveries)


class Broker(MemoryBroker):
    """An honest broker; wrong ones change `subscription` or a method."""

    subscription: type[MemorySubscription] = ServedSubscription

    def __init__(self, *, lease: float = 30.0, server: str | None = None, **options: Any) -> None:
        super().__init__(lease=lease)
        self.server = servers[server] if server is not None else FlagServer()
        self.options = options

    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, survives="server crash", leases_survive=True)

    async def start(self, namespace: str) -> None:
        self.server.check()
        await super().start(namespace)
        self.server.memories.add(self._started())

    def _started(self) -> Memory:
        memory = super()._started()
        self.server.check()
        return memory

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = self.subscription(self._started(), self._lease)
        if isinstance(subscription, ServedSubscription):
            subscription.server = self.server
        self._subscriptions.add(subscription)
        return subscription


class Storage(MemoryStorage):
    """An honest storage; wrong ones change `inbox_class` or a method."""

    inbox_class: type[MemoryInbox] = MemoryInbox

    def __init__(self, *, server: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.server = servers[server] if server is not None else FlagServer()

    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, survives="server crash")

    async def start(self, namespace: str) -> None:
        self.server.check()
        await super().start(namespace)
        self.server.memories.add(self._started())

    def _started(self) -> Memory:
        memory = super()._started()
        self.server.check()
        return memory

    async def inbox(self) -> Inbox:
        inbox = self.inbox_class(self._started())
        self._inboxes.add(inbox)
        return inbox


def memory_of(subscription: MemorySubscription) -> Memory:
    """Return the memory a subscription takes from."""
    return subscription._memory


def uuids_of(deliveries: Sequence[Delivery]) -> set[str]:
    """Return the uuids of deliveries."""
    return {d.message.uuid for d in deliveries if isinstance(d.message, TaskMessage)}
