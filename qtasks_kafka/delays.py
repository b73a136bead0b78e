"""Delayed messages: one compacted topic keeps them until workers move them to their queues.

Every worker is in a group that shares the topic's partitions. The owner of a partition keeps a heap
of its waiting messages. It appends each due message to its queue, and then a tombstone to the
topic. After a crash in between, the message is moved twice, but it is never lost. The clock is the
server's.
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
    GROWTH_MS,
    LONGEST_PREFIX,
    PAUSE,
    Connection,
    close_consumer,
    drop_abandoned,
    heartbeat_ms,
    is_topic,
    long_poll_ms,
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
"""How many due messages are moved together."""
PATIENCE = 1.0
"""Seconds before the next attempt if the server is unreachable."""
LONGEST_WAIT = 60.0
HELD_UP = 3.0
"""Seconds before the next attempt to move a message that its queue's topic refused."""
_TOLD = 60.0
"""Seconds before the same problem is logged again."""
_LOG_APPEND_TIME = 1
_TARGET, _DELAY, _CLOCK = "target", "delay", b"clock"


def delayed_topic(namespace: str) -> str:
    """Return the topic of a namespace's delayed messages."""
    return topic_name(namespace, "delayed")


def delayed_record(topic: str, target: str, value: bytes, delay: float) -> Record:
    """Return the record that keeps a message for `delay` seconds and then moves it to `target`.

    Each record has its own key, so the tombstone of one attempt cannot delete the next attempt.
    """
    headers = ((_TARGET, target.encode()), (_DELAY, repr(delay).encode()))
    return Record(topic, value, uuid7().bytes, headers)


def target_of(record: ConsumerRecord) -> str:
    """Return the topic that a delayed message waits for; empty if its headers do not say it."""
    target = dict(record.headers).get(_TARGET)
    return target.decode(errors="replace") if isinstance(target, bytes) else ""


class ServerClock:
    """The server's time, never ahead of it: the latest timestamp plus the time since then."""

    def __init__(self) -> None:
        self._offset = float("-inf")

    def saw(self, milliseconds: int) -> None:
        """Learn from a timestamp that the server has already set."""
        self._offset = max(self._offset, milliseconds / 1000 - time.monotonic())

    def now(self) -> float:
        """Return the Unix time, in seconds."""
        return time.monotonic() + self._offset


class Delayed(NamedTuple):
    """A waiting message and its target topic."""

    offset: int
    target: str
    value: bytes


class Waiting:
    """The waiting messages of one partition."""

    def __init__(self) -> None:
        self.messages: dict[bytes | int, Delayed] = {}
        """Waiting messages by their record's key, or by its offset if it has no key.

        Only other programs write records without a key.
        """
        self.end = 0
        """The partition's end at its takeover. After reading up to it, due messages are known."""
        self.position = 0

    @property
    def watermark(self) -> int:
        """The offset below which no message waits."""
        return min((delayed.offset for delayed in self.messages.values()), default=self.position)


class DelayMover(ConsumerRebalanceListener):  # type: ignore[misc]
    """Moves due messages, in its own task from `start` to `stop`.

    The task survives outages of the server. Another program may have written a record that is not a
    message. It goes to `queue` and becomes a dead letter there.
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
        self._consumer: AIOKafkaConsumer | None = None
        self._assigned = asyncio.Event()
        self._moving = asyncio.Lock()
        self._task: Task[None] | None = None
        self._told: dict[str, float] = {}

    def start(self) -> None:
        """Start to move messages."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_ended)

    async def stop(self) -> None:
        """Leave the group. Another worker continues."""
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
            heartbeat_interval_ms=heartbeat_ms(self._lease, 3.0),
            metadata_max_age_ms=GROWTH_MS,
            rebalance_timeout_ms=session + 5000,
            request_timeout_ms=session + 10_000,
            max_poll_interval_ms=2**31 - 1,
            fetch_max_wait_ms=long_poll_ms(self._lease),
        )
        self._consumer = consumer
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

    # --- called by the driver ------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Finish the current move, then release the partitions."""
        async with self._moving:
            self._forget()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Note the partitions that are ours now."""
        self._forget()
        self._new = set(assigned)
        if self._consumer is not None:
            # Not before `_take` knows where to begin, and not on the connection that it uses.
            self._consumer.pause(*self._new)
        self._assigned.set()

    def _forget(self) -> None:
        self._waiting = {}
        self._heap = []
        self._new = set()

    # --- the loop ------------------------------------------------------------------------------

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """Wait for records, until the next message is due or partitions are assigned."""
        self._assigned.clear()
        getting = asyncio.create_task(consumer.getmany(timeout_ms=self._wait_ms()))
        assigned = asyncio.create_task(self._assigned.wait())
        try:
            await asyncio.wait({getting, assigned}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            getting.cancel()  # it takes no record before it returns
            assigned.cancel()
            await asyncio.wait({getting, assigned})
        if getting.cancelled():
            return
        for tp, records in getting.result().items():
            waiting = self._waiting.get(tp)
            if waiting is None:
                continue  # read before `_take` has set the position
            for record in records:
                waiting.position = record.offset + 1
                if record.timestamp_type == _LOG_APPEND_TIME:
                    self._clock.saw(record.timestamp)
                self._note(tp, waiting, record)
        for tp, waiting in self._waiting.items():
            if waiting.position < waiting.end and tp in consumer.assignment():
                # The rest of a compacted topic may hold no record.
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
        """Return a message's delay in seconds and its queue's topic; None for foreign headers.

        Any program may write any headers, and any value may be null.
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
        """Return the delay and the topic that the message itself contains.

        If the record is no message, the delay is zero and the topic is that of `queue`. It becomes
        a dead letter there.
        """
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
        if any(waiting.position < waiting.end for waiting in self._waiting.values()):
            left = max(left, PAUSE)  # what is due waits for the rest
        return max(1, int(min(left, LONGEST_WAIT) * 1000) + 1)

    async def _take(self, consumer: AIOKafkaConsumer) -> None:
        """Start with newly assigned partitions where their last owner stopped."""
        if not self._new:
            return
        new = self._new
        drop_abandoned(consumer)
        async with asyncio.timeout(REQUEST):
            first = await consumer.beginning_offsets(new)
            begin = {tp: await consumer.committed(tp) for tp in new}
            # They tell the time, and the ends. Reading to the last committed record would not do:
            # a tombstone may be behind an open transaction, and its message would be moved again.
            stamps = await self._connection.running_writer().write(
                [Record(self._topic, None, _CLOCK, partition=tp.partition) for tp in new]
            )
        for stamp in stamps:
            if stamp.refused is not None:
                raise stamp.refused
            self._clock.saw(stamp.timestamp)
        ends = {tp: stamp.offset for tp, stamp in zip(new, stamps, strict=True)}
        if self._new is not new:
            return
        self._new = set()
        for tp in new:
            waiting = self._waiting[tp] = Waiting()
            waiting.position = max(begin[tp] or 0, first[tp])
            waiting.end = ends[tp]
            consumer.seek(tp, waiting.position)
        consumer.resume(*new)

    async def _move(self, consumer: AIOKafkaConsumer) -> None:
        """Append due messages to their queues, then their tombstones to this topic."""
        async with self._moving:
            due = self._due()
            if not due:
                return
            try:
                # The commit checks that the partitions are still ours, and saves the position.
                async with asyncio.timeout(REQUEST):
                    await consumer.commit({tp: self._waiting[tp].watermark for tp, _ in due})
            except (CommitFailedError, IllegalStateError):
                return
            moved = await self._append(due)
            # A record without a key has no tombstone. The next commit passes it.
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
        """Append messages to their queues, and return the appended ones. The others keep waiting.

        A queue's topic may have a lower limit than the delayed one, or this user may not write to
        it. An operator can change that. Until then, this topic has the only copy of the message.
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
        """Log a problem that delays messages, unless it was logged within the last minute."""
        now = time.monotonic()
        self._told = {text: at for text, at in self._told.items() if now - at < _TOLD}
        if what not in self._told:
            self._told[what] = now
            logger.warning("%s", what)

    def _due(self) -> list[tuple[TopicPartition, bytes | int]]:
        """Take due messages off the heap. Their partitions must be read up to `end`."""
        now = self._clock.now()
        due: list[tuple[TopicPartition, bytes | int]] = []
        later = []
        while self._heap and self._heap[0][0] <= now and len(due) < BATCH:
            entry = heappop(self._heap)
            waiting = self._waiting.get(entry[2])
            if waiting is None or entry[3] not in waiting.messages:
                continue
            if waiting.messages[entry[3]].offset != entry[1]:
                continue  # a later record with its key has replaced it
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
