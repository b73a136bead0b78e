"""A broker that enqueues in a transaction of Postgres, and moves messages through another broker.

It is the pattern "transactional outbox" (https://microservices.io/patterns/data/transactional-outbox.html):
a message is written to the database together with the data that it is about, and carried on after
the commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress

from msgspec.structs import replace

from qtasks_core import (
    Ack,
    Broker,
    Command,
    Completion,
    Composition,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Raw,
    Release,
    Retry,
    Settlement,
    Storage,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import Closed, ConfigurationError, NotSupported, QTasksError, Unavailable
from qtasks_core.lookup import resolve_broker
from qtasks_core.names import checked_name
from qtasks_core.records import record_of, taken
from qtasks_core.schemas import EVENTS
from qtasks_core.separate import compose
from qtasks_core.together import together
from qtasks_core.wire import decode_message, encode_message
from qtasks_postgres.broker import PostgresBroker

logger = logging.getLogger("qtasks.postgres")

QUEUE = "outbox"
"""The queue of the outbox, in a namespace of its own."""
_BATCH = 200
_SHORTEST, _LONGEST = 0.1, 5.0
"""Seconds between attempts to carry messages on."""
_REFUSED_AGAIN = 60.0
"""Seconds after which a message is carried on again that the other broker has refused."""
_NOTE = (
    "what is enqueued in a transaction is carried on after its commit, at least once: a crash in "
    "between may leave two messages with one uuid, and the order is not kept"
)


class OutboxBroker(Broker):
    """Takes messages in the caller's transaction, and moves them through another broker.

        broker = OutboxBroker("postgresql://localhost/shop", "redis://localhost")
        app = QueueTasks("shop", broker, "postgresql://localhost/shop")

        async with connection.transaction():
            await connection.execute("INSERT INTO orders …")
            await send.call(order).add_task(transaction=connection)

    Messages without `transaction=` go to the other broker at once. Every process that has started
    this broker carries messages on; one of them does it for each message. `outbox` is a broker or
    a URL of Postgres, `broker` any broker or URL. `name` is that of the outbox: two outboxes of one
    app in one database, which lead to different brokers, need different names. Raises
    `ConfigurationError`.
    """

    def __init__(
        self, outbox: PostgresBroker | str, broker: Broker | str, *, name: str = QUEUE
    ) -> None:
        part = resolve_broker(outbox) if isinstance(outbox, str) else outbox
        if not isinstance(part, PostgresBroker):
            raise ConfigurationError(
                f"the outbox is a {type(part).__name__}: give a PostgresBroker or postgresql://…"
            )
        self.outbox = part
        self._name = checked_name(name, "an outbox")
        self._inner = resolve_broker(broker) if isinstance(broker, str) else broker
        self.driver_loggers = (*self.outbox.driver_loggers, *self._inner.driver_loggers)
        self._carrying: asyncio.Task[None] | None = None

    @property
    def guarantees(self) -> Guarantees:
        """What the other broker promises; what went through the outbox must survive in both."""
        told, outbox = self._inner.guarantees, self.outbox.guarantees
        return replace(
            told,
            part=type(self).__name__,
            server=f"{told.server}; {outbox.server}",
            survives=min(told.survives, outbox.survives, key=EVENTS.index),
            durability=f"{told.part}: {told.durability}; {outbox.part}: {outbox.durability}",
            order="none",
            largest=min(each.largest for each in (told, outbox) if each.largest is not None),
            transactions=True,
            notes=(*told.notes, _NOTE),
            advice=(*told.advice, *(f"{outbox.part}: {line}" for line in outbox.advice)),
        )

    async def start(self, namespace: str) -> None:
        await self._inner.start(namespace)
        try:
            await self.outbox.start(f"{namespace}.{self._name}")
        except BaseException:
            await self._inner.stop()
            raise
        self._carrying = asyncio.create_task(self._carry())

    async def stop(self) -> None:
        carrying, self._carrying = self._carrying, None
        if carrying is not None:
            carrying.cancel()
            await asyncio.wait({carrying})
        await together([self.outbox.stop(), self._inner.stop()])

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is None:
            return await self._inner.publish(messages)
        return await self.outbox.publish([_wrapped(each) for each in messages], transaction)

    async def waiting(self) -> int:
        """Return how many messages are in the outbox. Raises `Unavailable`."""
        depth = await self.outbox.depth(QUEUE)
        return (depth.ready or 0) + (depth.delayed or 0) + (depth.in_flight or 0)

    async def _carry(self) -> None:
        """Carry messages on until the broker is stopped."""
        pause = _SHORTEST
        failing = False
        while True:
            try:
                subscription = await self.outbox.subscribe({QUEUE: _BATCH})
                try:
                    while True:
                        deliveries = await subscription.receive({QUEUE: _BATCH}, _BATCH)
                        await self._pass_on(subscription, deliveries)
                        if failing:
                            logger.warning("the outbox is carried on again")
                        pause, failing = _SHORTEST, False
                finally:
                    with suppress(QTasksError):  # else a cancel would be forgotten
                        await subscription.close()
            except Exception as error:  # noqa: BLE001  # else nothing would be carried on any more
                if not failing:
                    told = error if isinstance(error, QTasksError) else repr(error)
                    logger.warning("the outbox is not carried on; trying again: %s", told)
                failing = True
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    async def _pass_on(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
        """Publish messages at the other broker, then delete them here."""
        wrapped = [(each, _unwrapped(each.message)) for each in deliveries]
        known = [(each, message) for each, message in wrapped if message is not None]
        try:
            outcomes = await self._publish([message for _, message in known])
        except BaseException:
            with suppress(QTasksError):  # the leases end by themselves
                await subscription.settle([Release(each) for each in deliveries])
            raise
        ends: list[Settlement] = []
        for (delivery, message), outcome in zip(known, outcomes, strict=True):
            match outcome.status:
                case "done":
                    ends.append(Ack(delivery))
                case "refused":
                    logger.error(
                        "%s has refused the message of task %s, which stays in the outbox: %s",
                        self._inner.guarantees.part, message.uuid, outcome.reason,
                    )  # fmt: skip
                    ends.append(Retry(delivery, replace(_wrapped(message), delay=_REFUSED_AGAIN)))
                case _:
                    ends.append(Release(delivery))
        await subscription.settle(ends)
        if unknown := [each.reason for each in outcomes if each.status == "unknown"]:
            raise Unavailable(unknown[0] or "the other broker has not confirmed a message")

    async def _publish(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish at the other broker. A message for which that raises an error is refused."""
        if not messages:
            return []
        try:
            return await self._inner.publish(messages)
        except (Unavailable, Closed):
            raise
        except QTasksError as error:
            if len(messages) == 1:
                return [Outcome("refused", str(error))]
        return [outcome for each in messages for outcome in await self._publish([each])]

    def join(self, storage: Storage) -> Composition:
        return OutboxComposition(self, compose(self._inner, storage), storage)

    # --- the other broker's --------------------------------------------------------------------

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        return await self._inner.subscribe(queues)

    async def clock(self) -> float | None:
        return await self._inner.clock()

    async def refresh(self) -> None:
        await together([self._inner.refresh(), self.outbox.refresh()])

    async def depth(self, queue: str) -> QueueDepth:
        return await self._inner.depth(queue)

    async def purge(self, queue: str) -> int:
        return await self._inner.purge(queue)

    async def broadcast(self, command: Command) -> None:
        await self._inner.broadcast(command)

    def commands(self) -> AsyncIterator[Command]:
        return self._inner.commands()

    async def migrate(self, namespace: str) -> list[str]:
        inner = await self._inner.migrate(namespace)
        return inner + await self.outbox.migrate(f"{namespace}.{self._name}")


class OutboxComposition(Composition):
    """That of the other broker, but a submit in a transaction goes through the outbox.

    If the storage is Postgres in the same database, the record is part of the transaction too.
    Otherwise the task has no record until a worker begins it.
    """

    def __init__(self, broker: OutboxBroker, inner: Composition, storage: Storage) -> None:
        self._broker = broker
        self._inner = inner
        self._storage = storage

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is None:
            return await self._inner.submit(messages)
        if not self._broker.outbox.shares_database(self._storage):
            if any(message.submission for message in messages):
                raise NotSupported(
                    "key= and transaction= together need the storage in the database of the outbox"
                )
            return await self._broker.publish(messages, transaction)
        saved = await self._storage.save([record_of(each) for each in messages], transaction)
        outcomes = [
            taken(outcome.current) if outcome.status == "refused" and outcome.current else outcome
            for outcome in saved
        ]
        fresh = [at for at, outcome in enumerate(outcomes) if outcome.status == "done"]
        published = await self._broker.publish([messages[at] for at in fresh], transaction)
        for at, outcome in zip(fresh, published, strict=True):
            outcomes[at] = outcome
        return outcomes

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        return await self._inner.admit(deliveries)

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        return await self._inner.complete(subscription, completions)


def _wrapped(message: TaskMessage) -> TaskMessage:
    """Return the message of the outbox that carries a message, once its delay is over."""
    return TaskMessage(
        uuid=message.uuid,
        task_name=QUEUE,
        queue=QUEUE,
        args=encode_message(replace(message, delay=0.0)),
        delay=message.delay,
        created_at=message.created_at,
    )


def _unwrapped(message: TaskMessage | Raw) -> TaskMessage | None:
    """Return the message that is carried.

    None if it cannot be read: perhaps a later release wrote it, and can. Its lease hides it.
    """
    inner = message if isinstance(message, Raw) else decode_message(message.args)
    if isinstance(inner, Raw):
        logger.error("a message stays in the outbox, since it cannot be read: %s", inner.error)
        return None
    return inner
