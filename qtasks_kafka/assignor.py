"""Assigns partitions to members: evenly, and as far as possible each member keeps its partitions.

Members keep partitions with records in flight rather than idle ones. A move would run these records
twice. aiokafka's own sticky assignor does not fit. It keeps its state in the class, which all
consumers of a process share. It also cannot tell busy partitions from idle ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from aiokafka.coordinator.protocol import (
    ConsumerProtocolMemberAssignment,
    ConsumerProtocolMemberMetadata,
)
from msgspec import Struct


class Holdings(Struct, frozen=True):
    """The data that a member sends when it joins. A partition is (topic, number)."""

    busy: list[tuple[str, int]] = []
    idle: list[tuple[str, int]] = []
    wanting: bool = True
    """False: the member finishes its records in flight and must get no other partition."""


class KeepingAssignor:
    """Assigns partitions if the group elects its member. Each consumer has its own instance."""

    name = "qtasks-keeping"

    def __init__(self, holdings: Callable[[], Holdings]) -> None:
        self._holdings = holdings

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """Return the data that this member sends to the elected member."""
        return ConsumerProtocolMemberMetadata(
            0, list(topics), msgspec.msgpack.encode(self._holdings())
        )

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Do nothing: `Membership` remembers its partitions."""

    def assign(
        self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Distribute the partitions of all topics among the members that want them."""
        holdings = {name: _read(metadata.user_data) for name, metadata in members.items()}
        subscribed: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(members):
            for topic in members[name].subscription:
                subscribed[topic].append(name)
        dealt: dict[str, dict[str, list[int]]] = {name: {} for name in members}
        load = dict.fromkeys(members, 0)
        for topic in sorted(subscribed):
            numbers = sorted(cluster.partitions_for_topic(topic) or ())
            owners = deal(topic, numbers, subscribed[topic], holdings, load)
            for number, name in owners.items():
                dealt[name].setdefault(topic, []).append(number)
                load[name] += 1
        return {
            name: ConsumerProtocolMemberAssignment(0, sorted(topics.items()), b"")
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


def _read(user_data: bytes | None) -> Holdings:
    try:
        return msgspec.msgpack.decode(user_data or b"", type=Holdings)
    except msgspec.MsgspecError:
        return Holdings()
