"""A broker on Kafka: a group member has the lease of a partition, a commit finishes a record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
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
from qtasks_core.schemas import RETRIES_IN_TWO_STEPS
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import encode_message
from qtasks_kafka.connection import Connection, topic_name
from qtasks_kafka.control import (
    Listeners,
    Obeying,
    broadcast,
    depth,
    migrated,
    purge,
    workers_group,
)
from qtasks_kafka.settings import LEASE_TIME
from qtasks_kafka.subscription import KafkaSubscription

if TYPE_CHECKING:
    from qtasks_kafka.delays import DelayMover
    from qtasks_kafka.share_subscription import ShareSubscription
    from qtasks_kafka.writer import Record, Written

MOVED_IN_TWO_STEPS = (
    "a delayed message is moved to its queue in two steps: a crash in between delivers it twice"
)


class KafkaBroker(Broker):
    """Moves messages through one topic per queue, at least once. `lease` is in seconds.

    `partitions` and `replicas` apply to topics that do not exist yet. `replicas` defaults to the
    number of the server's brokers, at most three. If there are more workers than partitions, some
    stay idle. Raises `ConfigurationError` if the URL or an option is wrong.
    """

    driver_loggers = ("aiokafka",)

    def __init__(
        self,
        url: str,
        *,
        lease: float = 30.0,
        partitions: int = 8,
        replicas: int | None = None,
    ) -> None:
        self._lease = LEASE_TIME.checked("lease", lease)
        self._connection = Connection(url, partitions=partitions, replicas=replicas)
        self._namespace = ""
        self._mover: DelayMover | None = None
        self._listeners: Listeners | None = None
        self._obeying: Obeying | None = None
        self._subscriptions: set[KafkaSubscription | ShareSubscription] = set()

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="KafkaBroker",
            server="Apache Kafka",
            survives="machine crash",
            durability="acks=all with an idempotent producer; on how many machines say the "
            "topics' replication factor and min.insync.replicas, of one the page cache",
            lease=self._lease,
            largest=self._connection.largest_of_all,
            order="partition",
            notes=(
                "a log has no priorities",
                "a message waits for the worker that has its partition, though another be idle",
                "delivery counts are known only of what was in flight at a commit: with the first "
                "messages of a partition that was taken over, and whenever tasks have ended",
                "when another worker gets a partition in which tasks run, their messages are "
                "copied to a partition that stays: a crash at that moment leaves both",
                "finished records are deleted from their topics while workers run, up to the "
                "group's committed offsets; where the user may not DELETE them, they are "
                "kept, and run again once the server has forgotten the offsets of a group "
                "without workers, after offsets.retention.minutes (7 days by default)",
                RETRIES_IN_TWO_STEPS,
                "`depth` counts what the group knows: a delivered message counts as ready until "
                "the next commit of its partition, a third of the lease later at most",
                "`purge` needs an answer from each worker that has partitions of the queue; it "
                "deletes what is in the other partitions, and needs the right to DELETE the topic",
                MOVED_IN_TWO_STEPS,
            ),
            advice=self._connection.advice,
        )

    async def start(self, namespace: str) -> None:
        self._namespace = namespace
        await self._connection.start()
        if self._listeners is not None:
            await self._listeners.stop()
        self._listeners = Listeners(self._connection, namespace)

    async def stop(self) -> None:
        try:
            await together([subscription.leave() for subscription in self._subscriptions])
        finally:
            mover, self._mover = self._mover, None
            obeying, self._obeying = self._obeying, None
            listeners, self._listeners = self._listeners, None
            running = [each for each in (mover, obeying, listeners) if each is not None]
            await together([each.stop() for each in running])
            await self._connection.stop()

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        return await self.append([self.record(message) for message in messages])

    def record(self, message: TaskMessage) -> Record:
        """Return the record that carries a message to its queue, now or after its delay."""
        from qtasks_kafka.delays import delayed_record, delayed_topic
        from qtasks_kafka.writer import Record

        topic, value = self.topic(message.queue), encode_message(message)
        if message.delay > 0:
            return delayed_record(delayed_topic(self._namespace), topic, value, message.delay)
        return Record(topic, value)

    async def append(self, records: Sequence[Record]) -> list[Outcome]:
        """Append records. They are durable when the call returns."""
        writer = self._connection.running_writer()
        await self._ensure_topics(records)
        written = await writer.write(records)
        return [DONE if w.refused is None else Outcome("refused", str(w.refused)) for w in written]

    async def copy(self, records: Sequence[Record]) -> list[Written]:
        """Append copies of records to the topics that they are in."""
        return await self._connection.running_writer().write(records)

    async def _ensure_topics(self, records: Sequence[Record]) -> None:
        """Make sure that the topics of messages exist."""
        await self._connection.ensure(list({r.topic for r in records if not r.headers}))
        if any(record.headers for record in records):
            await self._ensure_delayed()

    async def _ensure_delayed(self) -> None:
        from qtasks_kafka.delays import CONFIG, delayed_topic

        await self._connection.ensure([delayed_topic(self._namespace)], CONFIG)

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        from qtasks_kafka.delays import DelayMover

        topics = {self.topic(queue): queue for queue in queues}
        await self._connection.ensure(list(topics))
        await self._ensure_delayed()
        subscription = await self._joined(topics)
        if self._mover is None:
            queue = next(iter(queues))
            self._mover = DelayMover(self._connection, self._namespace, queue, self._lease)
            self._mover.start()
        self._subscriptions.add(subscription)
        return subscription

    async def _joined(self, topics: Mapping[str, str]) -> KafkaSubscription | ShareSubscription:
        """Join the group of the workers, and obey what is said to them."""
        from qtasks_kafka.group import Membership

        group = workers_group(self._namespace)
        member = Membership(self._connection, group, topics, self._lease)
        await member.open()
        self._obey()
        return KafkaSubscription(self, member, topics, self._subscriptions.discard)

    def _obey(self) -> None:
        if self._obeying is None:
            self._obeying = Obeying(self._listening(), self._drop)

    async def depth(self, queue: str) -> QueueDepth:
        self._listening()
        await self._connection.look(self.topic(queue))
        return await depth(self._connection, self._namespace, self.topic(queue))

    async def purge(self, queue: str) -> int:
        listeners = self._listening()
        return await purge(self._connection, listeners, self._namespace, self.topic(queue))

    async def broadcast(self, command: Command) -> None:
        await broadcast(self._listening(), command)

    def commands(self) -> AsyncIterator[Command]:
        return self._listening().follow()

    async def migrate(self, namespace: str) -> list[str]:
        return await migrated(self._connection.another(), namespace)

    def _listening(self) -> Listeners:
        if self._listeners is None:
            raise Closed("KafkaBroker is not started")
        return self._listeners

    async def _drop(self, topic: str, ends: Mapping[int, int]) -> dict[int, int]:
        """Drop undelivered records in the partitions of all subscriptions here."""
        dropped: dict[int, int] = {}
        for subscription in list(self._subscriptions):
            if isinstance(subscription, KafkaSubscription):
                with suppress(Closed):  # it has just left the group
                    dropped |= await subscription.drop(topic, ends)
        return dropped

    def topic(self, queue: str) -> str:
        """Return the topic of a queue."""
        return topic_name(self._namespace, "queue", queue)
