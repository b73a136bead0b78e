"""What all brokers that are made of brokers share: their parts, and a subscription to several."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from asyncio import Future, Task, TimerHandle
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from qtasks_core import (
    Ack,
    Broker,
    Command,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Release,
    Retry,
    Settlement,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import Closed, ConfigurationError, Unavailable
from qtasks_core.lookup import resolve_broker
from qtasks_core.receivers import Leftovers, Recent, SettleCall, Shielded
from qtasks_core.schemas import EVENTS, ORDERS
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction

Home = TypeVar("Home")
Item = TypeVar("Item")
T = TypeVar("T")

logger = logging.getLogger("qtasks.compose")

PAUSE = 1.0
"""Seconds before a broker that has failed is asked again, while others are there."""
IDLE = 0.5
"""Seconds that a delivery which no call has returned waits for one, before others get it."""
MOVED = (
    "a retry that moves to another broker is published there before the old message is "
    "acknowledged: a crash in between leaves both, of which the engine drops the old one"
)


class Member:
    """One of the brokers. It is started when it is first needed, so others need not wait for it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._namespace: str | None = None
        self._starting: asyncio.Lock | None = None
        self._started = False

    async def ready(self) -> Broker:
        """Return the broker, started. Raises the errors of `Broker.start`, and `Closed`."""
        if self._namespace is None or self._starting is None:
            raise Closed("the broker is not started, or stopped")
        if not self._started:
            async with self._starting:
                if not self._started:
                    await self.broker.start(self._namespace)
                    self._started = True
        return self.broker

    async def start(self, namespace: str) -> None:
        """Start the broker."""
        self._namespace, self._starting = namespace, asyncio.Lock()
        await self.ready()

    async def stop(self) -> None:
        """Stop the broker. Idempotent."""
        self._namespace, self._started = None, False
        await self.broker.stop()


class ComposedBroker(Broker):
    """A broker made of brokers. A class below says which of them has what."""

    def __init__(self, *parts: Broker | str) -> None:
        """Take brokers, or URLs of brokers. Equal ones become one member."""
        built: dict[str, Broker] = {}
        self.members: list[Member] = []
        """One for each broker."""
        self.of_parts: list[Member] = []
        """One for each of the arguments."""
        known: dict[int, Member] = {}
        for part in parts:
            if isinstance(part, str):
                broker = built[part] = built.get(part) or resolve_broker(part)
            elif isinstance(part, Broker):
                broker = part
            else:
                raise ConfigurationError(f"{part!r} is neither a broker nor a URL")
            if id(broker) not in known:
                known[id(broker)] = Member(broker)
                self.members.append(known[id(broker)])
            self.of_parts.append(known[id(broker)])
        self.driver_loggers = tuple(
            dict.fromkeys(name for member in self.members for name in member.broker.driver_loggers)
        )
        self._subscriptions: set[MergedSubscription] = set()

    @abstractmethod
    def keeps(self, member: Member, queue: str) -> bool:
        """Return whether a retry into `queue` of a delivery of `member` stays there."""

    @abstractmethod
    def shares(self, queues: Mapping[str, int]) -> list[tuple[Member, dict[str, int]]]:
        """Return which queues a subscription receives from which members."""

    @property
    def guarantees(self) -> Guarantees:
        """What all members promise."""
        told = [member.broker.guarantees for member in self.members]
        weakest = min(told, key=lambda each: EVENTS.index(each.survives))
        best = min((each.at_best or each.survives for each in told), key=EVENTS.index)
        return Guarantees(
            part=type(self).__name__,
            server=_listed(each.server for each in told),
            survives=weakest.survives,
            durability=_listed(f"{each.part}: {each.durability}" for each in told),
            at_best=best if best != weakest.survives else None,
            best_settings=_listed(each.best_settings for each in told),
            lease=min((each.lease for each in told if each.lease is not None), default=None),
            settle_confirmed=all(each.settle_confirmed for each in told),
            atomic_retries=len(told) == 1 and told[0].atomic_retries,
            leases_survive=all(each.leases_survive for each in told),
            order=min((each.order for each in told), key=ORDERS.index),
            largest=min((each.largest for each in told if each.largest is not None), default=None),
            counts_deliveries=all(each.counts_deliveries for each in told),
            priorities=all(each.priorities for each in told),
            unsupported=tuple(dict.fromkeys(name for each in told for name in each.unsupported)),
            notes=(MOVED, *(f"{each.part}: {note}" for each in told for note in each.notes)),
        )

    async def start(self, namespace: str) -> None:
        starts = [member.start(namespace) for member in self.members]
        errors = await asyncio.gather(*starts, return_exceptions=True)
        away = [error for error in errors if isinstance(error, Unavailable)]
        failed = [error for error in errors if error is not None and error not in away]
        if failed or len(away) == len(self.members):
            await self.stop()
            raise (failed or away)[0]
        for error in away:
            logger.warning("starting without one of the brokers: %s", error)

    async def stop(self) -> None:
        try:
            await together([each.close() for each in self._subscriptions])
        finally:
            await together([member.stop() for member in self.members])

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        return await self.send(messages)

    @abstractmethod
    async def send(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish messages at the members that they are for."""

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        branches = [Branch(member, share) for member, share in self.shares(queues)]
        subscription = MergedSubscription(self, branches, self._subscriptions.discard)
        self._subscriptions.add(subscription)
        try:
            await subscription.open()
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def migrate(self, namespace: str) -> list[str]:
        changes = await together([member.broker.migrate(namespace) for member in self.members])
        return [line for lines in changes for line in lines]


class Branch:
    """What a subscription has of one member. It is opened when the member is there."""

    def __init__(self, member: Member, queues: Mapping[str, int]) -> None:
        self.member = member
        self.queues = queues
        self.retry_at = 0.0
        """The time of the loop before which it is not asked again, if another one can be asked."""
        self.away = False
        """Whether its last call of `receive` has failed."""
        self._opening: Shielded[Subscription] = Shielded()
        self._subscription: Subscription | None = None

    async def subscription(self) -> Subscription:
        """Return the member's subscription. Raises the errors of `Broker.subscribe`."""
        if self._subscription is None:
            # Others answer meanwhile, and so cancel the caller again and again.
            self._subscription = await self._opening.run(self._open)
        return self._subscription

    async def _open(self) -> Subscription:
        return await (await self.member.ready()).subscribe(self.queues)

    async def close(self) -> None:
        """Close the subscription, if there is one."""
        subscription = self._subscription or await self._opening.abandon()
        if subscription is not None:
            await subscription.close()


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
        broker: ComposedBroker,
        branches: Sequence[Branch],
        closed: Callable[[MergedSubscription], None],
    ) -> None:
        """`closed` is called at the end."""
        self._broker = broker
        self._branches = branches
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
        return isinstance(settlement, Retry) and not self._broker.keeps(
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
            outcomes = await self._broker.send([each.message for each in mine.values()])
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


def sum_of(depths: Iterable[QueueDepth]) -> QueueDepth:
    """Return how many messages are in a queue of several brokers."""
    found = list(depths)
    ages = [each.oldest_age for each in found if each.oldest_age is not None]
    return QueueDepth(
        ready=_total(each.ready for each in found),
        delayed=_total(each.delayed for each in found),
        in_flight=_total(each.in_flight for each in found),
        oldest_age=max(ages, default=None),
    )


def _total(numbers: Iterable[int | None]) -> int | None:
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


async def commands_of(member: Member) -> AsyncGenerator[Command, None]:
    """Yield the commands of a broker."""
    commands = (await member.ready()).commands()
    try:
        async for command in commands:
            yield command
    finally:
        if isinstance(commands, AsyncGenerator):
            await commands.aclose()


async def commands_of_all(members: Sequence[Member]) -> AsyncGenerator[Command, None]:
    """Yield the commands of several brokers. One that is away is asked again, so no step fails."""
    heard: asyncio.Queue[Command | Exception] = asyncio.Queue()

    async def listen(member: Member) -> None:
        try:
            while True:
                try:
                    async for command in commands_of(member):
                        heard.put_nowait(command)
                except Unavailable as error:
                    logger.debug("no commands of a broker that is away: %s", error)
                await asyncio.sleep(PAUSE)
        except Exception as error:  # noqa: BLE001  # a step raises it
            heard.put_nowait(error)

    listening = [asyncio.create_task(listen(member)) for member in members]
    try:
        while True:
            word = await heard.get()
            if isinstance(word, Exception):
                raise word
            yield word
    finally:
        for task in listening:
            task.cancel()
        await asyncio.wait(listening)


def _bare(delivery: Delivery) -> Delivery:
    """Return a delivery as its own subscription knows it."""
    return replace(delivery, fence=delivery.fence.fence)


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
