"""A member of a consumer group that always knows which partitions it still owns.

aiokafka revokes all partitions at each rebalance and forgets positions. Here a partition that comes
back keeps its records in flight. Each owner writes its name into the metadata of its commits, from
the takeover on. The name shows that nobody else had the partition in between.

A rebalance does not wait for records in flight, so a long task stops no other worker. Their
partitions stay here, and the assignment says which of them this member owes to another one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import Future
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from aiokafka import ConsumerRebalanceListener
from aiokafka.errors import (
    IllegalGenerationError,
    KafkaError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from uuid_utils import uuid7

from qtasks_core.errors import Closed, QTasksError, Unavailable
from qtasks_kafka.assignor import Holdings, KeepingAssignor, Places
from qtasks_kafka.connection import (
    GROWTH_MS,
    LONG_POLL_MS,
    PAUSE,
    Connection,
    close_consumer,
    drop_abandoned,
    heartbeat_ms,
    long_poll_ms,
)
from qtasks_kafka.floor import Floor
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.watermark import Partition, owner_of, restored

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import ConsumerRecord

logger = logging.getLogger("qtasks.kafka")

Commits: TypeAlias = dict[TopicPartition, OffsetAndMetadata]

SILENCE = LONG_POLL_MS / 1000 + 2.0
"""Seconds without an answer to a fetch after which the server is unreachable."""
SHORT_POLL_MS = 500
"""While records come, the driver fetches the other partitions without those that it has records of.
The next records of these wait until the server has answered, so it must not wait long."""
CALM = 10.0
"""Seconds without a record after which the server may wait for `LONG_POLL_MS`."""


class Membership:
    """Holds partitions of `topics`. `lease` (seconds) is the group's session timeout."""

    assignor = KeepingAssignor

    def __init__(
        self, connection: Connection, group: str, topics: Iterable[str], lease: float
    ) -> None:
        self._connection = connection
        self._group = group
        self._topics = list(topics)
        self._lease = lease
        self._name = uuid7().hex[-12:]
        self._floor = Floor(connection)
        self._consumer: AIOKafkaConsumer | None = None
        self._opening = asyncio.Lock()
        self._lock = asyncio.Lock()
        self._assigned = asyncio.Event()
        self._to_take: set[TopicPartition] = set()
        self.epoch = 0
        """Rises when records that are fetched but not delivered become invalid."""
        self.owed: frozenset[TopicPartition] = frozenset()
        """Partitions that other members get once nothing is in flight there."""
        self._to_owe: frozenset[TopicPartition] = frozenset()
        self._overdue: asyncio.TimerHandle | None = None
        self._wanting = self._told_wanting = True
        """What this member wants, and what it has told the group when it joined last."""
        self._closed = False
        self._polling_since = 0.0
        self.partitions: dict[TopicPartition, Partition] = {}
        self._retired: set[asyncio.Task[None]] = set()
        self._polled = self._polling_since = self._confirmed_at = self._came = 0.0
        self.changed: Future[None] = asyncio.get_running_loop().create_future()
        """Done at the next assignment, then replaced. A waiting `poll` should then start again."""

    # --- joining and leaving -------------------------------------------------------------------

    async def open(self) -> None:
        """Join the group if this is no member of it. Does not wait until the join has finished."""
        async with self._opening:
            if self._closed:
                raise Closed("the subscription has left its group")
            if self._consumer is None:
                consumer = await self._connect()
                self._polling_since = time.monotonic()
                self._consumer = consumer
                consumer.subscribe(self._topics, listener=Listener(self, consumer))

    async def _connect(self) -> AIOKafkaConsumer:
        session = int(self._lease * 1000)
        consumer = self._connection.consumer(
            group_id=self._group,
            partition_assignment_strategy=[self.assignor(self._holdings, self._note_owed)],
            session_timeout_ms=session,
            # After a crash, the messages of the dead member wait for the next heartbeat of all.
            heartbeat_interval_ms=heartbeat_ms(self._lease, 1.0),
            metadata_max_age_ms=GROWTH_MS,
            # A member commits before it joins.
            rebalance_timeout_ms=session + int(REQUEST * 1000),
            # The answer to a join takes until the slowest member has joined, or was given up.
            request_timeout_ms=session + int(2 * REQUEST * 1000),
            # A worker without a free slot does not poll, possibly for hours.
            max_poll_interval_ms=2**31 - 1,
            fetch_max_wait_ms=SHORT_POLL_MS,
            # If offsets are gone, the topic was truncated or created again. `_take_over` checks
            # that.
            auto_offset_reset="none",
        )
        try:
            with self._connection.reaching():
                async with asyncio.timeout(REQUEST):
                    await consumer.start()
        except BaseException:
            await close_consumer(consumer)
            raise
        return consumer

    @property
    def rest(self) -> float:
        """Seconds without a call of `receive` after which this member wants no partitions."""
        return min(self._lease / 2, 5.0)

    def _retire(self) -> None:
        """Give up the consumer. `open` joins with a new one. `close` waits for the old one."""
        consumer, self._consumer = self._consumer, None
        self._assigned.clear()
        self.epoch += 1
        if consumer is not None:
            closing = asyncio.create_task(close_consumer(consumer))
            self._retired.add(closing)
            closing.add_done_callback(self._retired.discard)

    def want(self, wanting: bool) -> None:
        """Set whether this member wants partitions, or only those with records in flight."""
        if wanting != self._wanting:
            self._wanting = wanting
            self._rejoin()

    async def close(self) -> None:
        """Commit finished records and leave the group. Idempotent."""
        self._wanting = False
        confirmed = False
        if self._consumer is not None and self._assigned.is_set():
            try:
                await self.confirm([p for p in self.partitions.values() if p.unconfirmed])
                confirmed = True
            except QTasksError as error:
                logger.warning("what was settled last may run again: %s", error)
        await self._floor.close(delete=confirmed)
        self._closed = True
        self._lose_all()
        self._retire()
        self._assigned.set()  # callers that wait to commit learn that all is lost
        if self._retired:
            await asyncio.wait(self._retired)

    def _holdings(self) -> Holdings:
        """Return this member's partitions, for the member that assigns."""
        self._told_wanting = self._wanting
        if not self._is_member:
            return Holdings(wanting=self._wanting)
        late = self.owed if self._is_late() else frozenset()
        busy = [tuple(tp) for tp, p in self.partitions.items() if p.in_flight and tp not in late]
        idle = [tuple(tp) for tp, p in self.partitions.items() if not p.in_flight]
        return Holdings(busy, idle, self._wanting)

    # --- called by the driver ------------------------------------------------------------------

    async def let_go(self) -> None:
        """Before other members may get idle partitions, commit what is finished."""
        self.epoch += 1
        if not self._is_member:
            self._lose_all()
        elif self._assigned.is_set():
            try:
                await self.confirm([p for p in self.partitions.values() if p.unconfirmed])
            except QTasksError as error:
                logger.warning("what was settled last may run again: %s", error)
        async with self._lock:  # a commit with the old generation must not follow the join
            self._assigned.clear()

    def note_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Note the partitions that are ours now. The next call takes them over."""
        self._to_take = set(assigned)
        # Not before the takeover knows where to begin, and not on the connection that it uses.
        self._running().pause(*self._to_take)
        self._owe(self._to_owe)
        self._floor.forget()
        for tp in self.partitions.keys() - self._to_take:
            self.partitions.pop(tp).lost = True
        self.epoch += 1
        if self._told_wanting != self._wanting:
            # A request to join again that comes during a join is forgotten by the driver.
            self._coordinator.request_rejoin()
        self._assigned.set()
        changed, self.changed = self.changed, asyncio.get_running_loop().create_future()
        if not changed.done():
            changed.set_result(None)

    def _note_owed(self, owed: Places) -> None:
        """Note what the next assignment owes."""
        self._to_owe = frozenset(TopicPartition(*place) for place in owed)

    def _owe(self, owed: frozenset[TopicPartition]) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        self.owed = owed
        if owed:
            # `extend` moves records away long before. Without it, their leases end here.
            loop = asyncio.get_running_loop()
            self._overdue = loop.call_later(self._lease, self._rejoin)

    def _is_late(self) -> bool:
        loop = asyncio.get_running_loop()
        return self._overdue is not None and loop.time() >= self._overdue.when()

    def _rejoin(self) -> None:
        if self._consumer is not None:
            self._coordinator.request_rejoin()

    def release_owed(self) -> None:
        """Let others have the owed partitions, if no record is in flight there any more."""
        if self.owed and not any(
            partition.in_flight for tp, partition in self.partitions.items() if tp in self.owed
        ):
            self._rejoin()

    @property
    def in_flight(self) -> int:
        """The number of deliveries that are not settled."""
        return sum(partition.in_flight for partition in self.partitions.values())

    def owes(self, partition: Partition) -> bool:
        """Return whether another member should have this partition."""
        return bool(self.owed) and any(self.partitions.get(tp) is partition for tp in self.owed)

    def kept(self, topic: str) -> tuple[int, Partition] | None:
        """Return a partition of a topic, with its number, that this member keeps; None without."""
        for tp, partition in self.partitions.items():
            if tp.topic == topic and tp not in self.owed:
                return tp.partition, partition
        return None

    def others(self, topic: str) -> list[int]:
        """Return the partitions of a topic that are not ours."""
        known = self._running().partitions_for_topic(topic) or ()
        return [n for n in known if TopicPartition(topic, n) not in self.partitions]

    # --- receiving -----------------------------------------------------------------------------

    async def poll(
        self, topics: Sequence[str], limit: int
    ) -> list[tuple[Partition, ConsumerRecord]]:
        """Wait for up to `limit` records of some topics. The first topic has priority.

        Cancelling it skips no record. It may return no record after a rebalance. Raises
        `Unavailable` and `ConfigurationError`.
        """
        await self.open()
        if self._to_take or not self._assigned.is_set():
            await self._await_assignment()
        consumer = self._running()
        epoch = self.epoch
        calm = time.monotonic() - self._came > CALM
        consumer._fetcher._fetch_max_wait_ms = long_poll_ms(self._lease) if calm else SHORT_POLL_MS
        places = [tp for tp in self.partitions if tp.topic in topics and tp not in self.owed]
        if time.monotonic() - self._polled > REQUEST / 2:
            self._polling_since = time.monotonic()
        before = {tp: self._position(consumer, tp) for tp in places}
        try:
            batches = {}
            # The driver continues with a partition until all its fetched records are used.
            if len(topics) > 1 and (first := [tp for tp in places if tp.topic == topics[0]]):
                batches = await consumer.getmany(*first, max_records=limit)
            # Without a partition, the driver would take records of any partition. This call returns
            # when things change.
            batches = batches or await consumer.getmany(
                *(places or [TopicPartition("", 0)]), timeout_ms=LONG_POLL_MS, max_records=limit
            )
        except asyncio.CancelledError:
            raise  # the driver has taken no record yet
        except BaseException as error:
            # It may have taken records of one partition before another one failed.
            self._retire()
            if isinstance(error, KafkaError):
                raise self._connection.translated(error) from error
            raise
        finally:
            self._polled = time.monotonic()
        if batches:
            self._came = self._polled
        # From here on, nothing is awaited, and nothing raises without a rewind first: the driver's
        # positions are already after these records.
        if batches and epoch != self.epoch:
            self._rewind()
            return []
        if epoch == self.epoch:
            for tp, start in before.items():
                end = self._position(consumer, tp)
                if start is not None and end is not None:
                    offsets = [record.offset for record in batches.get(tp, ())]
                    self.partitions[tp].follow(start, offsets, end)
        if not batches and epoch == self.epoch:
            # While a full buffer is used up, an old last fetch is normal. With an empty buffer it
            # is not.
            self._check_answers(consumer, places)
        return [
            (self.partitions[tp], record)
            for tp, records in batches.items()
            if tp in self.partitions
            for record in records
        ]

    async def _await_assignment(self) -> None:
        """Wait for the assignment, while the coordinator answers, and take over the partitions."""
        waiting_since = time.monotonic()
        while not self._assigned.is_set():
            try:
                async with asyncio.timeout(0.5):
                    await self._assigned.wait()
            except TimeoutError:
                try:
                    # Raises the error of the join.
                    self._coordinator.check_errors()
                except KafkaError as error:
                    self._retire()
                    raise self._connection.translated(error) from error
                if self._coordinator.coordinator_id is not None:
                    waiting_since = time.monotonic()
                elif time.monotonic() - waiting_since > REQUEST:
                    if not self._is_member:
                        # The driver may wait for a lost answer, as long as a join may take. A
                        # member keeps its place, and what it has in flight.
                        self._retire()
                    raise Unavailable("Kafka's group coordinator does not answer") from None
        await self.confirm([])

    def _check_answers(self, consumer: AIOKafkaConsumer, places: list[TopicPartition]) -> None:
        """Raise `Unavailable` if the server has not answered a fetch for some seconds."""
        polled = [consumer.last_poll_timestamp(tp) for tp in places if self._mine(consumer, tp)]
        age = time.time() - max((ms for ms in polled if ms), default=0) / 1000
        if places and min(age, time.monotonic() - self._polling_since) > SILENCE:
            raise Unavailable(f"Kafka at {self._connection.shown} does not answer")

    @staticmethod
    def _position(consumer: AIOKafkaConsumer, tp: TopicPartition) -> int | None:
        """Return the driver's position, without waiting for it. The driver's own method may."""
        subscription = consumer._subscription.subscription
        assignment = None if subscription is None else subscription.assignment
        if assignment is None or tp not in assignment.tps:
            return None
        state = assignment.state_value(tp)
        return state.position if state.has_valid_position else None

    @staticmethod
    def _mine(consumer: AIOKafkaConsumer, tp: TopicPartition) -> bool:
        return tp in consumer.assignment()

    def void(self) -> None:
        """Make all undelivered records be fetched again."""
        self.epoch += 1
        if self._consumer is not None:
            self._rewind()

    async def drop(self, topic: str, ends: Mapping[int, int]) -> dict[int, int]:
        """Drop undelivered records before these offsets, in our partitions of a topic.

        Returns their number by partition. The group knows it then, so no successor delivers them.
        """
        if self._consumer is None or not self._assigned.is_set():
            return {}
        await self.confirm([])
        places = {
            tp.partition: partition
            for tp, partition in self.partitions.items()
            if tp.topic == topic and tp.partition in ends
        }
        dropped = {number: place.drop(ends[number]) for number, place in places.items()}
        self.void()
        await self.confirm(places.values())
        return {number: dropped[number] for number, place in places.items() if not place.lost}

    def _rewind(self) -> None:
        """Fetch again from the first record that was not delivered."""
        consumer = self._running()
        for tp, partition in self.partitions.items():
            if tp in consumer.assignment():
                consumer.seek(tp, partition.next_fetch)
                partition.fetch_from(partition.next_fetch)

    def look_again(self, partition: Partition, came: int) -> None:
        """Fetch the missing records before the received offset once more."""
        consumer = self._running()
        for tp, own in self.partitions.items():
            if own is partition and tp in consumer.assignment():
                logger.warning(
                    "offset %d of partition %d of %s came, and %d has not: it is fetched again",
                    came, tp.partition, tp.topic, partition.expected,
                )  # fmt: skip
                consumer.seek(tp, partition.expected)
                partition.fetch_from(partition.expected, again=True)

    # --- asking the group ----------------------------------------------------------------------

    async def confirm(self, partitions: Iterable[Partition]) -> None:
        """Commit finished records of these partitions. Then each is either confirmed or `lost`.

        It waits for the server once. Raises `Unavailable` if the group does not answer.
        """
        wanted = set(partitions)
        with self._connection.reaching():
            async with asyncio.timeout(REQUEST):
                await self.open()
                confirmed = await self._try_confirm(wanted)
                while not confirmed:
                    await asyncio.sleep(PAUSE)
                    confirmed = await self._try_confirm(wanted)

    async def recheck(self) -> None:
        """Check that all partitions are still ours, unless the group confirmed it within the lease.

        A process that was stopped for longer must not deliver the records that it fetched before.
        """
        if time.monotonic() - self._confirmed_at > self._lease:
            await self.confirm(self.partitions.values())

    async def _try_confirm(self, wanted: set[Partition]) -> bool:
        await self._assigned.wait()
        async with self._lock:
            if not self._assigned.is_set():
                return False
            if self._closed:
                return True
            if not self._is_member:
                self._lose_all()
                return not self._to_take
            try:
                await self._prepare()
                if self._to_take:
                    await self._take_over()
                places = {tp: p for tp, p in self.partitions.items() if p in wanted}
                if places:
                    await self._commit(places)
            except (UnknownMemberIdError, IllegalGenerationError):
                self._lose_all()
            except RebalanceInProgressError:
                return False
            except KafkaError as error:
                if not error.retriable:
                    raise
                return False
            return not self._to_take

    async def _prepare(self) -> None:
        """Finish what must be finished before a commit."""

    async def _take_over(self) -> None:
        """Read which records are finished in new partitions, and write our name into them."""
        consumer, epoch = self._running(), self.epoch
        drop_abandoned(consumer)
        taking = sorted(self._to_take)
        committed = await self._commits(taking)
        first = await consumer.beginning_offsets(taking)
        end = await consumer.end_offsets(taking)
        taken: dict[TopicPartition, Partition] = {}
        for tp in taking:
            known = self.partitions.get(tp)
            if tp not in committed:
                taken[tp] = Partition(first[tp])
            elif known is not None and self._is_mine(owner_of(committed[tp].metadata)):
                taken[tp] = known
            else:
                taken[tp] = restored(committed[tp].offset, committed[tp].metadata)
            if taken[tp].position > end[tp]:
                logger.warning(
                    "partition %d of %s is shorter than it was: it is read from its beginning",
                    tp.partition, tp.topic,
                )  # fmt: skip
                taken[tp] = Partition(first[tp])
            taken[tp].begin(first[tp])
            if known is not None and taken[tp] is not known:
                known.lost = True
        if epoch != self.epoch:
            return
        self.partitions = taken
        if taken:
            await self._commit(taken)
        if epoch == self.epoch:
            self._to_take = set()
            self._polling_since = time.monotonic()
            self._rewind()
            consumer.resume(*consumer.assignment() - self.owed)
        self.release_owed()

    async def _commits(self, places: list[TopicPartition]) -> Commits:
        """Return the group's commits of partitions that this member takes over."""
        found: Commits = await self._coordinator.fetch_committed_offsets(places)
        return found

    @property
    def _owner(self) -> str:
        """The name that this member writes into its commits."""
        return self._name

    def _is_mine(self, owner: str) -> bool:
        """Return whether this member has made the commit of an owner."""
        return owner == self._name

    async def _commit(self, places: dict[TopicPartition, Partition]) -> None:
        """Send one commit, with the generation in which these partitions are ours.

        The driver's public `commit` retries without end. Once the group has forgotten the member,
        that method sends no generation at all, and an empty group accepts that. So a receiver that
        lost its lease would reset the offsets of its successor.
        """
        if not self._is_member:
            raise UnknownMemberIdError(self._group)
        covered = {partition: set(partition.unconfirmed) for partition in places.values()}
        offsets = {tp: OffsetAndMetadata(*p.commit(self._owner)) for tp, p in places.items()}
        await self._coordinator._do_commit_offsets(None, offsets)
        self._confirmed_at = time.monotonic()
        self._floor.note({tp: committed.offset for tp, committed in offsets.items()})
        for partition, offsets_done in covered.items():
            partition.unconfirmed -= offsets_done

    def _lose_all(self) -> None:
        """The group has assigned our partitions to others: records in flight are no longer ours."""
        for partition in self.partitions.values():
            partition.lost = True
        self.partitions = {}
        self._owe(frozenset())
        self.epoch += 1

    def _running(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise Unavailable("the membership of the group was given up; call again")
        return self._consumer

    def uses(self, consumer: AIOKafkaConsumer) -> bool:
        """Return whether this is the current consumer."""
        return self._consumer is consumer

    # This class uses aiokafka's private attributes only through these properties.

    @property
    def _coordinator(self) -> Any:
        return self._running()._coordinator

    @property
    def _is_member(self) -> bool:
        return self._consumer is not None and self._coordinator.generation > 0


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells a member of rebalances, unless the member has given up this consumer."""

    def __init__(self, member: Membership, consumer: AIOKafkaConsumer) -> None:
        self._member = member
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Release all partitions before the group assigns them again."""
        if self._member.uses(self._consumer):
            await self._member.let_go()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Note the partitions that are ours until the next rebalance."""
        if self._member.uses(self._consumer):
            self._member.note_assigned(assigned)
