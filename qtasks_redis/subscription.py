"""A subscription on Redis: a script takes leases, and a bell wakes idle receivers."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from qtasks_core.receivers import Leftovers, Shielded, effect_of
from qtasks_core.wire import decode_message, encode_message
from qtasks_redis.connection import MOST_BYTES, MOST_ITEMS, Connection, ended, fitting
from qtasks_redis.keys import RECORD, Keys, milliseconds, packed
from qtasks_redis.scripts import EXTEND, RING, SETTLE, TAKE

_MOST_TAKEN = 1000


class Fence:
    """Proof that this receiver holds a delivery, and the state of its settlement."""

    __slots__ = ("first_at", "priority", "settled", "token", "unsure", "until")

    def __init__(
        self, token: str, priority: int, until: float, first_at: float = -math.inf
    ) -> None:
        self.token = token
        self.priority = priority
        """The level of the queue in which the message is."""
        self.until = until
        """Nobody else can take over the delivery before this time of the loop's clock."""
        self.first_at = first_at
        """When the task had no record, or a first one of its first attempt, by the same clock."""
        self.settled: Hashable = None
        """The effect of its settlement; None: not settled."""
        self.unsure: Hashable = None
        """The effect of a settle call whose answer did not arrive."""


class RedisSubscription(Subscription):
    """Takes the receivable messages in one round trip, or blocks in a read until a bell rings.

    The blocking read gets a token, never a message, so a cancelled read loses no message. If nobody
    waits for a token any more, the bell is rung again.
    """

    def __init__(
        self,
        connection: Callable[[], Connection],
        lease: float,
        has_records: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._has_records = has_records
        """Whether the records are on the same server, so that the script may look at them."""
        self._lease = lease
        self._holder = token_hex(4)
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._fetching: Shielded[None] = Shielded()
        self._leftovers = Leftovers()
        self._known: dict[str, int] = {}
        """The last known earliest due time of each queue, in the server's milliseconds."""
        self._listening: asyncio.Task[None] | None = None
        self._bells: frozenset[str] = frozenset()
        """The queues on whose bells the blocking read waits."""
        self._asleep = False
        self._emptied: frozenset[str] = frozenset()
        """The queues in which the last fetch has left nothing."""
        self._empty_until = 0.0

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        queues = {queue: most for queue, most in wanted.items() if most > 0}
        if not queues or limit < 1:
            raise ValueError("receive must want at least one delivery")
        while self._open:
            if self._fetching.pending is None:
                if deliveries := self._take_leftovers(queues, limit):
                    return deliveries
                if (pause := self._rest(queues)) > 0:
                    self._emptied = frozenset()
                    await self._sleep(frozenset(queues), pause)
                    continue
            await self._fetching.run(lambda: self._fetch(queues, limit))
            if self._open and (deliveries := self._take_leftovers(queues, limit)):
                return deliveries
        raise Closed("the subscription is closed")

    def _rest(self, queues: Mapping[str, int]) -> float:
        """Return the seconds for which nothing can be in these queues unless their bells ring."""
        return self._empty_until - self._loop.time() if self._emptied.issuperset(queues) else 0.0

    def _take_leftovers(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        return self._leftovers.take(wanted, limit, self._loop.time())

    async def _fetch(self, wanted: Mapping[str, int], limit: int) -> None:
        """Fetch receivable messages. Note the time at which a delay or a lease may finish."""
        connection = self._connection()
        names = list(wanted)
        records = connection.key(RECORD, "") if self._has_records() else ""
        args: list[str | int] = [
            self._holder, milliseconds(self._lease), min(limit, _MOST_TAKEN), records,
        ]  # fmt: skip
        for name in names:
            args += (wanted[name], self._known.get(name, 0))
        asked = self._loop.time()
        until = asked + self._lease
        change, dues, levels, taken = await connection.run(TAKE, _keys_of(connection, names), args)
        self._known.update(zip(names, dues, strict=True))
        deliveries: list[Delivery] = []
        left = iter(taken)
        for at in range(0, len(levels), 3):
            queue, priority = names[levels[at]], int(levels[at + 1])
            for _ in range(levels[at + 2]):
                token, count, data, first = next(left), next(left), next(left), next(left)
                fence = Fence(token.decode(), priority, until, asked if first else -math.inf)
                deliveries.append(Delivery(decode_message(data), queue, fence, count))
        self._leftovers.add(deliveries, until)
        got = Counter(delivery.queue for delivery in deliveries)
        all_taken = len(deliveries) < min(limit, _MOST_TAKEN)
        self._emptied = frozenset(n for n in names if all_taken and got[n] < wanted[n])
        # A lease that starts meanwhile must not run out unnoticed.
        self._empty_until = asked + min(change / 1000, self._lease)

    async def _sleep(self, queues: frozenset[str], seconds: float) -> None:
        """Wait until a bell rings or `seconds` have passed.

        The timeout is measured here, because the server finishes blocking reads up to 0.1 s late.
        The read itself continues, and the next call waits for it.
        """
        if self._listening is not None and (self._listening.done() or self._bells != queues):
            await self._stop_listening()
        if self._listening is None:
            self._bells = queues
            self._listening = asyncio.create_task(self._listen(queues))
        self._asleep = True
        try:
            done, _ = await asyncio.wait({self._listening}, timeout=seconds)
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
        """Stop the blocking read. Ring for other receivers: it may have just got a token."""
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
        """Return the settlements that the server has accepted."""
        keys = Keys(self._connection())
        sent: list[str | int] = []
        for settlement in settlements:
            sent += settling(keys, settlement)
        messages = [data for data in encoded if data]
        with self.asking(settlements):
            answers = await self._connection().run(SETTLE, keys.keys, [packed(sent), *messages])
        return [
            settlement
            for settlement, answer in zip(settlements, answers, strict=True)
            if self.answered(settlement, done=answer == 1)
        ]

    @contextmanager
    def asking(self, settlements: Sequence[Settlement]) -> Iterator[None]:
        """Note the settlements whose call has no answer: they may have taken effect."""
        try:
            yield
        except BaseException:
            for settlement in settlements:
                fence = settlement.delivery.fence
                fence.unsure = fence.unsure or effect_of(settlement)
            raise

    def answered(self, settlement: Settlement, *, done: bool) -> bool:
        """Note the server's answer to a settlement, and return whether the server accepted it."""
        fence = settlement.delivery.fence
        if done:
            fence.settled = effect_of(settlement)
        elif fence.settled is None and self._loop.time() < fence.until:
            # The lease was still valid, so only our settle call without an answer can have
            # removed it.
            fence.settled = fence.unsure
        return done

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        if not deliveries:
            return []
        connection = self._connection()
        keys = Keys(connection)
        args: list[str | int] = [milliseconds(self._lease)]
        for delivery in deliveries:
            fence = delivery.fence
            args += (keys.queue(delivery.queue, fence.priority), fence.token)
        until = self._loop.time() + self._lease
        answers = await connection.run(EXTEND, keys.keys, args)
        for delivery, answer in zip(deliveries, answers, strict=True):
            if answer == 1:
                delivery.fence.until = until
        return [d if answer == 1 else None for d, answer in zip(deliveries, answers, strict=True)]

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        await self._fetching.finish()
        # If the server is unreachable, the leases run out by themselves.
        with suppress(Unavailable):
            await self._stop_listening()
            await self._give_back()

    async def _give_back(self) -> None:
        """Release the fetched deliveries that no call has returned."""
        await self.settle([Release(delivery) for delivery in self._leftovers.take_all()])

    async def _ring(self, queues: Iterable[str]) -> None:
        connection = self._connection()
        await connection.run(RING, _keys_of(connection, queues), ())


def settling(keys: Keys, settlement: Settlement) -> tuple[str | int, ...]:
    """Return what a script is sent for a settlement. The message of a retry is sent apart."""
    delivery = settlement.delivery
    position, token = keys.queue(delivery.queue, delivery.fence.priority), delivery.fence.token
    if isinstance(settlement, Retry):
        message = settlement.message
        target = keys.queue(message.queue, message.priority)
        return position, token, "retry", target, milliseconds(message.delay)
    return position, token, "release" if isinstance(settlement, Release) else "ack", 0, 0


def _keys_of(connection: Connection, queues: Iterable[str]) -> list[str]:
    """Return the keys of these queues, with their usual level."""
    keys = Keys(connection)
    for queue in queues:
        keys.queue(queue)
    return keys.keys
