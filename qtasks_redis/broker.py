"""A broker on Redis: one stream per queue, leases in a sorted set, a bell that wakes receivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from weakref import WeakSet

from qtasks_core import (
    Broker,
    Guarantees,
    Outcome,
    Subscription,
    TaskMessage,
)
from qtasks_core.batches import split
from qtasks_core.errors import Closed
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import encode_message
from qtasks_redis.connection import (
    MOST_BYTES,
    MOST_ITEMS,
    UNKNOWN,
    Connection,
    connect,
    fitting,
)
from qtasks_redis.options import LEASE_TIME, checked
from qtasks_redis.queues import Queues, milliseconds
from qtasks_redis.scripts import PUBLISH
from qtasks_redis.subscription import RedisSubscription

# All commands of the scripts and of the blocking read. The key holds text, so most of them fail.
_TRIALS: Final[Sequence[tuple[Any, ...]]] = (
    ("SET", "", "PX", 1000), ("GET",), ("EXISTS",), ("LPUSH", "1"), ("BLPOP", 0.01),
    ("ZADD", "XX", 0, "m"), ("ZREM", "m"), ("ZSCORE", "m"), ("ZRANGE", 0, 0),
    ("ZRANGEBYSCORE", 0, 0), ("XADD", "NOMKSTREAM", "*", "m", ""), ("XRANGE", "-", "+"),
    ("XDEL", "0-1"),
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

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="RedisBroker",
            server=self._server.name,
            survives=self._server.survives,
            durability=self._server.durability,
            lease=self._lease,
            largest=self._server.largest,
            leases_survive=self._server.survives in ("server crash", "machine crash"),
            order="queue",
            counts_deliveries=True,
            atomic_retries=True,
            unsupported=("depth", "purge", "broadcast", "commands", "migrate"),
            notes=self._server.notes,
        )

    async def start(self, namespace: str) -> None:
        self._connection = await connect(self._url, namespace)
        self._server = self._connection.server
        try:
            await self._connection.check_rights(_TRIALS)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        try:
            await together([subscription.close() for subscription in self._subscriptions])
        finally:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        connection = self._started()
        encoded = [encode_message(message) for message in messages]
        outcomes, taken = fitting(encoded, connection.server.largest)
        for part in split([len(encoded[at]) for at in taken], MOST_ITEMS, MOST_BYTES):
            queues = Queues(connection)
            args: list[str | bytes] = []
            for at in taken[part]:
                delay = milliseconds(messages[at].delay)
                args += (queues.position(messages[at].queue), delay, encoded[at])
            await connection.run(PUBLISH, queues.keys, args)
        return outcomes

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = RedisSubscription(self._started, self._lease)
        self._started()
        self._subscriptions.add(subscription)
        return subscription

    async def clock(self) -> float | None:
        return await self._started().time()

    def _started(self) -> Connection:
        if self._connection is None:
            raise Closed("RedisBroker is not started")
        return self._connection
