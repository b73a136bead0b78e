"""Floors: where receivers start to look, so that they skip the index entries of deleted rows.

The index entries of a deleted row stay until no transaction can see the row any more. While one
transaction holds a snapshot for hours, no entry is removed. A scan from the start of the index then
passes millions of dead entries. But new entries are always at the end: ids rise, and so do the
times at which leases and delays finish.

So each lane, the messages of one priority in one queue, has two floors. No receivable message is at
or below a floor. One floor is an id, for messages that are receivable at once. The other is a time,
for messages that wait for a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

from qtasks_postgres.connection import Database

PRIORITIES = 10

RIGHTS: Mapping[str, Sequence[str]] = {"floors": ("SELECT", "INSERT", "UPDATE")}

STORED = """
    SELECT queue, priority, ready, due FROM qtasks.floors
    WHERE namespace = $1 AND queue = ANY($2::text[])
"""

# A sequence shows its current value, whatever the snapshot. A user who may not read it gets NULL.
MARK = """
    SELECT statement_timestamp() AS now,
           CASE WHEN has_sequence_privilege('qtasks.messages_id_seq', 'SELECT')
                THEN pg_sequence_last_value('qtasks.messages_id_seq') END AS id
"""

WRITERS = """
    SELECT virtualtransaction AS writer FROM pg_locks
    WHERE locktype = 'relation' AND relation = 'qtasks.messages'::regclass
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND mode = 'RowExclusiveLock' AND granted AND pid IS DISTINCT FROM pg_backend_pid()
"""

# A row that another receiver has locked still counts as alive.
LIVING = """
    SELECT lane.queue, lane.priority, (
        SELECT id FROM qtasks.messages
        WHERE namespace = $1 AND queue = lane.queue AND wake_at IS NULL
          AND priority <= lane.priority
          AND (priority, id) > (lane.priority, lane.ready)
          AND (priority, id) <= (lane.priority, $6)
        ORDER BY priority, id
        LIMIT 1
    ) AS ready, (
        SELECT wake_at FROM qtasks.messages
        WHERE namespace = $1 AND queue = lane.queue AND priority = lane.priority
          AND wake_at > lane.due AND wake_at <= $7
        ORDER BY wake_at
        LIMIT 1
    ) AS due
    FROM unnest($2::text[], $3::smallint[], $4::bigint[], $5::timestamptz[])
         AS lane (queue, priority, ready, due)
"""

# If an index scan takes too long, read the table instead, this many blocks at a time, including
# dead rows. `|| ''` stops the planner from using an index. Rows that move meanwhile do not matter,
# because they move beyond the mark.
SIZE = """
    SELECT pg_relation_size('qtasks.messages') / current_setting('block_size')::int AS blocks,
           current_setting('server_version_num')::int AS version
"""
SURVEY = """
    SELECT queue, priority, min(id) FILTER (WHERE wake_at IS NULL AND id <= $5) AS ready,
           min(wake_at) FILTER (WHERE wake_at <= $6) AS due
    FROM qtasks.messages
    WHERE ctid >= $3::tid AND ctid < $4::tid
      AND namespace || '' = $1 AND queue || '' = ANY($2::text[])
    GROUP BY queue, priority
"""
BLOCKS = 4096
RANGES_SINCE = 140_000
"""The first server version that reads only a range of blocks. Older ones read the whole table."""

STORE = """
    INSERT INTO qtasks.floors AS stored (namespace, queue, priority, ready, due)
    SELECT $1, * FROM unnest($2::text[], $3::smallint[], $4::bigint[], $5::timestamptz[])
    ON CONFLICT (namespace, queue, priority) DO UPDATE
    SET ready = excluded.ready, due = excluded.due
    WHERE excluded.ready > stored.ready
"""

START = datetime(1970, 1, 1, tzinfo=UTC)


class Lane(NamedTuple):
    """The messages of one priority in one queue."""

    queue: str
    priority: int


class Floor(NamedTuple):
    """No receivable message is at or below these values."""

    ready: int = 0
    due: datetime = START


class Mark(NamedTuple):
    """The end of both orders at one time, and the writers that may still commit below it."""

    id: int
    now: datetime
    writers: set[str]


Living = tuple[int | None, datetime | None]
"""The first id and the first time in a lane at which a message is alive."""

T = TypeVar("T", int, datetime)


class Floors:
    """The floors of a subscription's lanes. They rise regularly; new subscriptions load them.

    A floor may rise to a mark, the end of the order at some time. First, every transaction that was
    writing to the table at that time must finish. It may have taken its ids before. A transaction
    that only reads, or that writes to other tables, delays nothing.
    """

    EVERY = 1.0
    """Seconds between two steps while messages are received."""

    IDLE = 10.0
    """Seconds between two steps while no messages are received here. Others may receive them."""

    STORE_AFTER = 10_000
    """Ids by which a floor rises before it is stored. Each store leaves a dead row."""

    QUICKLY = 0.5
    """Seconds after which an index scan is stopped and the table is surveyed instead."""

    SKEW = timedelta(seconds=60)
    """How far another server's clock may be behind the previous server's clock."""

    def __init__(self, database: Database, namespace: str) -> None:
        self._database = database
        self._namespace = namespace
        self._loop = asyncio.get_running_loop()
        self._floors: dict[Lane, Floor] = {}
        self._stored: dict[Lane, int] = {}
        self._highest = 0
        self._mark: Mark | None = None
        self._next_at = 0.0
        self._received = False
        self._known = False

    def of(self, queues: Iterable[str]) -> tuple[list[int], list[datetime]]:
        """Return both floors of the queues' lanes, the highest priority of each queue first."""
        floors = [self._floors.get(lane, Floor()) for lane in lanes_of(queues)]
        return [floor.ready for floor in floors], [floor.due for floor in floors]

    def saw(self, id: int) -> None:
        """Note the id of a received message."""
        self._highest = max(self._highest, id)
        self._received = True

    def forget(self) -> None:
        """Start again: this may be another server, without the last messages and their ids."""
        self._floors = {}
        self._stored = {}
        self._highest = 0
        self._mark = None
        self._known = False
        self._next_at = 0.0

    async def raise_(self, queues: Sequence[str]) -> None:
        """Do the next step for all lanes of the queues, if it is due. Raises `Unavailable`."""
        if not self._floors:
            self._floors = await self._load(queues)
        if self._loop.time() < self._next_at:
            return
        self._next_at = self._loop.time() + (self.EVERY if self._received else self.IDLE)
        self._received = False
        # Keep the values of this step: `forget` may replace them meanwhile.
        floors, mark = self._floors, self._mark
        if mark is None:
            mark = await self._marked(floors)
        elif mark.writers:
            mark.writers.intersection_update(await self._writers())
        if not self._known:
            # A scan from the very start may take very long. Most writers finish at once, so wait a
            # little.
            for _ in range(20):
                if not mark.writers:
                    break
                await asyncio.sleep(0.02)
                mark.writers.intersection_update(await self._writers())
        if mark.writers:
            self._received = True  # so that the next step comes soon
        else:
            await self._raise_to(mark, floors, queues)
        if floors is self._floors:
            self._mark = mark if mark.writers else None
            self._known = self._known or self._mark is None

    async def _load(self, queues: Sequence[str]) -> dict[Lane, Floor]:
        floors = dict.fromkeys(lanes_of(queues), Floor())
        rows = await self._database.fetch(STORED, self._namespace, list(queues))
        for queue, priority, ready, due in rows:
            lane = Lane(queue, priority)
            floors[lane] = Floor(ready, max(START, due - self.SKEW))
            self._stored[lane] = ready
        self._known = bool(rows)
        return floors

    async def _marked(self, floors: dict[Lane, Floor]) -> Mark:
        # Read the end first: a transaction that starts to write later gets a higher id.
        ((now, id),) = await self._database.fetch(MARK)
        highest = max(self._highest, *(floor.ready for floor in floors.values()))
        if id is not None and id < highest:
            # Somebody has truncated the tables and restarted the sequence.
            floors.update(dict.fromkeys(floors, Floor()))
            self._highest = 0
        return Mark(max(self._highest, id or 0), now, await self._writers())

    async def _writers(self) -> set[str]:
        return {row["writer"] for row in await self._database.fetch(WRITERS)}

    async def _raise_to(self, mark: Mark, floors: dict[Lane, Floor], queues: Sequence[str]) -> None:
        lanes = lanes_of(queues)
        # If the clock was set back, a floor above it would hide new messages until the clock
        # catches up.
        old = [floors[lane]._replace(due=min(floors[lane].due, mark.now)) for lane in lanes]
        try:
            async with asyncio.timeout(self.QUICKLY):
                rows = await self._database.fetch(
                    LIVING, self._namespace, *columns_of(lanes, old), mark.id, mark.now
                )
        except TimeoutError:
            living = await self._survey(mark, queues)
        else:
            living = {Lane(queue, priority): (ready, due) for queue, priority, ready, due in rows}
        for lane in lanes:
            ready, due = living.get(lane, (None, None))
            floors[lane] = Floor(
                mark.id if ready is None else ready - 1,
                mark.now if due is None else due - timedelta(microseconds=1),
            )
        if floors is self._floors:
            await self._store(floors)

    async def _survey(self, mark: Mark, queues: Sequence[str]) -> dict[Lane, Living]:
        ((blocks, version),) = await self._database.fetch(SIZE)
        step = BLOCKS if version >= RANGES_SINCE else blocks + 1
        living: dict[Lane, Living] = {}
        for start in range(0, blocks, step):
            rows = await self._database.fetch(
                SURVEY, self._namespace, list(queues), (start, 0), (start + step, 0),
                mark.id, mark.now,
            )  # fmt: skip
            for queue, priority, ready, due in rows:
                lane = Lane(queue, priority)
                others = living.get(lane, (None, None))
                living[lane] = (least(ready, others[0]), least(due, others[1]))
        return living

    async def _store(self, floors: Mapping[Lane, Floor]) -> None:
        risen = [
            lane
            for lane, floor in floors.items()
            if floor.ready >= self._stored.get(lane, 0) + self.STORE_AFTER
        ]
        if risen:
            columns = columns_of(risen, [floors[lane] for lane in risen])
            await self._database.fetch(STORE, self._namespace, *columns)
            self._stored.update((lane, floors[lane].ready) for lane in risen)


def least(one: T | None, other: T | None) -> T | None:
    """Return the smaller value; None stands for no value."""
    return min((value for value in (one, other) if value is not None), default=None)


def lanes_of(queues: Iterable[str]) -> list[Lane]:
    """Return the lanes of the queues, the highest priority of each queue first."""
    return [Lane(queue, priority) for queue in queues for priority in reversed(range(PRIORITIES))]


def columns_of(
    lanes: Sequence[Lane], floors: Sequence[Floor]
) -> tuple[list[str], list[int], list[int], list[datetime]]:
    """Return lanes and their floors, column by column."""
    return (
        [lane.queue for lane in lanes],
        [lane.priority for lane in lanes],
        [floor.ready for floor in floors],
        [floor.due for floor in floors],
    )
