"""A broker in SQLite: one table of messages, with leases in columns. Doorbells wake receivers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qtasks_core import (
    DONE,
    Broker,
    Command,
    Guarantees,
    Outcome,
    QueueDepth,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed
from qtasks_core.options import LEASE_TIME
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import encode_message
from qtasks_sqlite.composition import SqliteComposition
from qtasks_sqlite.connection import (
    Database,
    Transaction,
    connect,
    disconnect,
    migrated,
    with_server,
)
from qtasks_sqlite.control import Heard, counting, purging, sending
from qtasks_sqlite.listening import Listeners
from qtasks_sqlite.options import Synchronous, durability, path_of
from qtasks_sqlite.storage import SqliteStorage
from qtasks_sqlite.subscription import SqliteSubscription

if TYPE_CHECKING:
    from qtasks_core.contracts.composition import Composition
    from qtasks_core.contracts.storage import Storage

_INTO = "INTO qtasks_messages (queue, priority, wake_at, holder, count, data, ready_at)"


class SqliteBroker(Broker):
    """Moves messages between the processes of one machine.

    `lease` is in seconds. `synchronous="full"` survives a crash of the machine.
    """

    def __init__(
        self, url: str, *, lease: float = 30.0, synchronous: Synchronous = "normal"
    ) -> None:
        self.path = path_of(url)
        self.lease = LEASE_TIME.checked("lease", lease)
        self.synchronous = synchronous
        self._database: Database | None = None
        self._namespace = 0
        self._subscriptions: set[SqliteSubscription] = set()
        self._listeners = Listeners()
        survives, words = durability(synchronous)
        self._guarantees = Guarantees(
            part="SqliteBroker",
            survives=survives,
            durability=words,
            at_best="machine crash",
            best_settings="?synchronous=full",
            lease=self.lease,
            leases_survive=True,
            order="queue",
            counts_deliveries=True,
            atomic_retries=True,
            priorities=True,
            notes=(
                "delays and leases follow the machine's clock: when it is set, they shift by it",
                "a process that is frozen in the middle of a commit holds up all others",
            ),
        )

    @property
    def guarantees(self) -> Guarantees:
        return self._guarantees

    async def start(self, namespace: str) -> None:
        if self._database is None:
            self._database = await connect(self.path, self.synchronous)
        self._namespace = await self._database.write(lambda turn: turn.namespace(namespace))
        self._guarantees = with_server(self._guarantees)

    async def stop(self) -> None:
        try:
            await together([subscription.close() for subscription in self._subscriptions])
        finally:
            self._listeners.stop()
            database, self._database = self._database, None
            if database is not None:
                await disconnect(database)

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        await self.started().write(self.publishing(messages))
        return [DONE] * len(messages)

    def publishing(self, messages: Sequence[TaskMessage]) -> Callable[[Transaction], None]:
        """Return the work that inserts these messages."""
        encoded = [encode_message(message) for message in messages]

        def publish(turn: Transaction) -> None:
            now = time.time()
            rows = []
            for message, data in zip(messages, encoded, strict=True):
                queue = turn.queue(self._namespace, message.queue)
                turn.rung_queues.add(queue)
                due = now + message.delay if message.delay > 0 else None
                rows.append((queue, message.priority, due, 0, 0, data, due or now))
            turn.insert(_INTO, rows)

        return publish

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        subscription = SqliteSubscription(self, self.started(), self._subscriptions.discard)
        self._subscriptions.add(subscription)
        return subscription

    async def depth(self, queue: str) -> QueueDepth:
        return await self.started().read(counting(self._namespace, queue))

    async def purge(self, queue: str) -> int:
        database = self.started()
        count, all_of_them = 0, False
        while not all_of_them:
            some, all_of_them = await database.write(purging(self._namespace, queue))
            count += some
        return count

    async def broadcast(self, command: Command) -> None:
        await self.started().write(sending(self._namespace, command))

    def commands(self) -> AsyncIterator[Command]:
        heard = Heard(self._namespace)
        return self._listeners.follow(self.started(), heard.number, heard.look)

    async def migrate(self, namespace: str) -> list[str]:
        return await migrated(self.path, self.synchronous, namespace)

    def join(self, storage: Storage) -> Composition | None:
        if (
            isinstance(storage, SqliteStorage)
            and storage.path == self.path
            and storage.synchronous == self.synchronous
        ):
            return SqliteComposition(self, storage, self.publishing, self.started)
        return None

    def started(self) -> Database:
        """Return the database. Raises `Closed`."""
        if self._database is None:
            raise Closed("SqliteBroker is not started")
        return self._database

    def number(self, turn: Transaction, queue: str) -> int:
        """Return the number of a queue of this namespace."""
        return turn.queue(self._namespace, queue)
