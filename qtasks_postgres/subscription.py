"""A subscription on Postgres: SKIP LOCKED takes rows, and leases hold them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, NamedTuple

from qtasks_core import (
    Ack,
    Delivery,
    Outcome,
    Release,
    Retry,
    Settlement,
    Subscription,
)
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.receivers import Leftovers, Recent, SettleCall, Shielded
from qtasks_core.wire import decode_message, encode_message
from qtasks_postgres.batches import size_of
from qtasks_postgres.connection import Database, Listener
from qtasks_postgres.doorbell import Doorbell
from qtasks_postgres.floors import Floors, Lane, lanes_of
from qtasks_postgres.rows import columns_of, publishing

# The server plans a statement once per connection, perhaps while the table is empty. The plan must
# still be good with millions of rows, so the queries leave the planner no choice. They find rows by
# an array of ids, never by a join that the planner could start from the table. They sort in an
# order that only one index has. With `ORDER BY id` alone, the planner could scan the primary key
# through all messages of other queues.

# Messages that were never received and have no delay, in the order of their ids.
READY = """
    SELECT id FROM qtasks.messages
    WHERE namespace = $1 AND queue = want.queue AND wake_at IS NULL
      AND priority <= level.priority
      AND (priority, id) >
          (level.priority, ($4::bigint[])[want.position * 10 - level.priority])
    ORDER BY priority, id
    LIMIT want.most
    FOR UPDATE SKIP LOCKED
"""

# Messages that waited for a time: delayed, released, or lost by their holders. An index can be
# searched for statement_timestamp(), but not for clock_timestamp().
DUE = """
    SELECT id FROM qtasks.messages
    WHERE namespace = $1 AND queue = want.queue AND priority = level.priority
      AND wake_at > ($7::timestamptz[])[want.position * 10 - level.priority]
      AND wake_at <= statement_timestamp()
    ORDER BY wake_at
    LIMIT want.most
    FOR UPDATE SKIP LOCKED
"""


def taking(lane: str, first: str) -> str:
    """Return a statement that takes messages of each queue.

    `first` says whether a message was never received before and had no delay. The statement goes
    through the priorities from the highest down, and stops once it has enough. LIMIT stops the
    loops, so only taken rows are locked.
    """
    return f"""
    UPDATE qtasks.messages
    SET delivery = delivery + 1, wake_at = clock_timestamp() + $6::float8 * interval '1 second'
    WHERE id = ANY(ARRAY(
        SELECT chosen.id
        FROM unnest($2::text[], $3::int[]) WITH ORDINALITY AS want (queue, most, position)
        CROSS JOIN LATERAL (
            SELECT message.id
            FROM generate_series(9, 0, -1) AS level (priority)
            CROSS JOIN LATERAL ({lane}) AS message
            LIMIT want.most
        ) AS chosen
        LIMIT $5
    ))
    RETURNING priority, id, queue, delivery, body, {first} AS first
    """


TAKE = taking(READY, "true")

# The inner SELECT sees the row as it was before the update.
LOOK = taking(
    f"SELECT id FROM ({DUE}) AS due UNION ALL SELECT id FROM ({READY}) AS ready",
    "(SELECT wake_at FROM qtasks.messages AS old WHERE old.id = messages.id) IS NULL",
)

# This also sees the rows that SKIP LOCKED skips. For those the wait is zero.
NEXT = """
    SELECT min(coalesce(
        (
            SELECT 0.0 FROM qtasks.messages
            WHERE namespace = $1 AND queue = want.queue AND wake_at IS NULL
              AND priority <= level.priority
              AND (priority, id) >
                  (level.priority, ($3::bigint[])[want.position * 10 - level.priority])
            ORDER BY priority, id
            LIMIT 1
        ),
        (
            SELECT extract(epoch FROM wake_at - clock_timestamp()) FROM qtasks.messages
            WHERE namespace = $1 AND queue = want.queue AND priority = level.priority
              AND wake_at > ($4::timestamptz[])[want.position * 10 - level.priority]
            ORDER BY wake_at
            LIMIT 1
        )
    ))::float8 AS wait
    FROM unnest($2::text[]) WITH ORDINALITY AS want (queue, position)
    CROSS JOIN generate_series(9, 0, -1) AS level (priority)
"""

# A receiver no longer holds a message if its lease has run out or the message was delivered again.
# coalesce() keeps the planner from scanning the whole index of waiting messages.


def mine(first: int) -> str:
    """Return the condition. `first` is the number of the ids, the delivery numbers follow.

    The ids ascend: width_bucket() finds the place of an id by a binary search.
    """
    return f"""
        id = ANY(${first}::bigint[])
        AND delivery = (${first + 1}::int[])[width_bucket(id, ${first}::bigint[])]
        AND coalesce(wake_at > clock_timestamp(), false)
    """


def settling(first: int) -> str:
    """Return the part of a statement that deletes the messages of these fences."""
    return f"gone AS (DELETE FROM qtasks.messages WHERE {mine(first)} RETURNING id)"


def retrying(first: int) -> str:
    """Return the parts that do so and publish the columns that follow the fences instead."""
    return f"""
        {settling(first)}, again AS (
            {publishing(first + 2, "WHERE replaced IN (SELECT id FROM gone)", f"${first}")}
        )
    """


ACK = f"WITH {settling(1)} SELECT id FROM gone"
RETRY = f"WITH {retrying(2)} SELECT id FROM gone"

RELEASE = f"""
    UPDATE qtasks.messages SET wake_at = clock_timestamp() WHERE {mine(1)} RETURNING id
"""

EXTEND = f"""
    UPDATE qtasks.messages
    SET wake_at = clock_timestamp() + $3::float8 * interval '1 second'
    WHERE {mine(1)}
    RETURNING id, delivery
"""


class Fence(NamedTuple):
    """A message, and the number of the delivery."""

    id: int
    delivery: int


class PostgresSubscription(Subscription):
    """Takes rows and holds them by their leases."""

    SWEEP = 3.0
    """Seconds after which a sleeping receiver looks without being told.

    So it notices a frozen server, and a message whose publisher died before it rang the bell.
    """

    PATIENCE = 0.05
    """Seconds to wait for rows that another receiver has locked and may not take."""

    BETWEEN_LOOKS = 0.25
    """Seconds between two looks for messages that became due or came back."""

    CHEAP_LOOK = 0.05
    """The longest cheap look, in seconds. After a slower one, wait ten times as long as it took.

    Floors cannot rise while a transaction is open that has published or settled.
    """

    def __init__(
        self,
        database: Database,
        listener: Listener,
        doorbell: Doorbell,
        namespace: str,
        lease: float,
    ) -> None:
        self._database = database
        self._listener = listener
        self._doorbell = doorbell
        self._namespace = namespace
        self._lease = lease
        self._loop = asyncio.get_running_loop()
        self._queues: list[str] = []
        self._channels: list[str] = []
        self._bell = asyncio.Event()
        self._fetching: Shielded[float] = Shielded()
        self._leftovers = Leftovers()
        self._fetched_at = 0.0
        self._floors = Floors(database, namespace)
        self._passed: dict[Lane, int] = {}
        self._look_at = 0.0
        self._look_again_at = 0.0
        self._settled = Recent()
        self._open = True

    async def open(self, queues: Iterable[str]) -> None:
        """Listen to new messages of `queues`. Raises `Unavailable`."""
        self._queues = list(queues)
        self._channels = [
            self._database.channel_of(self._namespace, queue) for queue in self._queues
        ]
        await self._listener.listen(self._channels, self._rung)

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        wanted = {queue: most for queue, most in wanted.items() if most > 0}
        while self._open:
            pause = await self._fetching.run(lambda: self._fetch(wanted, limit))
            if not self._open:
                break
            if deliveries := self._take_leftovers(wanted, limit):
                return deliveries
            if not self._leftovers:
                await self._sleep(pause)
        raise Closed("the subscription is closed")

    def _take_leftovers(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        """Return the fetched deliveries that this call may have. The next fetch releases the rest.

        A rest remains if the call that fetched was cancelled. This call may want fewer deliveries,
        or it may come so late that the leases are about to run out.
        """
        if self._loop.time() - self._fetched_at > self._lease / 3:
            return []
        return self._leftovers.take(wanted, limit)

    async def _fetch(self, wanted: Mapping[str, int], limit: int) -> float:
        """Fetch deliveries. If none are found, return the seconds to sleep at most.

        A plain take that finds nothing is enough for a short sleep. So a receiver that handles one
        task at a time sends one query per task, not four. The full look follows in two cases: the
        bell rang but no message is new, so a message came back; or the short sleep is over.
        """
        rung = self._bell.is_set()
        self._bell.clear()
        await self._listener.ensure()
        await self._give_back()
        looked = self._loop.time() >= self._look_at
        if looked:
            await self._look(wanted, limit)
        else:
            await self._take(wanted, limit)
            if rung and not self._leftovers:
                if looked := self._loop.time() >= self._look_again_at:
                    await self._look(wanted, limit)
                else:
                    self._look_at = min(self._look_at, self._look_again_at)
        if self._leftovers:
            return 0.0
        return await self._pause(wanted) if looked else self._look_at - self._loop.time()

    async def _look(self, wanted: Mapping[str, int], limit: int) -> None:
        """Also take messages that became due, came back, or were committed late."""
        await self._floors.raise_(self._queues)
        begun = self._loop.time()
        ready, due = self._floors.of(wanted)
        rows = await self._fetch_rows(LOOK, wanted, ready, limit, due)
        now = self._loop.time()
        self._look_again_at = now + 10 * (now - begun) if now - begun > self.CHEAP_LOOK else 0.0
        self._look_at = max(now + self.BETWEEN_LOOKS, self._look_again_at)
        if not all(row["first"] for row in rows):
            self._look_at = 0.0  # more of those may be waiting

    async def _take(self, wanted: Mapping[str, int], limit: int) -> None:
        """Take newly published messages, starting where the last take finished.

        Below that point are the index entries of taken messages, dead until vacuum removes them.
        Sometimes a message is also below it, because its publisher committed late. `_look` finds
        those.
        """
        floors = map(max, self._floors.of(wanted)[0], self._passed_in(wanted))
        await self._fetch_rows(TAKE, wanted, list(floors), limit)

    def _passed_in(self, wanted: Mapping[str, int]) -> list[int]:
        return [self._passed.get(lane, 0) for lane in lanes_of(wanted)]

    async def _fetch_rows(
        self,
        statement: str,
        wanted: Mapping[str, int],
        floors: list[int],
        limit: int,
        *more: object,
    ) -> Sequence[Any]:
        self._fetched_at = self._loop.time()
        rows = await self._database.fetch(
            statement,
            self._namespace,
            list(wanted),
            list(wanted.values()),
            floors,
            limit,
            self._lease,
            *more,
        )
        rows.sort(key=lambda row: (-row[0], row[1]))
        passed: dict[tuple[str, int], int] = {}
        deliveries: list[Delivery] = []
        for priority, id, queue, delivery, body, first in rows:
            if first:
                passed[queue, priority] = id
            fence = Fence(id, delivery)
            deliveries.append(Delivery(decode_message(body), queue, fence, delivery))
        if rows:
            self._floors.saw(max(row[1] for row in rows))
        self._passed.update((Lane(*lane), id) for lane, id in passed.items())
        self._leftovers.add(deliveries)
        return rows

    async def _pause(self, wanted: Mapping[str, int]) -> float:
        """Return the seconds until a message may become receivable without a new publish."""
        rows = await self._database.fetch(
            NEXT, self._namespace, list(wanted), *self._floors.of(wanted)
        )
        wait = rows[0]["wait"]
        if wait is None:
            return self.SWEEP
        return float(min(wait, self.SWEEP)) if wait > 0 else self.PATIENCE

    async def _sleep(self, pause: float) -> None:
        """Wait for the bell. If it rings, a message is new; otherwise one may be due."""
        try:
            async with asyncio.timeout(pause):
                await self._bell.wait()
        except TimeoutError:
            self._look_at = self._look_again_at
        else:
            self._look_at = max(self._loop.time() + self.BETWEEN_LOOKS, self._look_again_at)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        return await self.settling(settlements, self.settle_now)

    async def settling(
        self,
        settlements: Sequence[Settlement],
        settle: Callable[[SettleCall], Coroutine[Any, Any, list[Outcome]]],
    ) -> list[Outcome]:
        """Run `settle`, even if the caller is cancelled, after other calls on these deliveries."""
        calls, fences = self._database.calls, {s.delivery.fence for s in settlements}
        # A cancelled caller's settle call may still run. Its result is known once it has finished.
        await calls.others(fences)
        return await calls.run(self._settling(settlements, settle), fences)

    async def _settling(
        self,
        settlements: Sequence[Settlement],
        settle: Callable[[SettleCall], Coroutine[Any, Any, list[Outcome]]],
    ) -> list[Outcome]:
        return await settle(SettleCall(settlements, self._settled))

    async def settle_now(self, call: SettleCall) -> list[Outcome]:
        """Settle what is not settled yet, each kind in one statement."""
        for kind, run in ((Ack, self._ack), (Retry, self._retry), (Release, self._release)):
            places = [place for place, s in call.first.items() if isinstance(s, kind)]
            if not places:
                continue
            # Settle and extend lock rows by ascending id. Otherwise they could deadlock.
            places.sort(key=lambda place: call.first[place].delivery.fence)
            self.settled(call, places, await run([call.first[place] for place in places]))
        return call.outcomes()

    def settled(self, call: SettleCall, places: Iterable[int], ids: Set[int]) -> None:
        """Note the settlements at these places whose messages have these ids."""
        for place in places:
            if call.first[place].delivery.fence.id in ids:
                self._settled.add(call.done(place))

    def ring(self, queues: Iterable[str]) -> None:
        """Wake the receivers of these queues soon."""
        self._doorbell.ring(self._database.channel_of(self._namespace, queue) for queue in queues)

    async def _ack(self, settlements: Sequence[Settlement]) -> set[int]:
        fences = fences_of([settlement.delivery for settlement in settlements])
        rows = await self._database.fetch(ACK, *fences)
        return {row["id"] for row in rows}

    async def _retry(self, settlements: Sequence[Settlement]) -> set[int]:
        fences = fences_of([settlement.delivery for settlement in settlements])
        messages = [s.message for s in settlements if isinstance(s, Retry)]
        batch = [(message, encode_message(message)) for message in messages]
        rows = await self._database.fetch(
            RETRY, self._namespace, *fences, *columns_of(batch), size=size_of(batch)
        )
        self.ring(message.queue for message in messages)
        return {row["id"] for row in rows}

    async def _release(self, settlements: Sequence[Settlement]) -> set[int]:
        return await self.release([settlement.delivery for settlement in settlements])

    async def release(self, deliveries: Sequence[Delivery]) -> set[int]:
        """Release deliveries. Return the ids of the messages."""
        fences = fences_of(sorted(deliveries, key=lambda delivery: delivery.fence))
        rows = await self._database.fetch(RELEASE, *fences)
        self.ring({delivery.queue for delivery in deliveries})
        return {row["id"] for row in rows}

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        fences = fences_of(sorted(deliveries, key=lambda delivery: delivery.fence))
        rows = await self._database.fetch(EXTEND, *fences, self._lease)
        held = {(row["id"], row["delivery"]) for row in rows}
        return [delivery if delivery.fence in held else None for delivery in deliveries]

    async def close(self) -> None:
        self._open = False
        self._bell.set()
        await self._fetching.finish()
        # If the server is unreachable, the leases run out by themselves.
        with suppress(Unavailable):
            await self._give_back()
        await self._listener.forget(self._channels, self._rung)

    async def _give_back(self) -> None:
        """Release the fetched deliveries that no call has returned."""
        if leftovers := self._leftovers.take_all():
            try:
                await self._release([Release(delivery) for delivery in leftovers])
            except BaseException:
                self._leftovers.add(leftovers)
                raise

    def _rung(self, payload: str | None) -> None:
        if payload is None:
            self._floors.forget()
            self._passed.clear()
            self._look_at = self._look_again_at = 0.0
        self._bell.set()


def fences_of(deliveries: Sequence[Delivery]) -> tuple[list[int], list[int]]:
    """Return the ids and delivery numbers of the deliveries, column by column."""
    fences: list[Fence] = [delivery.fence for delivery in deliveries]
    return [fence.id for fence in fences], [fence.delivery for fence in fences]
