"""What the receivers of every backend remember: subscriptions and inboxes.

A subscription keeps the `Leftovers` of a cancelled `receive`. It also remembers what it has settled
(`SettleCall`, `Recent`): a repeat of a settlement is `done`, and another settlement of the same
delivery is refused. An inbox keeps the tasks that it waits for (`Awaited`). A round trip of either
may outlive its cancelled caller (`Shielded`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Coroutine, Hashable, Iterable, Mapping, Sequence
from math import inf
from typing import Any, Generic, TypeVar

from qtasks_core.records import FINAL
from qtasks_core.schemas import DONE, LOST, Delivery, Outcome, Retry, Settlement, Task

T = TypeVar("T")


class Leftovers:
    """Deliveries that the server handed over and that no call of `receive` has returned yet.

    A call adds the deliveries that it fetched, and takes those that it may return. If it is
    cancelled in between, the next call finds the deliveries here. `close` takes all of them, to
    release them.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[float, Delivery]] = []

    def add(self, deliveries: Iterable[Delivery], until: float = inf) -> None:
        """Keep deliveries whose lease holds until this time, by any clock of the caller."""
        self._kept += [(until, delivery) for delivery in deliveries]

    def take(self, wanted: Mapping[str, int], limit: int, now: float = 0.0) -> list[Delivery]:
        """Return the deliveries that a call of `receive` may have. The rest stays.

        Another receiver may have an expired delivery, so expired ones are dropped.
        """
        kept, self._kept = self._kept, []
        quota = dict(wanted)  # deliveries of each queue that this call may still take
        taken: list[Delivery] = []
        for until, delivery in kept:
            if until <= now:
                continue
            if len(taken) < limit and quota.get(delivery.queue, 0) > 0:
                quota[delivery.queue] -= 1
                taken.append(delivery)
            else:
                self._kept.append((until, delivery))
        return taken

    def take_all(self) -> list[Delivery]:
        """Return all deliveries, to be released."""
        kept, self._kept = self._kept, []
        return [delivery for _, delivery in kept]

    def __bool__(self) -> bool:
        return bool(self._kept)


class Shielded(Generic[T]):
    """Runs one call at a time. A cancelled waiter leaves it running for the next one to collect.

    Use it only for calls that finish by themselves, such as a round trip. A call that waits for a
    message would keep waiting for its cancelled caller. It would take the message, and hold up the
    next caller. The owner finally calls `finish` or `abandon`, so that no call outlives it.
    """

    def __init__(self) -> None:
        self._call: asyncio.Task[T] | None = None

    async def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the call that a cancelled waiter left, or else start `call`."""
        if self._call is None:
            self._call = asyncio.create_task(call())
        running = self._call
        await asyncio.wait({running})
        # After `abandon`, another call may be under way.
        if self._call is running:
            self._call = None
        return running.result()

    @property
    def pending(self) -> asyncio.Task[T] | None:
        """The call whose result nobody has collected yet, if any."""
        return self._call

    async def finish(self) -> None:
        """Wait for the uncollected call, if any, and ignore its result and its error.

        Use it if the call itself keeps what it fetched, for example in `Leftovers`.
        """
        call = self._call
        if call is None:
            return
        await asyncio.wait({call})
        if self._call is call:
            self._call = None
        if not call.cancelled():
            call.exception()  # otherwise asyncio logs that nobody retrieved it

    async def abandon(self) -> T | None:
        """Cancel the uncollected call and wait for it. Return its result if it had one."""
        call, self._call = self._call, None
        if call is None:
            return None
        call.cancel()
        await asyncio.wait({call})
        if call.cancelled() or call.exception() is not None:
            return None
        return call.result()


class SettleCall:
    """The settlements of one call. At most one of each delivery takes effect.

        call = SettleCall(settlements, self._settled)
        for place, settlement in call.first.items():
            if ...:  # the lease holds, and the settlement has had its effect
                self._settled.add(call.done(place))
        return call.outcomes()

    Only the first settlement of a delivery may take effect. Another one in the same call is a
    repeat or it differs. A repeat gets the same answer as the first, and a different settlement is
    refused. Repeats of settlements of an earlier call are answered at once.
    """

    def __init__(
        self,
        settlements: Sequence[Settlement],
        settled: Container[Hashable] = (),
        *,
        obeyed: Outcome = DONE,
    ) -> None:
        """Start from what is settled already.

        `settled` has the `repeat_key` of each earlier settlement. `obeyed` is the answer to one
        that takes effect, and to its repeats.
        """
        self.first: dict[int, Settlement] = {}
        """The settlements that should take effect, by their places in the call."""
        self.keys: dict[int, Hashable] = {}
        """The `repeat_key` of each of them, by the same places."""
        self._obeyed = obeyed
        self._outcomes = [LOST] * len(settlements)
        self._repeats: dict[int, int] = {}
        places: dict[Hashable, int] = {}
        for place, settlement in enumerate(settlements):
            fence = settlement.delivery.fence
            key = fence, effect_of(settlement)  # its `repeat_key`, inlined to save a call
            if key in settled:
                self._outcomes[place] = obeyed
                continue
            first = places.setdefault(fence, place)
            if first == place:
                self.first[place] = settlement
                self.keys[place] = key
            elif self.keys[first] == key:
                self._repeats[place] = first

    def done(self, place: int) -> Hashable:
        """Note that a settlement took effect, and return its `repeat_key` to remember."""
        self._outcomes[place] = self._obeyed
        return self.keys[place]

    def answer(self, place: int, outcome: Outcome) -> None:
        """Note an outcome. A settlement without one is `refused`, because its lease was lost."""
        self._outcomes[place] = outcome

    def outcomes(self) -> list[Outcome]:
        """Return an outcome for each settlement of the call, in order."""
        for place, first in self._repeats.items():
            self._outcomes[place] = self._outcomes[first]
        return self._outcomes


class Recent:
    """A set of the newest keys: at least `limit` of them, and at most twice as many."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        # Two generations. Dropping the oldest key of a single dict would be slow: each search for
        # it passes the places of all keys that were dropped before.
        self._young: set[Hashable] = set()
        self._old: set[Hashable] = set()

    def add(self, key: Hashable) -> None:
        """Remember a key. A key that is older than `limit` others may be forgotten."""
        self._young.add(key)
        if len(self._young) >= self._limit:
            self._old, self._young = self._young, set()

    def discard(self, key: Hashable) -> None:
        """Forget a key."""
        self._young.discard(key)
        self._old.discard(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._young or key in self._old

    def __bool__(self) -> bool:
        return bool(self._young or self._old)


def repeat_key(settlement: Settlement) -> Hashable:
    """Return a key that a settlement shares with its repeats, and with no other settlement."""
    return settlement.delivery.fence, effect_of(settlement)


def effect_of(settlement: Settlement) -> Hashable:
    """Return a key that tells a settlement from other settlements of its delivery.

    A retry must not be reported as done if the delivery was acknowledged.
    """
    if isinstance(settlement, Retry):
        message = settlement.message
        return message.uuid, message.attempt, message.queue
    return type(settlement)


class Awaited:
    """The tasks that an inbox waits for, and the final records that it has not returned yet.

    An inbox that may have missed something reads all `uuids` again. It also asks the server to
    watch the `watched` ones again.
    """

    def __init__(self) -> None:
        self.uuids: set[str] = set()
        """All tasks that the inbox waits for."""
        self.watched: set[str] = set()
        """The tasks that the server has to watch, because another client submitted them."""
        self.to_unwatch: set[str] = set()
        """The inbox no longer watches these tasks, but the server does not know it yet."""
        self._arrived: list[Task] = []

    @property
    def expected(self) -> set[str]:
        """The tasks that the inbox waits for and does not watch."""
        return self.uuids - self.watched

    def expect(self, uuids: Iterable[str]) -> None:
        """Wait for tasks."""
        self.uuids.update(uuids)

    def watch(self, uuids: Iterable[str]) -> list[str]:
        """Wait for tasks that the server has to watch. Return those that it does not watch yet."""
        new = [uuid for uuid in dict.fromkeys(uuids) if uuid not in self.watched]
        self.uuids.update(new)
        self.watched.update(new)
        self.to_unwatch.difference_update(new)
        return new

    def forget(self, uuids: Iterable[str]) -> None:
        """Stop waiting for tasks."""
        forgotten = set(uuids)
        self.uuids -= forgotten
        self.to_unwatch |= self.watched & forgotten
        self.watched -= forgotten

    def arrive(self, tasks: Iterable[Task | None]) -> list[str]:
        """Keep the final records of awaited tasks, each once, and return which were watched.

        The returned tasks are not in `to_unwatch`: most servers stop watching after they have
        notified.
        """
        watched: list[str] = []
        for task in tasks:
            if task is None or task.status not in FINAL or task.uuid not in self.uuids:
                continue
            self._arrived.append(task)
            self.uuids.remove(task.uuid)
            if task.uuid in self.watched:
                self.watched.remove(task.uuid)
                watched.append(task.uuid)
        return watched

    def take(self) -> list[Task]:
        """Return the records that arrived since the last call. `receive` returns them."""
        arrived, self._arrived = self._arrived, []
        return arrived
