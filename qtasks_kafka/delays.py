"""Delayed messages: kept in one compacted topic until workers move them to their queues.

Every worker is in a group that shares the partitions of the topic. The owner of a partition keeps
a heap of what waits in it, appends what is due to its queue and then a tombstone to the topic. A
crash in between moves a message twice, never not at all. The clock is the server's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from asyncio import Task
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from aiokafka import ConsumerRebalanceListener
from aiokafka.errors import CommitFailedError, IllegalStateError
from aiokafka.structs import TopicPartition
from uuid_utils import uuid7

from qtasks_core import Raw
from qtasks_core.errors import ConfigurationError, QTasksError
from qtasks_core.wire import decode_message
from qtasks_kafka.connection import (
    LONGEST_PREFIX,
    Connection,
    close_consumer,
    heartbeat_ms,
    is_topic,
    topic_name,
)
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.writer import Record

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import ConsumerRecord

logger = logging.getLogger("qtasks.kafka")

CONFIG = {
    "cleanup.policy": "compact",
    "message.timestamp.type": "LogAppendTime",
    "segment.ms": str(10 * 60 * 1000),
    "min.cleanable.dirty.ratio": "0.1",
}
BATCH = 500
"""How many due messages are moved at once."""
PATIENCE = 1.0
"""Seconds before it is tried again when the server cannot be reached."""
LONGEST_WAIT = 60.0
HELD_UP = 3.0
"""Seconds before a message is tried again that its queue's topic did not take."""
_TOLD = 60.0
"""Seconds between two lines on the same trouble."""
_LOG_APPEND_TIME = 1
_TARGET, _DELAY, _CLOCK = "target", "delay", b"clock"


def delayed_topic(namespace: str) -> str:
    """Return the topic of a namespace's delayed messages."""
    return topic_name(namespace, "delayed")


def delayed_record(topic: str, target: str, value: bytes, delay: float) -> Record:
    """Return the record that keeps a message for `delay` seconds and then moves it to `target`.

    The key is its own: the tombstone of one attempt must not bury the next.
    """
    headers = ((_TARGET, target.encode()), (_DELAY, repr(delay).encode()))
    return Record(topic, value, uuid7().bytes, headers)


class ServerClock:
    """The server's time, never ahead of it: the latest stamp, and what has passed since."""

    def __init__(self) -> None:
        self._offset = float("-inf")

    def saw(self, milliseconds: int) -> None:
        """Learn from a timestamp that the server has set before now."""
        self._offset = max(self._offset, milliseconds / 1000 - time.monotonic())

    def now(self) -> float:
        """Return the Unix time, in seconds."""
        return time.monotonic() + self._offset


class Delayed(NamedTuple):
    """A message that waits, and the topic it goes to."""

    offset: int
    target: str
    value: bytes


class Waiting:
    """What waits in one partition."""

    def __init__(self) -> None:
        self.messages: dict[bytes | int, Delayed] = {}
        """By their records' keys; by its offset what another program wrote without a key."""
        self.end = 0
        """Where the partition ended when it was taken: what is due is known from there on."""
        self.position = 0

    @property
    def watermark(self) -> int:
        """The offset below which nothing waits."""
        return min((delayed.offset for delayed in self.messages.values()), default=self.position)


class DelayMover(ConsumerRebalanceListener):  # type: ignore[misc]
    """Moves what is due, in a task of its own from `start` to `stop`; it outlives the server.

    What another program wrote, and is no message, goes to `queue`, where it becomes a dead letter.
    """

    def __init__(self, connection: Connection, namespace: str, queue: str, lease: float) -> None:
        self._connection = connection
        self._topic = delayed_topic(namespace)
        self._queues = topic_name(namespace, "queue", "")[:LONGEST_PREFIX]
        self._namespace = namespace
        self._queue = topic_name(namespace, "queue", queue)
        self._group = topic_name(namespace, "delays")
        self._lease = lease
        self._clock = ServerClock()
        self._heap: list[tuple[float, int, TopicPartition, bytes | int]] = []
        self._waiting: dict[TopicPartition, Waiting] = {}
        self._new: set[TopicPartition] = set()
        self._moving = asyncio.Lock()
        self._task: Task[None] | None = None
        self._told: dict[str, float] = {}

    def start(self) -> None:
        """Begin to move."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_ended)

    async def stop(self) -> None:
        """Leave the group; another worker goes on."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _run(self) -> None:
        while True:
            try:
                await self._serve()
            except QTasksError as error:
                self._tell(f"delayed messages wait for the server: {error}")
                await asyncio.sleep(PATIENCE)

    async def _serve(self) -> None:
        session = int(self._lease * 1000)
        consumer = self._connection.consumer(
            group_id=self._group,
            session_timeout_ms=session,
            heartbeat_interval_ms=heartbeat_ms(self._lease),
            rebalance_timeout_ms=session + 5000,
            request_timeout_ms=session + 10_000,
            max_poll_interval_ms=2**31 - 1,
        )
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST):
                    await consumer.start()
                consumer.subscribe([self._topic], listener=self)
                while True:
                    await self._read(consumer)
                    await self._take(consumer)
                    await self._move(consumer)
        finally:
            self._forget()
            await close_consumer(consumer)

    # --- what the driver calls -----------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Finish what is being moved, then let go."""
        async with self._moving:
            self._forget()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Note what is ours now."""
        self._forget()
        self._new = set(assigned)

    def _forget(self) -> None:
        self._waiting = {}
        self._heap = []
        self._new = set()

    # --- the loop ------------------------------------------------------------------------------

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """Wait for records, until the next message is due."""
        for tp, records in (await consumer.getmany(timeout_ms=self._wait_ms())).items():
            waiting = self._waiting.get(tp)
            if waiting is None:
                continue  # Read before `_take` has set the position.
            for record in records:
                waiting.position = record.offset + 1
                if record.timestamp_type == _LOG_APPEND_TIME:
                    self._clock.saw(record.timestamp)
                self._note(tp, waiting, record)
        for tp, waiting in self._waiting.items():
            if waiting.position < waiting.end and tp in consumer.assignment():
                # What is left of a compacted end may hold no record.
                waiting.position = max(waiting.position, await consumer.position(tp))

    def _note(self, tp: TopicPartition, waiting: Waiting, record: ConsumerRecord) -> None:
        key = record.offset if record.key is None else record.key
        if record.value is None:
            waiting.messages.pop(key, None)
            return
        delay, target = self._read_headers(record) or self._read_value(record)
        waiting.messages[key] = Delayed(record.offset, target, record.value)
        heappush(self._heap, (record.timestamp / 1000 + delay, record.offset, tp, key))

    def _read_headers(self, record: ConsumerRecord) -> tuple[float, str] | None:
        """Return a message's delay in seconds and the topic of its queue; None: they are not ours.

        Any program may write any headers, and any value of them may be null.
        """
        headers = dict(record.headers)
        try:
            delay, target = float(headers[_DELAY]), headers[_TARGET].decode()
        except (KeyError, ValueError, TypeError, AttributeError):
            return None
        if math.isfinite(delay) and target.startswith(self._queues) and is_topic(target):
            return delay, target
        return None

    def _read_value(self, record: ConsumerRecord) -> tuple[float, str]:
        """Return what the message itself says; what is none goes to be a dead letter at once."""
        logger.error(
            "the record at offset %d of partition %d of %s does not have the headers of a "
            "delayed message; another program may have written it",
            record.offset, record.partition, record.topic,
        )  # fmt: skip
        message = decode_message(record.value)
        if isinstance(message, Raw):
            return 0.0, self._queue
        delay = message.delay if math.isfinite(message.delay) else 0.0
        return delay, topic_name(self._namespace, "queue", message.queue)

    def _wait_ms(self) -> int:
        if self._new:
            return 0
        left = self._heap[0][0] - self._clock.now() if self._heap else LONGEST_WAIT
        return max(1, int(min(left, LONGEST_WAIT) * 1000) + 1)

    async def _take(self, consumer: AIOKafkaConsumer) -> None:
        """Begin with newly assigned partitions where their last owner has left off."""
        if not self._new:
            return
        new = self._new
        async with asyncio.timeout(REQUEST):
            ends = await consumer.end_offsets(new)
            first = await consumer.beginning_offsets(new)
            begin = {tp: await consumer.committed(tp) for tp in new}
            (stamp,) = await self._connection.running_writer().write(
                [Record(self._topic, None, _CLOCK, partition=next(iter(new)).partition)]
            )
        if stamp.refused is not None:
            raise stamp.refused
        self._clock.saw(stamp.timestamp)
        if self._new is not new:
            return
        self._new = set()
        for tp in new:
            waiting = self._waiting[tp] = Waiting()
            waiting.position = max(begin[tp] or 0, first[tp])
            waiting.end = ends[tp]
            consumer.seek(tp, waiting.position)

    async def _move(self, consumer: AIOKafkaConsumer) -> None:
        """Append what is due to its queue, then bury it here."""
        async with self._moving:
            due = self._due()
            if not due:
                return
            try:
                # The group says whether the partitions are ours still, and notes how far we are.
                async with asyncio.timeout(REQUEST):
                    await consumer.commit({tp: self._waiting[tp].watermark for tp, _ in due})
            except (CommitFailedError, IllegalStateError):
                return
            moved = await self._append(due)
            # A record without a key has no tombstone; the next commit passes it.
            await self._connection.running_writer().write(
                [
                    Record(self._topic, None, key, partition=tp.partition)
                    for tp, key in moved
                    if isinstance(key, bytes)
                ]
            )
            for tp, key in moved:
                if tp in self._waiting:
                    self._waiting[tp].messages.pop(key, None)

    async def _append(
        self, due: list[tuple[TopicPartition, bytes | int]]
    ) -> list[tuple[TopicPartition, bytes | int]]:
        """Append messages to their queues, and return which are there; the others wait on.

        A topic may take less than the delayed one, or may not be written by this user: an operator
        can change that, and until then nobody else has the message.
        """
        messages = [self._waiting[tp].messages[key] for tp, key in due]
        refused: dict[str, QTasksError] = {}
        for target in {message.target for message in messages}:
            try:
                await self._connection.ensure([target])
            except ConfigurationError as wrong:
                refused[target] = wrong
        outcomes = [refused.get(message.target) for message in messages]
        sent = [at for at, error in enumerate(outcomes) if error is None]
        written = await self._connection.running_writer().write(
            [Record(messages[at].target, messages[at].value) for at in sent]
        )
        for at, outcome in zip(sent, written, strict=True):
            outcomes[at] = outcome.refused
        again = self._clock.now() + HELD_UP
        for (tp, key), message, error in zip(due, messages, outcomes, strict=True):
            if error is not None:
                self._tell(f"a delayed message waits until {message.target} takes it: {error}")
                heappush(self._heap, (again, message.offset, tp, key))
        return [place for place, error in zip(due, outcomes, strict=True) if error is None]

    def _tell(self, what: str) -> None:
        """Log what holds messages up, unless it was logged within the last minute."""
        now = time.monotonic()
        self._told = {text: at for text, at in self._told.items() if now - at < _TOLD}
        if what not in self._told:
            self._told[what] = now
            logger.warning("%s", what)

    def _due(self) -> list[tuple[TopicPartition, bytes | int]]:
        """Take what is due off the heap, of partitions that are read to their end."""
        now = self._clock.now()
        due: list[tuple[TopicPartition, bytes | int]] = []
        later = []
        while self._heap and self._heap[0][0] <= now and len(due) < BATCH:
            entry = heappop(self._heap)
            waiting = self._waiting.get(entry[2])
            if waiting is None or entry[3] not in waiting.messages:
                continue
            if waiting.messages[entry[3]].offset != entry[1]:
                continue  # Replaced by a later record with its key.
            if waiting.position < waiting.end:
                later.append(entry)
            else:
                due.append((entry[2], entry[3]))
        self._heap += later
        heapify(self._heap)
        return due


def _ended(task: Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("delayed messages are not moved any more", exc_info=error)
