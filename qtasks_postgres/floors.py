"""Where receivers begin to look, so that they do not walk over the index entries of the dead.

A deleted row's index entries go when no transaction can see the row any more. While one holds a
snapshot for hours, none goes, and whoever begins at the start of an index passes millions of them.
But what is new comes at the end: ids rise, and so do the moments at which leases and delays end. So
each lane, the messages of one priority in one queue, has two floors below which nothing lives: an
id for what may be received at once, a moment for what waits for one.
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

# A sequence is read as it is now, whatever the snapshot. Who may not read it gets NULL.
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

# What somebody has locked to take it is still alive.
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

# For a walk over an index that would take too long: so many blocks of the table at a time, dead
# rows and all. `|| ''` keeps the planner from the indexes. Rows that move meanwhile do not matter:
# they move beyond the mark.
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
"""The server's first version that reads a range of blocks and not the whole table for one."""

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
    """Nothing that may be received lives at these or below."""

    ready: int = 0
    due: datetime = START


class Mark(NamedTuple):
    """The end of both orders at one moment, and who might still commit something before it."""

    id: int
    now: datetime
    writers: set[str]


Living = tuple[int | None, datetime | None]
"""The first id and the first moment at which something lives in a lane."""

T = TypeVar("T", int, datetime)


class Floors:
    """The floors of a subscription's lanes, raised now and then, and stored for those who start.

    A floor may rise to where the end was at some moment, once every transaction is over that was
    writing to the table then: it may have had its ids before. A transaction that only reads, or
    writes elsewhere, holds up nothing.
    """

    EVERY = 1.0
    """Seconds between two steps while messages are received."""

    IDLE = 10.0
    """Seconds between two steps while none are: others may receive them."""

    STORE_AFTER = 10_000
    """Ids by which a floor rises before it is stored: each time leaves a dead row of its own."""

    QUICKLY = 0.5
    """Seconds after which a walk over an index is given up for a survey of the table."""

    SKEW = timedelta(seconds=60)
    """By how much another server's clock may be behind the last one's."""

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
        """Return both floors of the lanes of the queues, the highest priority of each first."""
        floors = [self._floors.get(lane, Floor()) for lane in lanes_of(queues)]
        return [floor.ready for floor in floors], [floor.due for floor in floors]

    def saw(self, id: int) -> None:
        """Hear of a message that was received."""
        self._highest = max(self._highest, id)
        self._received = True

    def forget(self) -> None:
        """Begin anew: it may be another server, which lacks the last messages and their ids."""
        self._floors = {}
        self._stored = {}
        self._highest = 0
        self._mark = None
        self._known = False
        self._next_at = 0.0

    async def raise_(self, queues: Sequence[str]) -> None:
        """Take the next step for all lanes of the queues when it is time. Raises `Unavailable`."""
        if not self._floors:
            self._floors = await self._load(queues)
        if self._loop.time() < self._next_at:
            return
        self._next_at = self._loop.time() + (self.EVERY if self._received else self.IDLE)
        self._received = False
        # Those of this step: whoever forgets meanwhile begins with others.
        floors, mark = self._floors, self._mark
        if mark is None:
            mark = await self._marked(floors)
        elif mark.writers:
            mark.writers.intersection_update(await self._writers())
        if not self._known:
            # Looking from the very start may take for ever. Most who write are done in no time.
            for _ in range(20):
                if not mark.writers:
                    break
                await asyncio.sleep(0.02)
                mark.writers.intersection_update(await self._writers())
        if mark.writers:
            self._received = True  # so that it is tried again soon
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
        # The end first: who begins to write after that gets a later place.
        ((now, id),) = await self._database.fetch(MARK)
        highest = max(self._highest, *(floor.ready for floor in floors.values()))
        if id is not None and id < highest:
            # Somebody has emptied the tables and begun to count again.
            floors.update(dict.fromkeys(floors, Floor()))
            self._highest = 0
        return Mark(max(self._highest, id or 0), now, await self._writers())

    async def _writers(self) -> set[str]:
        return {row["writer"] for row in await self._database.fetch(WRITERS)}

    async def _raise_to(self, mark: Mark, floors: dict[Lane, Floor], queues: Sequence[str]) -> None:
        lanes = lanes_of(queues)
        # A clock that was set back would else hide what is written until it has caught up.
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
    """Return the lesser of what there is."""
    return min((value for value in (one, other) if value is not None), default=None)


def lanes_of(queues: Iterable[str]) -> list[Lane]:
    """Return the lanes of the queues, the highest priority of each first."""
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
