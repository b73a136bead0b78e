"""A subscription to several brokers at once."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future, Task, TimerHandle
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from qtasks.compose.members import PAUSE, Branch, Member
from qtasks_core import (
    Ack,
    Delivery,
    Outcome,
    Release,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.receivers import Leftovers, Recent, SettleCall
from qtasks_core.together import together

Home = TypeVar("Home")
Item = TypeVar("Item")
T = TypeVar("T")

logger = logging.getLogger("qtasks.compose")

IDLE = 0.5
"""Seconds that a delivery which no call has returned waits for one, before others get it."""


class MergedFence(NamedTuple):
    """The fence of a delivery, and the branch that it came from."""

    branch: Branch
    fence: Hashable


class MergedSubscription(Subscription):
    """Receives from the subscriptions of several brokers at once.

    Each call asks all of them, and cancels the others once one has answered. That loses no
    delivery: what a server has handed over, its subscription returns at the next call.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        *,
        keeps: Callable[[Member, str], bool],
        send: Callable[[Sequence[TaskMessage]], Awaitable[list[Outcome]]],
        closed: Callable[[MergedSubscription], None],
    ) -> None:
        """Both `keeps` and `send` are those of `ComposedBroker`. `closed` is called at the end."""
        self._branches = branches
        self._keeps = keeps
        self._send = send
        self._on_closed = closed
        self._calls: set[Task[None]] = set()
        self._leftovers = Leftovers()
        """If two answer at once, they may have more than one call can return."""
        self._resting: TimerHandle | None = None
        self._giving_back: set[Task[None]] = set()
        self._published = Recent()
        """Moved retries whose new message is on another broker."""
        self._moved = Recent()
        """The fences of their deliveries."""
        self._settled = Recent()
        """Moved retries whose old message is acknowledged too."""
        self._loop = asyncio.get_running_loop()
        self._closed: Future[None] = self._loop.create_future()

    async def open(self) -> None:
        """Subscribe at the members that are there. Raises `Unavailable` if none is."""
        opened = await asyncio.gather(
            *(branch.subscription() for branch in self._branches), return_exceptions=True
        )
        errors = [each for each in opened if isinstance(each, BaseException)]
        final = [each for each in errors if not isinstance(each, Unavailable)]
        if final or len(errors) == len(opened) > 0:
            raise (final or errors)[0]

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        shares: dict[Branch, dict[str, int]] = {}
        for queue, most in wanted.items():
            for branch in self._branches:
                if most > 0 and queue in branch.queues:
                    shares.setdefault(branch, {})[queue] = most
        failed: dict[Branch, Exception] = {}
        await self._end_calls()
        try:
            while not self._closed.done():
                if deliveries := self._leftovers.take(wanted, limit):
                    return deliveries
                if shares and len(failed) == len(shares):
                    raise next(iter(failed.values()))
                await self._ask(shares, limit, failed)
        finally:
            if self._leftovers and self._resting is None:
                self._resting = self._loop.call_later(IDLE, self._give_back)
        raise Closed("the subscription is closed")

    async def _ask(
        self,
        shares: Mapping[Branch, Mapping[str, int]],
        limit: int,
        failed: dict[Branch, Exception],
    ) -> None:
        """Ask until one has answered. Together they are asked for `limit`, each for one at least.

        While others can be asked, one that has failed has a pause. So it stops nobody else.
        """
        now = self._loop.time()
        asked = {b: share for b, share in shares.items() if b.retry_at <= now} or shares
        most = max(1, limit // max(1, len(asked)))
        for branch, share in asked.items():
            call = asyncio.create_task(self._receive(branch, share, most, failed))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        paused = [branch.retry_at - now for branch in shares if branch not in asked]
        try:
            await asyncio.wait(
                {*self._calls, self._closed},
                timeout=min(paused, default=None),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            await self._end_calls()

    async def _receive(
        self,
        branch: Branch,
        share: Mapping[str, int],
        most: int,
        failed: dict[Branch, Exception],
    ) -> None:
        try:
            subscription = await branch.subscription()
            deliveries = await subscription.receive(share, most)
        except Exception as error:  # noqa: BLE001  # `receive` raises it if all have failed
            failed[branch] = error
            branch.retry_at = self._loop.time() + PAUSE
            if not branch.away and not self._closed.done():
                logger.warning("a broker of the queues %s is away: %s", ", ".join(share), error)
            branch.away = True
        else:
            failed.pop(branch, None)
            branch.retry_at, branch.away = 0.0, False
            self._leftovers.add(
                replace(each, fence=MergedFence(branch, each.fence)) for each in deliveries
            )

    async def _end_calls(self) -> None:
        if self._calls:
            for call in self._calls:
                call.cancel()
            await asyncio.wait(self._calls)

    def _give_back(self) -> None:
        """Release what no call has returned in time: there is no free slot here."""
        self._resting = None
        if deliveries := self._leftovers.take_all():
            task = asyncio.create_task(self._release(deliveries))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)

    async def _release(self, deliveries: Sequence[Delivery]) -> None:
        with suppress(Unavailable):  # their leases end by themselves
            await self.settle([Release(delivery) for delivery in deliveries])

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        call = SettleCall(settlements, self._settled)
        moving = {at: each for at, each in call.first.items() if self._moves(each)}
        if moving:
            await self._move(call, moving)
        here = {
            at: each
            for at, each in call.first.items()
            if at not in moving and not (self._moved and each.delivery.fence in self._moved)
        }
        outcomes = await self._settle_here(list(here.values()))
        for at, outcome in zip(here, outcomes, strict=True):
            call.answer(at, outcome)
        return call.outcomes()

    def _moves(self, settlement: Settlement) -> bool:
        """Return whether this is a retry whose message goes to another broker."""
        return isinstance(settlement, Retry) and not self._keeps(
            settlement.delivery.fence.branch.member, settlement.message.queue
        )

    async def _settle_here(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle deliveries where they came from."""

        async def settle(branch: Branch, some: list[Settlement]) -> list[Outcome]:
            subscription = await branch.subscription()
            return await subscription.settle([replace(s, delivery=_bare(s.delivery)) for s in some])

        return await spread([(each.delivery.fence.branch, each) for each in settlements], settle)

    async def _move(self, call: SettleCall, retries: Mapping[int, Settlement]) -> None:
        """Publish the new messages, then acknowledge the deliveries.

        A receiver without the lease must not publish anything, so that is asked first.
        """
        new = [at for at in retries if call.keys[at] not in self._published]
        held = await self.extend([retries[at].delivery for at in new])
        mine = {
            at: each
            for at, ours in zip(new, held, strict=True)
            if ours is not None and isinstance(each := retries[at], Retry)
        }
        if mine:
            outcomes = await self._send([each.message for each in mine.values()])
            for at, outcome in zip(mine, outcomes, strict=True):
                if outcome.status == "done":
                    self._published.add(call.keys[at])
                    self._moved.add(retries[at].delivery.fence)
                else:
                    call.answer(at, outcome)
        moved = [at for at in retries if call.keys[at] in self._published]
        outcomes = await self._settle_here([Ack(retries[at].delivery) for at in moved])
        for at, outcome in zip(moved, outcomes, strict=True):
            if outcome.status == "done":
                self._settled.add(call.done(at))
            else:
                call.answer(at, outcome)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        async def extend(branch: Branch, some: list[Delivery]) -> list[Delivery | None]:
            subscription = await branch.subscription()
            return [
                each and replace(each, fence=MergedFence(branch, each.fence))
                for each in await subscription.extend([_bare(delivery) for delivery in some])
            ]

        return await spread([(each.fence.branch, each) for each in deliveries], extend)

    async def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        if self._resting is not None:
            self._resting.cancel()
        await self._end_calls()
        self._give_back()
        if self._giving_back:
            await asyncio.wait(self._giving_back)
        await together([branch.close() for branch in self._branches])
        self._on_closed(self)


async def spread(
    items: Sequence[tuple[Home, Item]],
    call: Callable[[Home, list[Item]], Coroutine[Any, Any, list[T]]],
) -> list[T]:
    """Call for the items of each home at once, and return the answers in the order of the items."""
    places: dict[Home, list[int]] = {}
    for at, (home, _) in enumerate(items):
        places.setdefault(home, []).append(at)
    answers = await together(
        [call(home, [items[at][1] for at in some]) for home, some in places.items()]
    )
    found = {
        at: answer
        for some, given in zip(places.values(), answers, strict=True)
        for at, answer in zip(some, given, strict=True)
    }
    return [found[at] for at in range(len(items))]


def _bare(delivery: Delivery) -> Delivery:
    """Return a delivery as its own subscription knows it."""
    return replace(delivery, fence=delivery.fence.fence)
