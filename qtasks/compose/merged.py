"""A subscription to several brokers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from msgspec.structs import replace

from qtasks.client.retrying import Backoff
from qtasks.compose.members import Member, at_each
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

IDLE_AFTER = 0.1
"""Seconds without an answer after which a member's queues count as empty."""


class Fence(NamedTuple):
    """The fence of a delivery: where it came from, and the delivery as its member knows it."""

    member: Member
    delivery: Delivery


class Branch:
    """The subscription at one member."""

    def __init__(
        self, member: Member, queues: Mapping[str, int], subscription: Subscription
    ) -> None:
        self.member = member
        self.queues = queues
        self.subscription = subscription
        self.leftovers = Leftovers()
        """Deliveries for which no slot was free. Nobody extends their leases."""
        self.owed: list[Settlement] = []
        """Settlements that the member has not confirmed because it is away."""
        self.retry_at = 0.0
        """The time of the loop before which it is not asked again, because it has failed."""
        self.waited = IDLE_AFTER
        """Seconds for which it was asked since its last answer."""
        self.unsure = 0
        """How many deliveries a cancelled call may have fetched. The next call must take them."""
        self._backoff = Backoff()
        self._loop = asyncio.get_running_loop()

    @property
    def busy(self) -> bool:
        """Whether it probably has more messages."""
        return self.waited < IDLE_AFTER

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        """Receive from the member. Note whether it is busy, idle or away."""
        asked_at = self._loop.time()
        try:
            with self.member.watched():
                deliveries = await self._receive(wanted, limit)
        except asyncio.CancelledError:
            took = self._loop.time() - asked_at
            self.waited += took
            self.unsure = limit if took < IDLE_AFTER else 0
            raise
        except Unavailable as error:
            self.waited, self.unsure = IDLE_AFTER, 0
            self.retry_at = self._loop.time() + self._backoff.next()
            self.member.outage.failed(error)
            raise
        self.waited, self.retry_at, self.unsure = 0.0, 0.0, 0
        self._backoff.reset()
        return deliveries

    async def _receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        await self._settle_owed()
        if kept := self.leftovers.take(wanted, limit):
            try:
                extended = await self.subscription.extend(kept)
            except BaseException:
                self.leftovers.add(kept)
                raise
            if held := [delivery for delivery in extended if delivery is not None]:
                return held
        return await self.subscription.receive(wanted, limit)

    async def _settle_owed(self) -> None:
        if owed := list(self.owed):
            await self.subscription.settle(owed)  # a delivery whose lease was lost is refused
            del self.owed[: len(owed)]

    async def close(self) -> None:
        """Release what no call has returned, and close the subscription."""
        with suppress(Unavailable):  # the leases run out by themselves
            await self._settle_owed()
            if kept := self.leftovers.take_all():
                await self.subscription.settle([Release(delivery) for delivery in kept])
        await self.subscription.close()


class MergedSubscription(Subscription):
    """Receives from several members at once.

    Each call of `receive` divides its limit among the members, and asks them at the same time. When
    the first answers, the other calls are cancelled. What a member has fetched by then, it returns
    at the next call. So more than the limit comes only if all slots go to one member and another
    one, whose queues were empty, gets a message in the same moment.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        keeps: Callable[[Member, str], bool],
        send: Callable[[Sequence[TaskMessage]], Coroutine[Any, Any, list[Outcome]]],
    ) -> None:
        """`keeps` says whether a retry into a queue stays with a member. `send` publishes."""
        self._branches = {branch.member: branch for branch in branches}
        self._members = list(self._branches)
        self._keeps = keeps
        self._send = send
        self._calls: dict[Branch, asyncio.Task[None]] = {}
        self._arrived: list[tuple[Branch, Delivery]] = []
        """What the members have answered in this call."""
        self._turn = 0
        self._moved = Recent()
        """The fences and keys of retries whose new message is on another member."""
        self._loop = asyncio.get_running_loop()
        self._closed: asyncio.Future[None] = self._loop.create_future()

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        shares: dict[Branch, dict[str, int]] = {}
        self._turn += 1
        turned = self._turned(list(self._branches.values()))
        for queue, most in wanted.items():
            for branch in turned:
                if most > 0 and queue in branch.queues:
                    shares.setdefault(branch, {})[queue] = most
        if not shares or limit < 1:
            raise ValueError("receive must want at least one delivery")
        try:
            await self._end_calls()  # a call that was cancelled twice may have left some
            self._keep()
            await self._ask(shares, limit)
            await self._end_calls()
            if deliveries := self._take(wanted, limit):
                return deliveries
        finally:
            self._keep()
        raise Closed("the subscription is closed")

    def _turned(self, branches: list[Branch]) -> list[Branch]:
        """Return the branches, each time starting with another one."""
        at = self._turn % max(1, len(branches))
        return branches[at:] + branches[:at]

    async def _ask(self, shares: Mapping[Branch, Mapping[str, int]], limit: int) -> None:
        """Ask the members until one has answered. Raise `Unavailable` if all have failed.

        A busy member for which no slot is left is asked only if the others do not answer at once.
        A member that has failed is asked again after a pause, which holds up nobody else.
        """
        failed: dict[Branch, Unavailable] = {}
        limits: Mapping[Branch, int] = {}
        all_at = self._loop.time() + IDLE_AFTER
        while not self._arrived and not self._closed.done():
            now = self._loop.time()
            due = [b for b in shares if b in self._calls or b.retry_at <= now] or list(shares)
            later = [branch.retry_at for branch in shares if branch not in due]
            limits = limits or _limits({branch: shares[branch] for branch in due}, limit)
            if now < all_at and 0 in limits.values():
                due = [branch for branch in due if limits.get(branch, 1)]
                later.append(all_at)
            for branch in due:
                if branch not in self._calls:
                    call = self._receive(branch, shares[branch], limits.get(branch) or 1)
                    self._calls[branch] = asyncio.create_task(call)
            await asyncio.wait(
                {*self._calls.values(), self._closed},
                timeout=max(0.0, min(later) - now) if later else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._closed.done():
                return  # `close` has cancelled the calls
            for branch in [branch for branch, call in self._calls.items() if call.done()]:
                try:
                    self._calls.pop(branch).result()
                except Unavailable as error:
                    failed[branch] = error
                    if len(failed) == len(shares):
                        raise

    async def _receive(self, branch: Branch, wanted: Mapping[str, int], limit: int) -> None:
        deliveries = await branch.receive(wanted, limit)
        self._arrived += [(branch, delivery) for delivery in deliveries]

    async def _end_calls(self) -> None:
        """Cancel the calls in flight, and wait for them. Some may answer all the same."""
        calls = [*self._calls.values()]
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)
        self._calls.clear()
        for call in calls:
            if not call.cancelled():
                call.exception()  # otherwise asyncio logs that nobody retrieved it

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        """Return what this call may return of what has arrived, in the order of `wanted`."""
        order = list(wanted)
        arrived = Leftovers()
        arrived.add(
            _outer(branch.member, delivery)
            for branch, delivery in sorted(self._arrived, key=lambda a: order.index(a[1].queue))
        )
        taken = arrived.take(wanted, limit)
        returned = {delivery.fence.delivery for delivery in taken}
        self._arrived = [each for each in self._arrived if each[1] not in returned]
        return taken

    def _keep(self) -> None:
        """Keep for the next call what this one has not returned."""
        arrived, self._arrived = self._arrived, []
        for branch, delivery in arrived:
            branch.leftovers.add([delivery])

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        call = SettleCall(settlements)
        moving: dict[int, Retry] = {}
        staying: dict[int, Settlement] = {}
        for at, settlement in call.first.items():
            fence = settlement.delivery.fence
            is_moved = fence in self._moved
            if is_moved and call.keys[at] not in self._moved:
                continue  # another settlement of it has taken effect
            if isinstance(settlement, Retry) and not self._keeps(
                fence.member, settlement.message.queue
            ):
                moving[at] = settlement
            else:
                staying[at] = settlement
        if moving:
            await self._move(call, moving)
        outcomes = await self._settle(list(staying.values())) if staying else []
        for at, outcome in zip(staying, outcomes, strict=True):
            call.answer(at, outcome)
        return call.outcomes()

    async def _settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle deliveries at the members that they came from."""

        async def settle(member: Member, some: list[Settlement]) -> list[Outcome]:
            inner = [replace(each, delivery=each.delivery.fence.delivery) for each in some]
            return await self._branches[member].subscription.settle(inner)

        items = [(each.delivery.fence.member, each) for each in settlements]
        return await at_each(self._members, items, settle, self._settle_later)

    def _settle_later(self, member: Member, settlement: Settlement, error: Unavailable) -> Outcome:
        """Note a settlement for the time when its member is back.

        A retry is refused, and its delivery released: its record must not say that there is a next
        message, because that is not certain.
        """
        inner = settlement.delivery.fence.delivery
        is_ack = isinstance(settlement, Ack)
        self._branches[member].owed.append(Ack(inner) if is_ack else Release(inner))
        return Outcome("refused" if isinstance(settlement, Retry) else "unknown", str(error))

    async def _move(self, call: SettleCall, retries: Mapping[int, Retry]) -> None:
        """Publish the messages of retries at other members, then acknowledge the deliveries.

        A receiver without the lease must not publish anything, so that is asked first.
        """
        new = [at for at in retries if call.keys[at] not in self._moved]
        held = await self.extend([retries[at].delivery for at in new])
        mine = [at for at, delivery in zip(new, held, strict=True) if delivery is not None]
        outcomes = await self._send([retries[at].message for at in mine]) if mine else []
        for at, outcome in zip(mine, outcomes, strict=True):
            if outcome.status == "done":
                self._moved.add(retries[at].delivery.fence)
                self._moved.add(call.keys[at])
            else:
                call.answer(at, Outcome("refused", outcome.reason))
        moved = [at for at in retries if call.keys[at] in self._moved]
        acked = await self._settle([Ack(retries[at].delivery) for at in moved]) if moved else []
        for at, outcome in zip(moved, acked, strict=True):
            call.answer(at, outcome)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        async def extend(member: Member, some: list[Delivery]) -> list[Delivery | None]:
            inner = [each.fence.delivery for each in some]
            answers = await self._branches[member].subscription.extend(inner)
            return [
                old if new is old.fence.delivery else new and _outer(member, new)
                for old, new in zip(some, answers, strict=True)
            ]

        def as_before(member: Member, delivery: Delivery, error: Unavailable) -> Delivery | None:
            return delivery  # nobody knows; if the lease is lost, the settle is refused

        items = [(delivery.fence.member, delivery) for delivery in deliveries]
        return await at_each(self._members, items, extend, as_before)

    async def close(self) -> None:
        if self._closed.done():
            return
        self._closed.set_result(None)
        await self._end_calls()
        self._keep()
        await together([branch.close() for branch in self._branches.values()])


def _limits(shares: Mapping[Branch, Mapping[str, int]], limit: int) -> dict[Branch, int]:
    """Divide `limit` among branches.

    First come those that may have fetched deliveries for a cancelled call: they are asked for as
    many again. An idle branch is asked for 1, if others are busy. The busy ones share the rest, so
    one may get 0. What one does not want, the others get.
    """
    one_is_busy = any(branch.busy for branch in shares)
    most = {
        branch: branch.unsure or (sum(share.values()) if branch.busy or not one_is_busy else 1)
        for branch, share in shares.items()
    }
    limits: dict[Branch, int] = {}
    for branch in sorted(most, key=lambda b: (not (b.unsure or b.leftovers), b.busy, most[b])):
        left = max(0, limit - sum(limits.values()))
        even = left if branch.unsure else left // (len(most) - len(limits))
        may_get_none = any(limits.values()) and (branch.unsure or branch.busy)
        limits[branch] = max(0 if may_get_none else 1, min(most[branch], even))
    return limits


def _outer(member: Member, delivery: Delivery) -> Delivery:
    """Return a member's delivery as this subscription returns it."""
    return replace(delivery, fence=Fence(member, delivery))
