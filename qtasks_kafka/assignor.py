"""Assigns partitions to members: evenly, and as far as possible each member keeps its partitions.

A partition with records in flight never moves, because these would run twice. If another member
should have it, its owner is told: it owes the partition. It delivers no more from there, and asks
for a new assignment once nothing is in flight. So a rebalance never waits for tasks.

aiokafka's own sticky assignor does not fit. It keeps its state in the class, which all consumers of
a process share. It also cannot tell busy partitions from idle ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import msgspec
from aiokafka.coordinator.protocol import (
    ConsumerProtocolMemberAssignment,
    ConsumerProtocolMemberMetadata,
)
from msgspec import Struct

T = TypeVar("T")


class Holdings(Struct, frozen=True):
    """The data that a member sends when it joins. A partition is (topic, number)."""

    busy: list[tuple[str, int]] = []
    idle: list[tuple[str, int]] = []
    wanting: bool = True
    """False: the member finishes its records in flight and must get no other partition."""


Places: TypeAlias = list[tuple[str, int]]
"""Partitions, as (topic, number)."""


class KeepingAssignor:
    """Assigns partitions if the group elects its member. Each consumer has its own instance."""

    name = "qtasks-keeping"

    def __init__(self, holdings: Callable[[], Holdings], owing: Callable[[Places], None]) -> None:
        """Start with two functions of the member.

        `holdings` returns what it has, for each join. `owing` is called with each assignment,
        before the driver uses it: with the partitions that the member owes to others.
        """
        self._holdings = holdings
        self._owing = owing

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """Return the data that this member sends to the elected member."""
        return ConsumerProtocolMemberMetadata(
            0, list(topics), msgspec.msgpack.encode(self._holdings())
        )

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Tell the member which of its partitions it owes to others."""
        self._owing(_decoded(_places, assignment.user_data, []))

    def assign(
        self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Distribute the partitions of all topics among the members that want them."""
        holdings = {
            name: _decoded(_holdings, metadata.user_data, Holdings())
            for name, metadata in members.items()
        }
        subscribed: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(members):
            for topic in members[name].subscription:
                subscribed[topic].append(name)
        dealt: dict[str, dict[str, list[int]]] = {name: {} for name in members}
        owed: dict[str, Places] = {name: [] for name in members}
        load = dict.fromkeys(members, 0)
        for topic in sorted(subscribed):
            numbers = sorted(cluster.partitions_for_topic(topic) or ())
            fair = deal(topic, numbers, subscribed[topic], holdings, load)
            owners = keep_busy(topic, fair, subscribed[topic], holdings)
            for number, name in owners.items():
                if name != fair[number]:
                    owed[name].append((topic, number))
                dealt[name].setdefault(topic, []).append(number)
                load[fair[number]] += 1
        return {
            name: ConsumerProtocolMemberAssignment(
                0, sorted(topics.items()), msgspec.msgpack.encode(owed[name])
            )
            for name, topics in dealt.items()
        }


def deal(
    topic: str,
    numbers: list[int],
    names: list[str],
    holdings: Mapping[str, Holdings],
    load: Mapping[str, int],
) -> dict[int, str]:
    """Return the member for each partition of one topic. Unwanted partitions stay free."""
    owners: dict[int, str] = {}
    for name in names:
        if not holdings[name].wanting:
            owners.update((n, name) for t, n in holdings[name].busy if t == topic and n in numbers)
    wanting = [name for name in names if holdings[name].wanting]
    if not wanting:
        return owners
    fair, extra = divmod(len(numbers) - len(owners), len(wanting))
    counts = dict.fromkeys(wanting, 0)

    def give(number: int, name: str) -> None:
        nonlocal extra
        extra -= counts[name] == fair
        counts[name] += 1
        owners[number] = name

    for claims in ("busy", "idle"):
        for name in wanting:
            for claimed, number in getattr(holdings[name], claims):
                room = counts[name] < fair or (counts[name] == fair and extra > 0)
                if claimed == topic and number in numbers and number not in owners and room:
                    give(number, name)
    for number in numbers:
        if number not in owners:
            give(number, min(wanting, key=lambda name: (counts[name], load[name], name)))
    return owners


def keep_busy(
    topic: str, fair: Mapping[int, str], names: list[str], holdings: Mapping[str, Holdings]
) -> dict[int, str]:
    """Return the fair owners of one topic's partitions, but each busy one stays where it is."""
    busy = {n: name for name in names for t, n in holdings[name].busy if t == topic}
    return {number: busy.get(number, name) for number, name in fair.items()}


_holdings = msgspec.msgpack.Decoder(Holdings)
_places = msgspec.msgpack.Decoder(Places)


def _decoded(decoder: msgspec.msgpack.Decoder[T], user_data: bytes | None, default: T) -> T:
    """Return what a member or an assignment says; `default` if it says nothing that we know."""
    try:
        return decoder.decode(user_data or b"")
    except msgspec.MsgspecError:
        return default
