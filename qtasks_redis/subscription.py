"""A subscription on Redis: leases taken by a script, a bell for when there is nothing to take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from secrets import token_hex

from qtasks_core import (
    DONE,
    LOST,
    Delivery,
    Outcome,
    Release,
    Retry,
    Settlement,
    Subscription,
)
from qtasks_core.batches import split
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.leftovers import Leftovers, Shielded
from qtasks_core.settling import effect_of
from qtasks_core.wire import decode_message, encode_message
from qtasks_redis.connection import MOST_BYTES, MOST_ITEMS, Connection, ended, fitting
from qtasks_redis.queues import Queues, milliseconds
from qtasks_redis.scripts import EXTEND, RING, SETTLE, TAKE

_MOST_TAKEN = 1000


class Fence:
    """Proof that a delivery is ours, and what became of it."""

    __slots__ = ("settled", "token", "unsure", "until")

    def __init__(self, token: bytes, until: float) -> None:
        self.token = token
        self.until = until
        """Before this time of the loop's clock nobody else can have taken it over."""
        self.settled: Hashable = None
        """What it was settled with; None: it was not."""
        self.unsure: Hashable = None
        """What a settle was sent with whose answer never came."""


class RedisSubscription(Subscription):
    """Takes what is there in one round trip, else sleeps in a blocking read until a bell rings.

    The blocking read gets a token, never a message, so that ending it strands nothing: a token
    that nobody waits for any more is rung again.
    """

    def __init__(self, connection: Callable[[], Connection], lease: float) -> None:
        self._connection = connection
        self._lease = lease
        self._holder = token_hex(4)
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._fetching: Shielded[float] = Shielded()
        self._leftovers = Leftovers()
        self._known: dict[str, int] = {}
        """Of each queue the earliest due time, in the server's milliseconds, as last heard."""
        self._listening: asyncio.Task[None] | None = None
        self._bells: frozenset[str] = frozenset()
        """The queues whose bells it listens to."""
        self._asleep = False

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        queues = {queue: most for queue, most in wanted.items() if most > 0}
        if not queues or limit < 1:
            raise ValueError("receive must want at least one delivery")
        while self._open:
            collecting = self._fetching.pending is not None
            if not collecting and (deliveries := self._take_leftovers(queues, limit)):
                return deliveries
            pause = await self._fetching.run(lambda: self._fetch(queues, limit))
            if self._open and (deliveries := self._take_leftovers(queues, limit)):
                return deliveries
            # What a cancelled call had asked for may have been another queue.
            if self._open and pause > 0 and not collecting:
                await self._sleep(frozenset(queues), pause)
        raise Closed("the subscription is closed")

    def _take_leftovers(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        return self._leftovers.take(wanted, limit, self._loop.time())

    async def _fetch(self, wanted: Mapping[str, int], limit: int) -> float:
        """Fetch what is receivable; return the seconds until that may change by itself."""
        connection = self._connection()
        names = list(wanted)
        args = [self._holder, milliseconds(self._lease), str(min(limit, _MOST_TAKEN))]
        for name in names:
            args += (str(wanted[name]), str(self._known.get(name, 0)))
        until = self._loop.time() + self._lease
        change, dues, taken = await connection.run(TAKE, Queues(connection, names).keys, args)
        self._known.update(zip(names, dues, strict=True))
        deliveries: list[Delivery] = []
        for at in range(0, len(taken), 4):
            queue, token, count, data = taken[at : at + 4]
            message = decode_message(data)
            deliveries.append(Delivery(message, names[queue], Fence(token, until), count))
        self._leftovers.add(deliveries, until)
        return float(change) / 1000

    async def _sleep(self, queues: frozenset[str], seconds: float) -> None:
        """Wait until a bell rings or `seconds` have passed.

        The time is measured here, since the server ends blocking reads up to 0.1 s late; the
        read itself goes on, for the next call to listen to.
        """
        if self._listening is not None and (self._listening.done() or self._bells != queues):
            await self._stop_listening()
        if self._listening is None:
            self._bells = queues
            self._listening = asyncio.create_task(self._listen(queues))
        self._asleep = True
        try:
            # A lease that begins meanwhile must not run out unnoticed.
            bounded = min(seconds, self._lease)
            done, _ = await asyncio.wait({self._listening}, timeout=bounded)
        finally:
            self._asleep = False
        if done and self._open:
            listening, self._listening = self._listening, None
            listening.result()

    async def _listen(self, queues: frozenset[str]) -> None:
        connection = self._connection()
        bells = {connection.key("bell", queue): queue for queue in queues}
        heard = await connection.listen(list(bells))
        if heard is not None and not self._asleep:
            await self._ring([bells[heard]])

    async def _stop_listening(self) -> None:
        """End the blocking read, and ring for the others in case it had just got a token."""
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
            await ended(listening)
            await self._ring(self._bells)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        fresh = [s for s in settlements if s.delivery.fence.settled is None]
        encoded = [encode_message(s.message) if isinstance(s, Retry) else b"" for s in fresh]
        outcomes, taken = fitting(encoded, self._connection().server.largest)
        refused: dict[Settlement, Outcome] = {}
        if len(taken) < len(fresh):
            refused = {s: o for s, o in zip(fresh, outcomes, strict=True) if o is not DONE}
            fresh = [fresh[at] for at in taken]
            encoded = [encoded[at] for at in taken]
        done: set[Settlement] = set()
        for part in split(map(len, encoded), MOST_ITEMS, MOST_BYTES):
            done.update(await self._settle(fresh[part], encoded[part]))
        return [
            DONE if s in done or s.delivery.fence.settled == effect_of(s) else refused.get(s, LOST)
            for s in settlements
        ]

    async def _settle(
        self, settlements: Sequence[Settlement], encoded: Sequence[bytes]
    ) -> list[Settlement]:
        """Return those that the server has obeyed."""
        connection = self._connection()
        queues = Queues(connection)
        args: list[str | bytes] = []
        for settlement, data in zip(settlements, encoded, strict=True):
            delivery = settlement.delivery
            args += (queues.position(delivery.queue), delivery.fence.token)
            if isinstance(settlement, Retry):
                message = settlement.message
                delay = milliseconds(message.delay)
                args += ("retry", queues.position(message.queue), delay, data)
            else:
                args.append("release" if isinstance(settlement, Release) else "ack")
        asked: list[tuple[Fence, Hashable]] = [
            (s.delivery.fence, effect_of(s)) for s in settlements
        ]
        try:
            answers = await connection.run(SETTLE, queues.keys, args)
        except BaseException:
            for fence, effect in asked:
                fence.unsure = fence.unsure or effect
            raise
        now = self._loop.time()
        done: list[Settlement] = []
        for settlement, (fence, effect), answer in zip(settlements, asked, answers, strict=True):
            if answer == 1:
                fence.settled = effect
                done.append(settlement)
            elif fence.settled is None and now < fence.until:
                # What is gone before anyone else could have it went by the settle without answer.
                fence.settled = fence.unsure
        return done

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        if not deliveries:
            return []
        connection = self._connection()
        queues = Queues(connection)
        args: list[str | bytes] = [milliseconds(self._lease)]
        for delivery in deliveries:
            args += (queues.position(delivery.queue), delivery.fence.token)
        until = self._loop.time() + self._lease
        answers = await connection.run(EXTEND, queues.keys, args)
        for delivery, answer in zip(deliveries, answers, strict=True):
            if answer == 1:
                delivery.fence.until = until
        return [d if answer == 1 else None for d, answer in zip(deliveries, answers, strict=True)]

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        await self._fetching.finish()
        # Where the server cannot be reached the leases run out by themselves.
        with suppress(Unavailable):
            await self._stop_listening()
            await self._give_back()

    async def _give_back(self) -> None:
        """Release what was fetched and no call has returned."""
        await self.settle([Release(delivery) for delivery in self._leftovers.take_all()])

    async def _ring(self, queues: Iterable[str]) -> None:
        connection = self._connection()
        await connection.run(RING, Queues(connection, queues).keys, ())
