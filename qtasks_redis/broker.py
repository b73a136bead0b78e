"""A broker on Redis: one stream per queue, leases in a sorted set, a bell that wakes receivers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from qtasks_core import (
    Broker,
    Command,
    Guarantees,
    Outcome,
    QueueDepth,
    Subscription,
    TaskMessage,
)
from qtasks_core.batches import split
from qtasks_core.errors import Closed
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import encode_message
from qtasks_redis import control
from qtasks_redis.composition import RedisComposition
from qtasks_redis.connection import (
    BEST_SETTINGS,
    MOST_BYTES,
    MOST_ITEMS,
    UNKNOWN,
    Connection,
    connect,
    fitting,
)
from qtasks_redis.control import COMMANDS
from qtasks_redis.keys import Keys, milliseconds, packed
from qtasks_redis.listening import Listeners
from qtasks_redis.options import LEASE_TIME, checked, place_of
from qtasks_redis.scripts import PUBLISH
from qtasks_redis.storage import RedisStorage
from qtasks_redis.subscription import RedisSubscription

if TYPE_CHECKING:
    from qtasks_core.contracts.composition import Composition
    from qtasks_core.contracts.storage import Storage

# All commands of the scripts and of the blocking read. The key holds text, so most of them fail.
_TRIALS: Final[Sequence[tuple[Any, ...]]] = (
    ("SET", "", "PX", 1000), ("GET",), ("EXISTS",), ("LPUSH", "1"), ("BLPOP", 0.01),
    ("ZADD", "XX", 0, "m"), ("ZREM", "m"), ("ZSCORE", "m"), ("ZRANGE", 0, 0),
    ("ZRANGEBYSCORE", 0, 0), ("XADD", "NOMKSTREAM", "*", "m", ""), ("XRANGE", "-", "+"),
    ("XDEL", "0-1"), ("XLEN",), ("SADD", "m"), ("SREM", "m"), ("SMEMBERS",),
    ("ZCOUNT", 0, 0), ("ZREMRANGEBYRANK", 0, 0),
)  # fmt: skip


class RedisBroker(Broker):
    """Moves messages through Redis. `lease` is in seconds.

    Raises `ConfigurationError` if the URL or the lease is wrong.
    """

    driver_loggers = ("redis", "push_response")

    def __init__(self, url: str = "redis://localhost", *, lease: float = 30.0) -> None:
        self._lease = LEASE_TIME.checked("lease", lease)
        self._url = checked(url, connections=2)
        self._connection: Connection | None = None
        self._server = UNKNOWN
        self._subscriptions: WeakSet[RedisSubscription] = WeakSet()
        self._listeners = Listeners()
        self._joined = False
        """Whether the records are on the same server."""

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="RedisBroker",
            server=self._server.name,
            survives=self._server.survives,
            durability=self._server.durability,
            at_best="machine crash",
            best_settings=BEST_SETTINGS,
            lease=self._lease,
            largest=self._server.largest,
            leases_survive=self._server.survives in ("server crash", "machine crash"),
            order="queue",
            counts_deliveries=True,
            atomic_retries=True,
            priorities=True,
            advice=self._server.advice,
        )

    async def start(self, namespace: str) -> None:
        self._connection = await self._connect(namespace)
        self._server = self._connection.server

    async def refresh(self) -> None:
        connection = self.started()
        await connection.refresh()
        self._server = connection.server

    async def _connect(self, namespace: str) -> Connection:
        connection = await connect(self._url, namespace)
        try:
            await connection.check_rights(_TRIALS, [connection.key(COMMANDS, "")])
        except BaseException:
            await connection.close()
            raise
        return connection

    async def stop(self) -> None:
        try:
            await together([subscription.close() for subscription in self._subscriptions])
        finally:
            await self._listeners.stop()
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        connection = self.started()
        encoded = [encode_message(message) for message in messages]
        outcomes, taken = fitting(encoded, connection.server.largest)
        for part in split([len(encoded[at]) for at in taken], MOST_ITEMS, MOST_BYTES):
            keys = Keys(connection)
            sent: list[int] = []
            for at in taken[part]:
                message = messages[at]
                position = keys.queue(message.queue, message.priority)
                sent += (position, milliseconds(message.delay))
            args = [packed(sent), *(encoded[at] for at in taken[part])]
            await connection.run(PUBLISH, keys.keys, args)
        return outcomes

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = RedisSubscription(self.started, self._lease, lambda: self._joined)
        self.started()
        self._subscriptions.add(subscription)
        return subscription

    async def clock(self) -> float | None:
        return await self.started().time()

    async def depth(self, queue: str) -> QueueDepth:
        return await control.depth(self.started(), queue)

    async def purge(self, queue: str) -> int:
        return await control.purge(self.started(), queue)

    async def broadcast(self, command: Command) -> None:
        await control.broadcast(self.started(), command)

    def commands(self) -> AsyncIterator[Command]:
        return control.commands(self.started(), self._listeners)

    async def migrate(self, namespace: str) -> list[str]:
        """Check the server and the user's rights. There is nothing to create."""
        await (await self._connect(namespace)).close()
        return []

    def join(self, storage: Storage) -> Composition | None:
        if isinstance(storage, RedisStorage) and place_of(storage.url) == place_of(self._url):
            self._joined = True
            return RedisComposition(self, storage, self.started)
        return None

    def started(self) -> Connection:
        """Return the connection. Raises `Closed`."""
        if self._connection is None:
            raise Closed("RedisBroker is not started")
        return self._connection
