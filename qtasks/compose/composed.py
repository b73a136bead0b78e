"""What all brokers that are made of other brokers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import ClassVar
from weakref import WeakSet

from qtasks.compose.members import Member, at_each
from qtasks.compose.merged import Branch, MergedSubscription
from qtasks.compose.told import distinct, listed
from qtasks_core import (
    DONE,
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
from qtasks_core.receivers import Recent
from qtasks_core.schemas import EVENTS, ORDERS
from qtasks_core.together import together
from qtasks_core.transactions import refuse_transaction

_COMMANDS = ("broadcast", "commands")
_OUTAGES = (
    "while one broker is away and another answers, an acknowledgement for the first is `unknown`, "
    "and made when it is back; a retry for it is `refused`, so that attempt may run again"
)


class ComposedBroker(Broker):
    """A broker that is made of others, its members. A subclass says which of them has what.

    Commands go through the first member.
    """

    is_whole: ClassVar[bool]
    """Whether each queue is on one member. Otherwise its order and priorities hold on each member
    alone."""

    def __init__(self, *parts: Broker | str) -> None:
        """Take brokers, or URLs of brokers. Equal ones become one member."""
        members: dict[Broker | str, Member] = {}
        for part in parts:
            if not isinstance(part, Broker | str):
                raise ConfigurationError(f"{part!r} is neither a broker nor a URL")
            if part not in members:
                broker = resolve_broker(part) if isinstance(part, str) else part
                members[part] = Member(broker)
        self._of_parts = [members[part] for part in parts]
        """One member for each argument."""
        self._members = list(members.values())
        brokers = [member.broker for member in self._members]
        leases = {broker.guarantees.lease for broker in brokers}
        if len(leases) > 1:
            told = ", ".join(f"{b.guarantees.part}: {b.guarantees.lease} s" for b in brokers)
            raise ConfigurationError(f"different leases ({told}): give all the same lease=")
        self.driver_loggers = distinct(name for each in brokers for name in each.driver_loggers)
        self._subscriptions: WeakSet[MergedSubscription] = WeakSet()
        self._published = Recent()
        """Messages of calls in which another member has failed: those calls are repeated."""

    @abstractmethod
    def _home_of(self, message: TaskMessage) -> Member:
        """Return the member at which a message is published."""

    @abstractmethod
    def _holders_of(self, queue: str) -> Sequence[Member]:
        """Return the members from which a queue is received."""

    @property
    def guarantees(self) -> Guarantees:
        """What all members promise."""
        told = [member.broker.guarantees for member in self._members]
        alone = len(told) == 1
        whole = alone or self.is_whole
        survives = min((each.survives for each in told), key=EVENTS.index)
        best = min((each.at_best or each.survives for each in told), key=EVENTS.index)
        others_commands = [n for each in told[1:] for n in each.unsupported if n not in _COMMANDS]
        return Guarantees(
            part=type(self).__name__,
            server=listed(each.server for each in told),
            survives=survives,
            durability=listed(f"{each.part}: {each.durability}" for each in told),
            at_best=best if best != survives else None,
            best_settings=listed(each.best_settings for each in told),
            lease=told[0].lease,
            settle_confirmed=all(each.settle_confirmed for each in told),
            # A retry may name a queue of another member.
            atomic_retries=all(each.atomic_retries for each in told) and (alone or not whole),
            leases_survive=all(each.leases_survive for each in told),
            order=min((each.order for each in told), key=ORDERS.index) if whole else "none",
            largest=min((each.largest for each in told if each.largest is not None), default=None),
            counts_deliveries=all(each.counts_deliveries for each in told),
            priorities=whole and all(each.priorities for each in told),
            unsupported=distinct([*told[0].unsupported, *others_commands]),
            notes=(
                *((_OUTAGES,) if not alone else ()),
                *(f"{each.part}: {note}" for each in told for note in each.notes),
            ),
            advice=tuple(f"{each.part}: {line}" for each in told for line in each.advice),
        )

    async def start(self, namespace: str) -> None:
        try:
            for member in self._members:
                await member.broker.start(namespace)
        except BaseException:
            with suppress(Unavailable):
                await self.stop()
            raise

    async def stop(self) -> None:
        try:
            await together([subscription.close() for subscription in self._subscriptions])
        finally:
            await together([member.broker.stop() for member in self._members])

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self)
        keys = [_sending(message) for message in messages] if self._published else None
        outcomes = [DONE] * len(messages)
        left = [
            (at, message)
            for at, message in enumerate(messages)
            if keys is None or keys[at] not in self._published
        ]
        done: list[TaskMessage] = []

        async def publish(member: Member, some: list[TaskMessage]) -> list[Outcome]:
            answers = await member.broker.publish(some)
            done.extend(m for m, o in zip(some, answers, strict=True) if o.status == "done")
            return answers

        try:
            answers = await at_each(
                self._members, [(self._home_of(m), m) for _, m in left], publish, _unconfirmed
            )
        except BaseException:
            # The repeated call must not publish these again.
            for message in done:
                self._published.add(_sending(message))
            raise
        for (at, _), answer in zip(left, answers, strict=True):
            outcomes[at] = answer
        for key in keys or ():
            self._published.discard(key)
        return outcomes

    async def subscribe(self, queues: Mapping[str, int]) -> Subscription:
        shares: dict[Member, dict[str, int]] = {}
        for queue, most in queues.items():
            for member in self._holders_of(queue):
                shares.setdefault(member, {})[queue] = most
        branches: list[Branch] = []
        try:
            for member, share in shares.items():
                branches.append(Branch(member, share, await member.broker.subscribe(share)))
        except BaseException:
            await together([branch.close() for branch in branches])
            raise
        subscription = MergedSubscription(branches, self._keeps, self.publish)
        self._subscriptions.add(subscription)
        return subscription

    def _keeps(self, member: Member, queue: str) -> bool:
        """Return whether a retry into `queue` of a delivery of `member` stays there."""
        return member in self._holders_of(queue)

    async def clock(self) -> float | None:
        return await self._members[0].broker.clock()

    async def refresh(self) -> None:
        await together([member.broker.refresh() for member in self._members])

    async def depth(self, queue: str) -> QueueDepth:
        depths = await together([each.broker.depth(queue) for each in self._holders_of(queue)])
        ages = [each.oldest_age for each in depths if each.oldest_age is not None]
        return QueueDepth(
            ready=_sum(each.ready for each in depths),
            delayed=_sum(each.delayed for each in depths),
            in_flight=_sum(each.in_flight for each in depths),
            oldest_age=max(ages, default=None),
        )

    async def purge(self, queue: str) -> int:
        counts = await together([each.broker.purge(queue) for each in self._holders_of(queue)])
        return -1 if -1 in counts else sum(counts)

    async def broadcast(self, command: Command) -> None:
        await self._members[0].broker.broadcast(command)

    def commands(self) -> AsyncIterator[Command]:
        return self._members[0].broker.commands()

    async def migrate(self, namespace: str) -> list[str]:
        changes = await together([member.broker.migrate(namespace) for member in self._members])
        return [line for lines in changes for line in lines]


def _sending(message: TaskMessage) -> Hashable:
    """Return what identifies a message among others with the same effect."""
    return message.uuid, message.submission, message.attempt, message.reply_to


def _unconfirmed(member: Member, message: TaskMessage, error: Unavailable) -> Outcome:
    return Outcome("unknown", str(error))


def _sum(numbers: Iterable[int | None]) -> int | None:
    """Return the sum, or None if one of the numbers is unknown."""
    known = list(numbers)
    return None if None in known else sum(number or 0 for number in known)
