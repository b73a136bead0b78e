"""Delayed messages: kept in one compacted topic until workers move them to their queues.

Every worker is in a group that shares the partitions of the topic. The owner of a partition keeps
a heap of what waits in it, appends what is due to its queue and then a tombstone to the topic. A
crash in between moves a message twice, never not at all. The clock is the server's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import Task
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from aiokafka import ConsumerRebalanceListener
from aiokafka.errors import CommitFailedError, IllegalStateError
from aiokafka.structs import TopicPartition
from uuid_utils import uuid7

from qtasks_core.errors import QTasksError, Unavailable
from qtasks_kafka.connection import REQUEST, Connection, close_consumer, heartbeat_ms, topic_name
from qtasks_kafka.writer import Record

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import ConsumerRecord

logger = logging.getLogger(__name__)

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


class Waiting:
    """What waits in one partition."""

    def __init__(self) -> None:
        self.messages: dict[bytes, ConsumerRecord] = {}
        self.end = 0
        """Where the partition ended when it was taken: what is due is known from there on."""
        self.position = 0

    @property
    def watermark(self) -> int:
        """The offset below which nothing waits."""
        return min((record.offset for record in self.messages.values()), default=self.position)


class DelayMover(ConsumerRebalanceListener):  # type: ignore[misc]
    """Moves what is due, in a task of its own from `start` to `stop`; it outlives the server."""

    def __init__(self, connection: Connection, namespace: str, lease: float) -> None:
        self._connection = connection
        self._topic = delayed_topic(namespace)
        self._group = topic_name(namespace, "delays")
        self._lease = lease
        self._clock = ServerClock()
        self._heap: list[tuple[float, int, TopicPartition, bytes]] = []
        self._waiting: dict[TopicPartition, Waiting] = {}
        self._new: set[TopicPartition] = set()
        self._moving = asyncio.Lock()
        self._task: Task[None] | None = None

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
                logger.warning("delayed messages wait for the server: %s", error)
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
                self._clock.saw(record.timestamp)
                self._note(tp, waiting, record)
        for tp, waiting in self._waiting.items():
            if waiting.position < waiting.end and tp in consumer.assignment():
                # What is left of a compacted end may hold no record.
                waiting.position = max(waiting.position, await consumer.position(tp))

    def _note(self, tp: TopicPartition, waiting: Waiting, record: ConsumerRecord) -> None:
        if record.value is None:
            waiting.messages.pop(record.key, None)
            return
        headers = dict(record.headers)
        try:
            due = record.timestamp / 1000 + float(headers[_DELAY])
            headers[_TARGET].decode()
        except (KeyError, ValueError):
            logger.warning("a record in %s is no delayed message, it stays", self._topic)
            return
        waiting.messages[record.key] = record
        heappush(self._heap, (due, record.offset, tp, record.key))

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
            assert self._connection.writer is not None
            stamp = await self._connection.writer.write(
                [Record(self._topic, None, _CLOCK, partition=next(iter(new)).partition)]
            )
        self._clock.saw(stamp[0].timestamp)
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
            records = [self._waiting[tp].messages[key] for tp, key in due]
            targets = [dict(record.headers)[_TARGET].decode() for record in records]
            writer = self._connection.writer
            if writer is None:
                raise Unavailable("the broker is stopped")
            await self._connection.ensure(list(set(targets)))
            written = await writer.write(
                [Record(t, record.value) for t, record in zip(targets, records, strict=True)]
            )
            for record, outcome in zip(records, written, strict=True):
                if outcome.refused is not None:
                    logger.error("a delayed message for %s is lost: %s", record, outcome.refused)
            await writer.write(
                [Record(self._topic, None, key, partition=tp.partition) for tp, key in due]
            )
            for tp, key in due:
                if tp in self._waiting:
                    self._waiting[tp].messages.pop(key, None)

    def _due(self) -> list[tuple[TopicPartition, bytes]]:
        """Take what is due off the heap, of partitions that are read to their end."""
        now = self._clock.now()
        due: list[tuple[TopicPartition, bytes]] = []
        later = []
        while self._heap and self._heap[0][0] <= now and len(due) < BATCH:
            entry = heappop(self._heap)
            waiting = self._waiting.get(entry[2])
            if waiting is None or entry[3] not in waiting.messages:
                continue
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
