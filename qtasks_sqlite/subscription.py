"""A subscription in SQLite: leases are columns of the messages' rows."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from qtasks_core import (
    Delivery,
    Outcome,
    Release,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed
from qtasks_core.receivers import Leftovers, Recent, SettleCall, Shielded
from qtasks_core.wire import decode_message
from qtasks_sqlite.connection import Database, Transaction, array
from qtasks_sqlite.doorbell import Bell

Fence: TypeAlias = tuple[int, int]

# Limited, so that many delayed messages that are due at once do not make one long turn.
_PROMOTE = """
UPDATE qtasks_messages SET wake_at = NULL, holder = 0, ready_at = wake_at WHERE id IN (
    SELECT id FROM qtasks_messages WHERE queue = ? AND wake_at <= ?
    ORDER BY wake_at LIMIT 5000)
"""
_TAKE = """
UPDATE qtasks_messages SET wake_at = ?, holder = ?, count = count + 1 WHERE id IN (
    SELECT id FROM qtasks_messages WHERE queue = ? AND wake_at IS NULL
    ORDER BY priority DESC, id LIMIT ?)
"""
_TAKEN = "queue = ? AND wake_at = ? AND holder = ?"
_NEAREST = "SELECT min(wake_at) FROM qtasks_messages WHERE queue = ? AND wake_at IS NOT NULL"
_HELD = """
FROM qtasks_messages WHERE id IN (SELECT value FROM json_each(?)) AND holder != 0 AND wake_at > ?
"""
_THESE = "WHERE id IN (SELECT value FROM json_each(?))"


class Publisher(Protocol):
    """The methods of its broker that a subscription needs."""

    @property
    def lease(self) -> float:
        """Seconds."""

    def publishing(self, messages: Sequence[TaskMessage]) -> Callable[[Transaction], None]:
        """Return the work that inserts these messages."""

    def number(self, turn: Transaction, queue: str) -> int:
        """Return the number of a queue of this namespace."""


class _Taken:
    """The result of one look: the deliveries, or else when there may be some."""

    __slots__ = ("deliveries", "nearest", "queues", "until")

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.queues: dict[str, int] = {}
        self.nearest: float | None = None
        self.until = 0.0


class SqliteSubscription(Subscription):
    """Takes messages under a lease. The fence is the row's id and the number of the take."""

    def __init__(
        self, broker: Publisher, database: Database, closed: Callable[[SqliteSubscription], None]
    ) -> None:
        self._broker = broker
        self._database = database
        self._closed = closed
        """Called when the subscription closes."""
        self._fetching: Shielded[_Taken] = Shielded()
        self._leftovers = Leftovers()
        self._emptied: dict[str, int] = {}
        """The queues in which the last look left nothing, with their numbers."""
        self._bell: Bell | None = None
        self._settled = Recent()
        self._open = True

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        wanted = {queue: most for queue, most in wanted.items() if most > 0}
        if self._fetching.pending is not None:
            await self._fetch(wanted, limit)  # left by a cancelled call, perhaps for other queues
        asleep = False
        try:
            while self._open:
                if deliveries := self._leftovers.take(wanted, limit, time.time()):
                    return deliveries
                # A writer that rings from here on rings this bell. So announce it, look, then
                # sleep. If the last look did not empty the queues, look first: this one will find
                # messages.
                if self._emptied.keys() >= wanted.keys() and not asleep:
                    self._listening().sleep_for(self._emptied[name] for name in wanted)
                    asleep = True
                taken = await self._fetch(wanted, limit)
                if self._leftovers or not asleep:
                    continue
                nearest = taken.nearest
                await self._listening().wait(nearest and max(nearest - time.time(), 0))
                asleep = False
        finally:
            if self._bell is not None:
                self._bell.awake()
        raise Closed("the subscription is closed")

    def _listening(self) -> Bell:
        if self._bell is None:
            self._bell = Bell(self._database.doorbell)
        return self._bell

    async def _fetch(self, wanted: Mapping[str, int], limit: int) -> _Taken:
        """Look once. A look outlives its cancelled waiter, so that its deliveries are not lost."""

        async def look() -> _Taken:
            # A cancelled call took these, and this call does not want them.
            unwanted = self._leftovers.take_all()
            release = self.settling([Release(delivery) for delivery in unwanted])
            take = self._taking(wanted, limit)

            def work(turn: Transaction) -> _Taken:
                if unwanted:
                    release(turn)
                return take(turn)

            try:
                taken = await self._database.write(work)
            except BaseException:
                self._leftovers.add(unwanted)
                raise
            self._leftovers.add(taken.deliveries, taken.until)
            is_emptied = not taken.deliveries or len(taken.deliveries) < limit
            self._emptied = taken.queues if is_emptied else {}
            return taken

        return await self._fetching.run(look)

    def _taking(self, wanted: Mapping[str, int], limit: int) -> Callable[[Transaction], _Taken]:
        def take(turn: Transaction) -> _Taken:
            taken = _Taken()
            now = time.time()
            taken.until = now + self._broker.lease
            holder = secrets.randbits(62) + 1
            for name, most in wanted.items():
                queue = taken.queues[name] = self._broker.number(turn, name)
                quota = min(most, limit - len(taken.deliveries))
                if quota > 0:
                    turn.execute(_PROMOTE, (queue, now))
                    self._take(turn, taken, name, (taken.until, holder, queue, quota))
            if not taken.deliveries:
                moments = [
                    turn.execute(_NEAREST, (q,)).fetchone()[0] for q in taken.queues.values()
                ]
                taken.nearest = min((m for m in moments if m is not None), default=None)
            return taken

        return take

    def _take(
        self, turn: Transaction, taken: _Taken, name: str, take: tuple[float, int, int, int]
    ) -> None:
        if not turn.execute(_TAKE, take).rowcount:
            return
        until, holder, queue, _ = take
        rows = turn.select_blobs("qtasks_messages", "id", "count, priority", _TAKEN,
            (queue, until, holder),
        )  # fmt: skip
        for (row, count, _), data in sorted(rows, key=lambda row: (-row[0][2], row[0][0])):
            taken.deliveries.append(Delivery(decode_message(data), name, (row, holder), count))

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        return await self._database.write(self.settling(settlements))

    def settling(self, settlements: Sequence[Settlement]) -> Callable[[Transaction], list[Outcome]]:
        """Return the work that settles those of these deliveries that are still held."""

        def settle(turn: Transaction) -> list[Outcome]:
            call = SettleCall(settlements, self._settled)
            mine = self._mine(turn, [settlement.delivery for settlement in call.first.values()])
            settled: list[Hashable] = []
            ended: list[int] = []
            released: list[int] = []
            retried: list[TaskMessage] = []
            for place, settlement in call.first.items():
                fence = settlement.delivery.fence
                if fence not in mine:
                    if call.keys[place] in turn.settled:
                        call.done(place)  # by another call of the same transaction
                    continue
                settled.append(call.done(place))
                if isinstance(settlement, Release):
                    released.append(fence[0])
                    turn.rung_queues.add(self._broker.number(turn, settlement.delivery.queue))
                else:
                    ended.append(fence[0])
                if isinstance(settlement, Retry):
                    retried.append(settlement.message)
            self._change(turn, ended, released, retried)
            turn.settled.update(settled)
            turn.after_commit(lambda: self._remember(settled))
            return call.outcomes()

        return settle

    def _remember(self, settled: Iterable[Hashable]) -> None:
        for key in settled:
            self._settled.add(key)

    def _mine(self, turn: Transaction, deliveries: Sequence[Delivery]) -> set[Fence]:
        """Return the fences of those deliveries whose lease holds."""
        ids = array(delivery.fence[0] for delivery in deliveries)
        rows = turn.select("id, holder", _HELD, (ids, time.time()))
        return {(row, holder) for row, holder in rows}

    def _change(
        self,
        turn: Transaction,
        ended: list[int],
        released: list[int],
        retried: list[TaskMessage],
    ) -> None:
        if ended:
            turn.execute(f"DELETE FROM qtasks_messages {_THESE}", (array(ended),))
        if released:
            turn.execute(
                f"UPDATE qtasks_messages SET wake_at = NULL, holder = 0 {_THESE}",
                (array(released),),
            )
        if retried:
            self._broker.publishing(retried)(turn)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        def extend(turn: Transaction) -> set[Fence]:
            mine = self._mine(turn, deliveries)
            held = [d.fence[0] for d in deliveries if d.fence in mine]
            if held:
                turn.execute(
                    f"UPDATE qtasks_messages SET wake_at = ? {_THESE}",
                    (time.time() + self._broker.lease, array(held)),
                )
            return mine

        mine = await self._database.write(extend)
        return [delivery if delivery.fence in mine else None for delivery in deliveries]

    async def close(self) -> None:
        self._open = False
        if self._bell is not None:
            self._bell.wake()
        try:
            await self._fetching.finish()
            await self._release_leftovers()
        finally:
            self._closed(self)
            if self._bell is not None:
                self._bell.close()

    async def _release_leftovers(self) -> None:
        """Release the deliveries that were fetched and that no call has returned."""
        if leftovers := self._leftovers.take_all():
            await self.settle([Release(delivery) for delivery in leftovers])
