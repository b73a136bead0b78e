"""A broker on a share group of Kafka: the server locks and counts each record on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from qtasks_core import Guarantees, QueueDepth
from qtasks_core.schemas import RETRIES_IN_TWO_STEPS
from qtasks_kafka.broker import MOVED_IN_TWO_STEPS, KafkaBroker
from qtasks_kafka.control import delayed_keys, drop_delayed, workers_group

if TYPE_CHECKING:
    from qtasks_kafka.share_subscription import ShareSubscription


class ShareGroupKafkaBroker(KafkaBroker):
    """Moves messages through one topic per queue, at least once. Experimental. Needs Kafka 4.2.

    Any worker gets any message, however many workers and partitions there are, and a slow task
    holds back nobody. `lease` is in seconds. It must not be shorter than the server's
    `group.share.min.record.lock.duration.ms` (15 s by default). `partitions` and `replicas` are
    those of `KafkaBroker`. All workers of an app use the same one of the two brokers.
    """

    @property
    def guarantees(self) -> Guarantees:
        return replace(
            super().guarantees,
            part="ShareGroupKafkaBroker",
            server="Apache Kafka 4.2 or newer",
            counts_deliveries=True,
            notes=(
                "experimental",
                "a log has no priorities",
                "an unfinished task lets at most share.partition.max.record.locks later messages "
                "of its partition pass (up to 4,000 where the server allows that)",
                "a record is replaced by a copy at its third delivery, before the server's limit "
                "of deliveries (share.delivery.count.limit, 5 by default) archives it",
                "if the connection breaks before the server has answered a settle, the first call "
                "raises `Unavailable`, and its repeat is `unknown`",
                "a crash of the server forgets the deliveries that were in flight, so they are not "
                "counted",
                "the shortest lease of all workers that have ever subscribed is the time after "
                "which the server gives the messages of a frozen worker to others",
                "an acknowledgement takes up to 0.1 s while the same worker waits for messages",
                "finished records are deleted from their topics while workers run, up to the "
                "first unfinished one of each partition; where the user may not DELETE them, "
                "they are kept",
                RETRIES_IN_TWO_STEPS,
                "`depth` cannot tell ready messages from those in flight while workers run",
                "`purge` takes messages as a worker does: what another one gives back meanwhile "
                "may stay",
                MOVED_IN_TWO_STEPS,
            ),
        )

    async def _joined(self, topics: Mapping[str, str]) -> ShareSubscription:
        from qtasks_kafka.share_group import ShareGroup
        from qtasks_kafka.share_subscription import ShareSubscription

        name = workers_group(self._namespace)
        group = ShareGroup(self._connection, name, list(topics), self._lease)
        try:
            await group.open()
        except BaseException:
            await group.close()
            raise
        return ShareSubscription(self, self._connection, group, topics, self._subscriptions.discard)

    async def depth(self, queue: str) -> QueueDepth:
        from qtasks_kafka.share_group import has_members, unfinished

        self._listening()
        topic, group = self.topic(queue), workers_group(self._namespace)
        await self._connection.look(topic)
        waiting = await delayed_keys(self._connection, self._namespace, topic)
        delayed = sum(map(len, waiting.values()))
        count = await unfinished(self._connection, group, topic)
        if count and await has_members(self._connection, group):
            return QueueDepth(delayed=delayed)
        return QueueDepth(ready=count, delayed=delayed, in_flight=0)

    async def purge(self, queue: str) -> int:
        from qtasks_kafka.share_group import taken_away

        self._listening()
        topic = self.topic(queue)
        dropped = await drop_delayed(self._connection, self._namespace, topic)
        group = workers_group(self._namespace)
        return dropped + await taken_away(self._connection, group, topic, self._lease)

    async def migrate(self, namespace: str) -> list[str]:
        from qtasks_kafka.share_group import configured

        done = await super().migrate(namespace)
        connection, group = self._connection.another(), workers_group(namespace)
        await connection.start()
        try:
            settings = (await configured(connection, group, self._lease)).changed
        finally:
            await connection.stop()
        return done + [f"group {group}: {setting}" for setting in settings]
