"""What all brokers that are made of brokers share."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from typing import ClassVar, TypeVar

from qtasks.compose.members import PAUSE, Branch, Member
from qtasks.compose.merged import MergedSubscription
from qtasks_core import (
    Broker,
    Command,
    Guarantees,
    Outcome,
    QueueDepth,
    Subscription,
    TaskMessage,
)
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.lookup import resolve_broker
from qtasks_core.schemas import EVENTS, ORDERS
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction

T = TypeVar("T")

logger = logging.getLogger("qtasks.compose")

MOVED = (
    "a retry that moves to another broker is published there before the old message is "
    "acknowledged: a crash in between leaves both, of which the engine drops the old one"
)
APART = "the order and the priorities of a queue hold on each broker alone"


class ComposedBroker(Broker):
    """A broker made of brokers. A subclass says which of them has what.

    Unless it says otherwise, each queue is on all of them, and commands come through any.
    """

    keeps_queues_whole: ClassVar[bool] = False
    """Whether a queue is on one member. Otherwise its order and priorities hold on each member."""

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
        whole = len(told) == 1 or self.keeps_queues_whole
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
            order=min((each.order for each in told), key=ORDERS.index) if whole else "none",
            largest=min((each.largest for each in told if each.largest is not None), default=None),
            counts_deliveries=all(each.counts_deliveries for each in told),
            priorities=whole and all(each.priorities for each in told),
            unsupported=tuple(dict.fromkeys(name for each in told for name in each.unsupported)),
            notes=(
                MOVED,
                *(() if whole else (APART,)),
                *(f"{each.part}: {note}" for each in told for note in each.notes),
            ),
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
        subscription = MergedSubscription(
            branches, keeps=self.keeps, send=self.send, closed=self._subscriptions.discard
        )
        self._subscriptions.add(subscription)
        try:
            await subscription.open()
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def at_one(self, call: Callable[[Broker], Awaitable[T]]) -> T:
        """Call at the first member that is there. Raises `Unavailable` if none is."""
        now = time.monotonic()
        error = Unavailable("there is no broker")
        for member in sorted(self.members, key=lambda member: member.away_until > now):
            try:
                return await call(await member.ready())
            except Unavailable as unavailable:
                error = unavailable
                member.away_until = time.monotonic() + PAUSE
        raise error

    async def all_ready(self) -> list[Broker]:
        """Return all members, started. Raises `Unavailable` if one is away."""
        return await together([member.ready() for member in self.members])

    async def clock(self) -> float | None:
        return await self.at_one(lambda broker: broker.clock())

    async def depth(self, queue: str) -> QueueDepth:
        return _sum(await together([each.depth(queue) for each in await self.all_ready()]))

    async def purge(self, queue: str) -> int:
        counts = await together([each.purge(queue) for each in await self.all_ready()])
        return -1 if -1 in counts else sum(counts)

    async def broadcast(self, command: Command) -> None:
        # Workers listen to all.
        await self.at_one(lambda broker: broker.broadcast(command))

    def commands(self) -> AsyncIterator[Command]:
        return commands_of_all(self.members)

    async def migrate(self, namespace: str) -> list[str]:
        changes = await together([member.broker.migrate(namespace) for member in self.members])
        return [line for lines in changes for line in lines]


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


def _sum(depths: Iterable[QueueDepth]) -> QueueDepth:
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


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
