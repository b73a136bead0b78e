"""Who gets which partition: evenly, and as far as that goes everyone keeps what it had.

A partition whose records are in flight is kept in preference to an idle one: a move would run
them twice. aiokafka's own sticky assignor keeps its memory in the class, shared by all consumers
of a process, and cannot tell busy from idle.
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
    """What a member says when it joins; partitions are (topic, number)."""

    busy: list[tuple[str, int]] = []
    idle: list[tuple[str, int]] = []
    wanting: bool = True
    """False: it finishes what it has in flight and must get nothing else."""


class KeepingAssignor:
    """Assigns for the member that the group elects; one instance a consumer."""

    name = "qtasks-keeping"

    def __init__(self, holdings: Callable[[], Holdings]) -> None:
        self._holdings = holdings

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """Return what this member tells the elected one."""
        return ConsumerProtocolMemberMetadata(
            0, list(topics), msgspec.msgpack.encode(self._holdings())
        )

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Do nothing: the member remembers what it holds."""

    def assign(
        self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Deal the partitions of all topics to the members that want them."""
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
    """Return who gets each partition of one topic; what nobody wants stays free."""
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
