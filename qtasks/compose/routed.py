"""A broker made of brokers: each queue has the one that suits it."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future, Task, TimerHandle
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

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
from qtasks_core.names import checked_name
from qtasks_core.receivers import Leftovers, Recent, SettleCall
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
    "a retry that moves to a queue of another broker is published there before the old message is "
    "acknowledged: a crash in between leaves both, of which the engine drops the old one"
)


class RoutedBroker(Broker):
    """Moves the messages of each queue through a broker of its own.

        broker = RoutedBroker("redis://localhost", {"events": "kafka://kafka:9092"})
        app = QueueTasks("shop", broker, "postgresql://localhost/shop")

    `default` has all queues that `routes` does not name, and the commands to workers. Brokers are
    given as URLs or as objects. All processes of an app need the same routes. To move a queue to
    another broker, first let workers empty it. Raises `ConfigurationError` for a wrong URL or name.
    """

    def __init__(self, default: Broker | str, routes: Mapping[str, Broker | str]) -> None:
        # Queues with one URL share one broker.
        urls = dict.fromkeys(b for b in (default, *routes.values()) if isinstance(b, str))
        built = {url: resolve_broker(url) for url in urls}

        def broker_of(given: Broker | str) -> Broker:
            broker = built[given] if isinstance(given, str) else given
            if not isinstance(broker, Broker):
                raise ConfigurationError(f"{broker!r} is neither a broker nor a URL")
            return broker

        self._default = broker_of(default)
        self._routes = {
            checked_name(queue, "a queue"): broker_of(given) for queue, given in routes.items()
        }
        self._brokers = list({id(b): b for b in (self._default, *self._routes.values())}.values())
        self._subscriptions: set[RoutedSubscription] = set()
        self.driver_loggers = tuple(
            dict.fromkeys(name for broker in self._brokers for name in broker.driver_loggers)
        )

    def broker_of(self, queue: str) -> Broker:
        """Return the broker of a queue."""
        return self._routes.get(queue, self._default)

    @property
    def guarantees(self) -> Guarantees:
        """What all of the brokers promise."""
        told = [broker.guarantees for broker in self._brokers]
        weakest = min(told, key=lambda each: EVENTS.index(each.survives))
        best = min((each.at_best or each.survives for each in told), key=EVENTS.index)
        return Guarantees(
            part="RoutedBroker",
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
        try:
            await together([broker.start(namespace) for broker in self._brokers])
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        try:
            await together([each.close() for each in self._subscriptions])
        finally:
            await together([broker.stop() for broker in self._brokers])

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        return await _spread(
            [(self.broker_of(message.queue), message) for message in messages],
            lambda broker, some: broker.publish(some),
        )

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        shares: dict[Broker, dict[str, int]] = {}
        for queue, most in queues.items():
            shares.setdefault(self.broker_of(queue), {})[queue] = most
        branches: dict[str, Branch] = {}
        try:
            for broker, share in shares.items():
                branch = Branch(await broker.subscribe(share), broker, self)
                branches |= dict.fromkeys(share, branch)
        except BaseException:
            opened = dict.fromkeys(branches.values())
            await together([branch.subscription.close() for branch in opened])
            raise
        subscription = RoutedSubscription(branches, self._subscriptions.discard)
        self._subscriptions.add(subscription)
        return subscription

    async def clock(self) -> float | None:
        return await self._default.clock()

    async def depth(self, queue: str) -> QueueDepth:
        return await self.broker_of(queue).depth(queue)

    async def purge(self, queue: str) -> int:
        return await self.broker_of(queue).purge(queue)

    async def broadcast(self, command: Command) -> None:
        await self._default.broadcast(command)

    def commands(self) -> AsyncIterator[Command]:
        return self._default.commands()

    async def migrate(self, namespace: str) -> list[str]:
        changes = await together([broker.migrate(namespace) for broker in self._brokers])
        return [line for lines in changes for line in lines]


class Branch:
    """The subscription at one of the brokers, and its retries that moved to other brokers."""

    def __init__(self, subscription: Subscription, home: Broker, broker: RoutedBroker) -> None:
        self.subscription = subscription
        self.retry_at = 0.0
        """The time of the loop before which it is not asked again, if another one can be asked."""
        self.away = False
        """Whether its last call of `receive` has failed."""
        self._home = home
        self._broker = broker
        self._published = Recent()
        """Moved retries whose new message is on another broker."""
        self._moved = Recent()
        """The fences of their deliveries."""
        self._settled = Recent()
        """Moved retries whose old message is acknowledged too."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle deliveries of this branch: here, but for the retries that move."""
        if not any(map(self._moves, settlements)) and not self._moved:
            return await self.subscription.settle(settlements)
        call = SettleCall(settlements, self._settled)
        await self._move(call, {at: each for at, each in call.first.items() if self._moves(each)})
        here = {
            at: each
            for at, each in call.first.items()
            if not self._moves(each) and each.delivery.fence not in self._moved
        }
        if here:
            outcomes = await self.subscription.settle(list(here.values()))
            for at, outcome in zip(here, outcomes, strict=True):
                call.answer(at, outcome)
        return call.outcomes()

    def _moves(self, settlement: Settlement) -> bool:
        """Return whether this is a retry whose message goes to another broker."""
        return (
            isinstance(settlement, Retry)
            and self._broker.broker_of(settlement.message.queue) is not self._home
        )

    async def _move(self, call: SettleCall, retries: Mapping[int, Settlement]) -> None:
        """Publish the new messages, then acknowledge the deliveries.

        A receiver without the lease must not publish anything, so that is asked first.
        """
        new = [at for at in retries if call.keys[at] not in self._published]
        held = await self.subscription.extend([retries[at].delivery for at in new]) if new else []
        mine = {
            at: each
            for at, ours in zip(new, held, strict=True)
            if ours is not None and isinstance(each := retries[at], Retry)
        }
        if mine:
            outcomes = await self._broker.publish([each.message for each in mine.values()])
            for at, outcome in zip(mine, outcomes, strict=True):
                if outcome.status == "done":
                    self._published.add(call.keys[at])
                    self._moved.add(retries[at].delivery.fence)
                else:
                    call.answer(at, outcome)
        moved = [at for at in retries if call.keys[at] in self._published]
        if moved:
            outcomes = await self.subscription.settle([Ack(retries[at].delivery) for at in moved])
            for at, outcome in zip(moved, outcomes, strict=True):
                if outcome.status == "done":
                    self._settled.add(call.done(at))
                else:
                    call.answer(at, outcome)


class RoutedSubscription(Subscription):
    """Receives from the subscriptions of several brokers at once.

    Each call asks all of them, and cancels the others once one has answered. That loses no
    delivery: what a server has handed over, its subscription returns at the next call.
    """

    def __init__(
        self, branches: Mapping[str, Branch], closed: Callable[[RoutedSubscription], None]
    ) -> None:
        """`branches` has the one of each queue. `closed` is called at the end."""
        self._branches = branches
        self._on_closed = closed
        self._calls: set[Task[None]] = set()
        self._leftovers = Leftovers()
        """If two answer at once, they may have more than one call can return."""
        self._resting: TimerHandle | None = None
        self._giving_back: set[Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._closed: Future[None] = self._loop.create_future()

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        shares: dict[Branch, dict[str, int]] = {}
        for queue, most in wanted.items():
            if most > 0:
                shares.setdefault(self._branches[queue], {})[queue] = most
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
            deliveries = await branch.subscription.receive(share, most)
        except Exception as error:  # noqa: BLE001  # `receive` raises it if all have failed
            failed[branch] = error
            branch.retry_at = self._loop.time() + PAUSE
            if not branch.away and not self._closed.done():
                logger.warning("no tasks of %s: %s", ", ".join(share), error)
            branch.away = True
        else:
            failed.pop(branch, None)
            branch.retry_at, branch.away = 0.0, False
            self._leftovers.add(deliveries)

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
        return await _spread(
            [(self._branches[each.delivery.queue], each) for each in settlements],
            lambda branch, some: branch.settle(some),
        )

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        return await _spread(
            [(self._branches[delivery.queue], delivery) for delivery in deliveries],
            lambda branch, some: branch.subscription.extend(some),
        )

    async def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        if self._resting is not None:
            self._resting.cancel()
        await self._end_calls()
        self._give_back()
        if self._giving_back:
            await asyncio.wait(self._giving_back)
        branches = dict.fromkeys(self._branches.values())
        await together([branch.subscription.close() for branch in branches])
        self._on_closed(self)


async def _spread(
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


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
