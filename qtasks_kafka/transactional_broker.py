"""A broker on Kafka that replaces and records deliveries in Kafka's transactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks_core import Composition, Guarantees, QueueDepth, Storage
from qtasks_core.errors import Closed, QTasksError
from qtasks_core.schemas import RETRIES_IN_TWO_STEPS
from qtasks_kafka.broker import MOVED_IN_TWO_STEPS, KafkaBroker
from qtasks_kafka.connection import topic_name
from qtasks_kafka.control import depth, workers_group
from qtasks_kafka.log import COMPACTED
from qtasks_kafka.looking import COUNTED
from qtasks_kafka.storage import KafkaStorage

if TYPE_CHECKING:
    from qtasks_kafka.subscription import KafkaSubscription
    from qtasks_kafka.transactions import Submitter
    from qtasks_kafka.writer import Record


class TransactionalKafkaBroker(KafkaBroker):
    """Moves messages as `KafkaBroker` does. A retry replaces its message in one transaction.

    With `KafkaStorage` on the same cluster, by the same user, each step of the pair is one
    transaction: a task's message and its first record, and its result, its acknowledgement and the
    message of its next attempt. With any other storage, results are recorded and acknowledged as
    with `KafkaBroker`, in an order that loses nothing; only retries gain.

    The arguments are those of `KafkaBroker`. All workers of an app use the same one of the two.
    """

    _submitter: Submitter | None = None

    @property
    def guarantees(self) -> Guarantees:
        told = super().guarantees
        ours = (
            "with KafkaStorage on the same cluster, a message and its first record are one "
            "transaction, and so are a result, its acknowledgement and the next attempt's message",
            "a process that dies within a transaction holds up those who read the partitions that "
            "it wrote to: until a worker takes over its own, or until the server aborts it after "
            "6 s, which it looks for every transaction.abort.timed.out.transaction.cleanup.interval"
            ".ms (10 s by default)",
            f"`depth` reads up to {COUNTED} offsets to tell messages from the marks of "
            "transactions; of more it counts the marks too, and `purge` cannot tell how many "
            "messages it dropped",
            MOVED_IN_TWO_STEPS,
        )
        kept = [note for note in told.notes if note not in (RETRIES_IN_TWO_STEPS, *ours)]
        return replace(
            told, part="TransactionalKafkaBroker", atomic_retries=True, notes=(*kept, *ours)
        )

    async def start(self, namespace: str) -> None:
        await super().start(namespace)
        from qtasks_kafka.transactions import Submitter

        name = topic_name(namespace, "client")
        self._submitter = Submitter(self._connection, f"{name}.{uuid7().hex}")

    async def stop(self) -> None:
        submitter, self._submitter = self._submitter, None
        if submitter is not None:
            submitter.stop()
        await super().stop()

    async def _joined(self, topics: Mapping[str, str]) -> KafkaSubscription:
        from qtasks_kafka.transactional_group import TransactionalMembership
        from qtasks_kafka.transactional_subscription import TransactionalSubscription

        group = workers_group(self._namespace)
        member = TransactionalMembership(self._connection, group, topics, self._lease)
        await member.check_rights()
        await member.open()
        self._obey()
        return TransactionalSubscription(self, member, topics, self._subscriptions.discard)

    async def prepare(self, records: Sequence[Record]) -> None:
        """Make sure that the topics of messages exist."""
        await self._ensure_topics(records)

    async def prepare_log(self, topic: str) -> None:
        """Learn how large a record the topic of a log takes."""
        await self._connection.ensure([topic], COMPACTED)

    def refusal(self, record: Record) -> QTasksError | None:
        """Return why a record is larger than its topic takes, as far as that is known."""
        return self._connection.running_writer().refusal(record)

    async def append_together(self, records: Sequence[Record]) -> None:
        """Append records in one transaction. Raises `Unavailable` and `RecordRefused`."""
        if self._submitter is None:
            raise Closed("TransactionalKafkaBroker is not started")
        await self._submitter.commit(records)

    async def depth(self, queue: str) -> QueueDepth:
        self._listening()
        return await depth(self._connection, self._namespace, self.topic(queue), marks=True)

    async def purge(self, queue: str) -> int:
        await super().purge(queue)
        return -1

    def join(self, storage: Storage) -> Composition | None:
        from qtasks_kafka.composition import KafkaComposition

        if isinstance(storage, KafkaStorage) and storage.place == self._connection.place:
            return KafkaComposition(self, self, storage)
        return None
