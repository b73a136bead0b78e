"""A broker on Postgres: SKIP LOCKED takes rows, leases hold them, NOTIFY wakes receivers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

from qtasks_core import (
    DONE,
    Broker,
    Command,
    Guarantees,
    Outcome,
    QueueDepth,
    ReviewedMigration,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed
from qtasks_core.options import LEASE_TIME
from qtasks_core.together import together
from qtasks_core.wire import encode_message
from qtasks_postgres import floors
from qtasks_postgres.batches import LARGEST, TOO_LARGE, batches, fitting, size_of
from qtasks_postgres.composition import PostgresComposition
from qtasks_postgres.connection import BEST_SETTINGS, Database, Listener
from qtasks_postgres.control import (
    COMMANDS,
    DEPTH,
    PURGE_READY,
    PURGE_WAITING,
    PURGED,
    SEND,
    Assembly,
    pieces_of,
)
from qtasks_postgres.doorbell import RING, Doorbell
from qtasks_postgres.doorbell import columns_of as in_columns
from qtasks_postgres.listening import Listeners
from qtasks_postgres.rows import columns_of, publishing
from qtasks_postgres.schema import DEFAULT
from qtasks_postgres.storage import PostgresStorage
from qtasks_postgres.subscription import PostgresSubscription

if TYPE_CHECKING:
    from qtasks_core.contracts.composition import Composition
    from qtasks_core.contracts.storage import Storage

RIGHTS = {"messages": ("SELECT", "INSERT", "UPDATE", "DELETE"), **floors.RIGHTS}

PUBLISH = publishing(2)


class PostgresBroker(Broker, ReviewedMigration):
    """Moves messages through a table. `lease` is in seconds, by the server's clock.

    Set `listen_url` if `url` goes through a connection pooler in transaction mode, which has no
    notifications. It is the URL of the same database without the pooler. `schema` is the schema of
    the tables. Raises `ConfigurationError` if an argument is wrong.
    """

    driver_loggers = ("asyncpg",)

    def __init__(
        self,
        url: str,
        *,
        lease: float = 30.0,
        listen_url: str | None = None,
        schema: str = DEFAULT,
    ) -> None:
        self._database = Database(url, listen_url, schema)
        self._lease = LEASE_TIME.checked("lease", lease)
        self._listener = Listener(self._database)
        self._doorbell = Doorbell(self._database)
        self._subscriptions: WeakSet[PostgresSubscription] = WeakSet()
        self._listeners = Listeners()
        self._namespace: str | None = None

    @property
    def guarantees(self) -> Guarantees:
        durability = self._database.durability
        return Guarantees(
            part="PostgresBroker",
            server=durability.server,
            survives=durability.survives,
            durability=durability.settings,
            at_best="machine crash",
            best_settings=BEST_SETTINGS,
            largest=LARGEST,
            lease=self._lease,
            leases_survive=True,
            order="queue",
            counts_deliveries=True,
            atomic_retries=True,
            priorities=True,
            transactions=True,
        )

    async def start(self, namespace: str) -> None:
        await self._database.start(RIGHTS)
        try:
            await self._listener.start()
        except BaseException:
            await self._database.stop()
            raise
        self._namespace = namespace

    async def refresh(self) -> None:
        await self._database.refresh()

    async def stop(self) -> None:
        self._listeners.stop()
        await self._listener.stop()
        try:
            await together([subscription.close() for subscription in self._subscriptions])
        finally:
            self._namespace = None
            await self._doorbell.stop()
            await self._database.stop()

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        namespace = self.started()
        outcomes: list[Outcome] = []
        for batch in batches(messages, encode_message):
            fit = fitting(batch)
            if not fit:
                outcomes.append(Outcome("refused", TOO_LARGE))
                continue
            outcomes += [DONE] * len(fit)
            await self._database.fetch(
                PUBLISH, namespace, *columns_of(fit), transaction=transaction, size=size_of(fit)
            )
            queues = {message.queue for message, _ in fit}
            channels = {self._database.channel_of(namespace, queue) for queue in queues}
            if transaction is None:
                self._doorbell.ring(channels)
            else:
                rings = in_columns((channel, "") for channel in channels)
                await self._database.fetch(RING, *rings, transaction=transaction)
        return outcomes

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        namespace = self.started()
        subscription = PostgresSubscription(
            self._database, self._listener, self._doorbell, namespace, self._lease
        )
        await subscription.open(queues)
        self._subscriptions.add(subscription)
        return subscription

    async def clock(self) -> float | None:
        self.started()
        return await self._database.clock()

    async def depth(self, queue: str) -> QueueDepth:
        (row,) = await self._database.fetch(DEPTH, self.started(), queue)
        return QueueDepth(row["ready"], row["delayed"], row["in_flight"], row["oldest_age"])

    async def purge(self, queue: str) -> int:
        namespace = self.started()
        count, last = 0, (-1, 0)
        while rows := await self._database.fetch(PURGE_READY, namespace, queue, *last):
            count += len(rows)
            last = max((row["priority"], row["id"]) for row in rows)
        many = PURGED
        while many == PURGED:
            many = len(await self._database.fetch(PURGE_WAITING, namespace, queue))
            count += many
        return count

    async def broadcast(self, command: Command) -> None:
        await self._database.fetch(SEND, self._channel_of(COMMANDS), pieces_of(command))

    async def commands(self) -> AsyncIterator[Command]:
        assembly = Assembly()
        async with self._listeners.listening(self._listener, self._channel_of(COMMANDS)) as ear:
            while True:
                payload = await ear.next()
                command = assembly.add(payload) if payload else None
                if command is not None:
                    yield command

    def join(self, storage: Storage) -> Composition | None:
        if isinstance(storage, PostgresStorage) and self.shares_database(storage):
            return PostgresComposition(self, storage, self._database, self.ring)
        return None

    def shares_database(self, storage: Storage) -> bool:
        """Return whether a storage is in the same schema of the same database."""
        return isinstance(storage, PostgresStorage) and (
            storage.database.place == self._database.place
        )

    def ring(self, queues: Iterable[str]) -> None:
        """Wake the receivers of these queues soon."""
        self._doorbell.ring({self._channel_of(queue) for queue in queues})

    def _channel_of(self, name: str) -> str:
        return self._database.channel_of(self.started(), name)

    async def migrate(self, namespace: str) -> list[str]:
        return await self._database.migrate()

    async def migration(self, namespace: str) -> str:
        return await self._database.migration()

    def started(self) -> str:
        """Return the namespace. Raises `Closed`."""
        if self._namespace is None:
            raise Closed("PostgresBroker is not started")
        return self._namespace
