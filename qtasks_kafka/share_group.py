"""A share group: its configuration, a member that stays in it, and the leaders of its partitions.

The server assigns partitions to members, so that each connects to few servers. It does not insist
on that, and here every worker fetches from all partitions. Otherwise a message would wait for the
workers that have its partition, though others are idle, and for `group.share.session.timeout.ms`
(45 s by default) once those have died.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Task
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Any, NamedTuple

from aiokafka.structs import TopicPartition

from qtasks_core.errors import ConfigurationError, QTasksError, Unavailable
from qtasks_kafka.connection import PAUSE, Connection
from qtasks_kafka.floor import Floor
from qtasks_kafka.looking import looking, places_of
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.share_protocol import (
    ACCEPT,
    INVALID_CONFIG,
    NO_GROUP,
    TO_GROUP,
    UNKNOWN_MEMBERS,
    AlterConfigs,
    Call,
    Describe,
    DescribeConfigs,
    Heartbeat,
    Metadata,
    Offsets,
)
from qtasks_kafka.share_session import Place, ShareSession, new_id

logger = logging.getLogger("qtasks.kafka")

RESET, LOCK, LIMIT, WINDOW = (
    "share.auto.offset.reset",
    "share.record.lock.duration.ms",
    "share.delivery.count.limit",
    "share.partition.max.record.locks",
)
WISHES = {LIMIT: "10", WINDOW: "4000"}
"""The greatest values that a server allows by default. They are set where it allows them."""
DEFAULT_LIMIT = 5
"""The limit of deliveries where the server does not tell it."""
DEFAULT_LOCK = 30_000
"""Milliseconds of the lock where the server does not tell them."""
PURGED = 500
"""How many records are purged together."""
_WITHOUT_MEMBERS = ("Empty", "Dead")
JOIN = 2 * REQUEST
"""Seconds within which a server that has just started must know its groups."""
LOOK_AGAIN = 10.0
"""Seconds after which new partitions of a topic are noticed."""


class Configured(NamedTuple):
    """How a group is configured."""

    lock: float = inf
    """The longest time in seconds for which the server locks an acquired record."""
    changed: Sequence[str] = ()
    """What was changed, as `name=value`."""
    limit: int = int(WISHES[LIMIT])
    """After so many deliveries the server archives a record: nobody gets it any more."""


class ShareGroup:
    """Keeps one member in a group that subscribes to topics, from `open` to `close`."""

    def __init__(
        self, connection: Connection, group: str, topics: Sequence[str], lease: float
    ) -> None:
        self._connection = connection
        self._group = group
        self._topics = list(topics)
        self._lease = lease
        self._member = new_id()
        self._epoch = 0
        self._coordinator: int | None = None
        self._interval = 1.0
        self._staying: Task[None] | None = None
        self._looked = float("-inf")
        self._nodes: dict[int, tuple[str, int]] = {}
        self._led: dict[int, dict[str, list[Place]]] = {}
        """The partitions that each server leads, by topic."""
        self._sessions: dict[int, ShareSession] = {}
        self._floor = Floor(connection, "the topic grows")
        self._configured = Configured()

    async def open(self) -> None:
        """Configure the group and join it. Raises `Unavailable`, `ConfigurationError`."""
        self._configured = await configured(self._connection, self._group, self._lease)
        with self._connection.reaching():
            async with asyncio.timeout(JOIN):
                while True:
                    try:
                        await self._beat()
                        break
                    except Unavailable:
                        # A server that has just started does not know its groups yet.
                        await asyncio.sleep(PAUSE)
        await self.look()
        self._staying = asyncio.create_task(self._stay())

    async def close(self) -> None:
        """Leave the group, if the server answers. Idempotent."""
        staying, self._staying = self._staying, None
        if staying is not None:
            staying.cancel()
            await asyncio.wait({staying})
            await self._floor.close(delete=False)
            self._epoch = -1
            with suppress(QTasksError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._beat()
        for session in self._sessions.values():
            await session.close()
        self._sessions = {}

    async def _stay(self) -> None:
        """Send heartbeats. Without them the server forgets the group's progress at last."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self._beat()
                await self._note_finished()
            except QTasksError as error:
                logger.debug("the group %s hears nothing from here: %s", self._group, error)

    async def _note_finished(self) -> None:
        """Have the records deleted that come before the first unfinished one of each partition."""
        accepting = [session for session in self._sessions.values() if session.accepted]
        if accepting:
            for session in accepting:
                session.accepted = False
            found = await positions(self._connection, self._group, self._topics)
            self._floor.note({at: position.start for at, position in found.items()})

    async def _beat(self) -> None:
        joining = self._epoch == 0
        admin = self._connection.started()
        with self._connection.reaching():
            if self._coordinator is None:
                self._coordinator = await admin.find_coordinator(self._group)
            try:
                topics = sorted(self._topics) if joining else None
                answer = await admin._send_request(
                    Call(Heartbeat, self._group, self._member, self._epoch, None, topics),
                    self._coordinator,
                )
                if answer.error_code in UNKNOWN_MEMBERS:
                    self._epoch = 0
                    return
                check(self._connection, answer.error_code, answer.error_message, self._group)
            except BaseException:
                self._coordinator = None
                raise
        self._epoch = answer.member_epoch
        self._interval = max(answer.heartbeat_interval_ms / 1000, PAUSE)

    async def look(self) -> None:
        """Ask who leads the partitions. Raises `Unavailable`."""
        self._nodes, self._led = await leaders(self._connection, self._topics)
        self._looked = asyncio.get_running_loop().time()

    async def sessions(
        self, topics: Iterable[str]
    ) -> list[tuple[ShareSession, dict[str, list[Place]]]]:
        """Return the session with each server that leads partitions of these topics, and those."""
        if asyncio.get_running_loop().time() - self._looked > LOOK_AGAIN:
            await self.look()
        found: list[tuple[ShareSession, dict[str, list[Place]]]] = []
        for node, led in self._led.items():
            places = {topic: led[topic] for topic in topics if topic in led}
            if not places:
                continue
            session = self._sessions.get(node)
            if session is not None and session.broken:
                # An operator may have configured the group anew.
                self._configured = await configured(self._connection, self._group, self._lease)
            if session is None or session.broken:
                session = self._sessions[node] = ShareSession(
                    self._connection,
                    self._group,
                    self._nodes[node],
                    lease=self._lease,
                    longest_lock=self._configured.lock,
                )
            found.append((session, places))
        return found

    @property
    def worn(self) -> int:
        """A record that the server has delivered more often is replaced by a copy.

        An operator may have set the lowest limit, 2. If a worker dies before it has made the copy,
        the next one makes it, so the default of 5 allows for three deaths.
        """
        return min(2, self._configured.limit // 2)

    def stale(self) -> None:
        """Ask for the leaders before the next use: a request has failed."""
        self._looked = float("-inf")

    def holding(self) -> bool:
        """Return whether a record is held."""
        return any(session.holding() for session in list(self._sessions.values()))


async def leaders(
    connection: Connection, topics: Iterable[str]
) -> tuple[dict[int, tuple[str, int]], dict[int, dict[str, list[Place]]]]:
    """Return the addresses of servers, and the partitions that each leads, by topic."""
    request = Call(Metadata, [(bytes(16), topic, {}) for topic in topics], False, False)
    with connection.reaching():
        async with asyncio.timeout(REQUEST):
            answer = await connection.started()._send_request(request)
    led: dict[int, dict[str, list[Place]]] = {}
    for error, name, topic, _, partitions, *_ in answer.topics:
        connection.check(error, name)
        for _, number, leader, *_ in partitions:
            if leader >= 0:
                led.setdefault(leader, {}).setdefault(name, []).append((topic, number))
    return {node: (host, port) for node, host, port, *_ in answer.brokers}, led


async def configured(connection: Connection, group: str, lease: float) -> Configured:
    """Configure a group as far as needed.

    It must start with the oldest messages, and its lock must not be longer than the lease. Raises
    `Unavailable`, `ConfigurationError`.
    """
    found = await _described(connection, group)
    lock = int(found.get(LOCK, DEFAULT_LOCK))
    wanted: dict[str, str] = {}
    if found.get(RESET) != "earliest":
        # Another lock time than the default shows whether a server knows all of this.
        lock = min(int(lease * 1000), lock - 1)
        wanted = {RESET: "earliest", LOCK: str(lock)}
        wishes = {name: value for name, value in WISHES.items() if found.get(name, value) != value}
        if wishes and (await _alter(connection, group, wanted | wishes))[0] == 0:
            return Configured(lock / 1000, _settings(wanted | wishes))
    elif lock > lease * 1000:
        lock = int(lease * 1000)
        wanted = {LOCK: str(lock)}
    if wanted:
        code, said = await _alter(connection, group, wanted)
        if code == INVALID_CONFIG:
            raise ConfigurationError(
                f"Kafka at {connection.shown} refuses this lease: it must not be shorter than the "
                f"server's group.share.min.record.lock.duration.ms, 15 s by default ({said})"
            )
        if code:
            settings = ",".join(_settings(wanted))
            raise ConfigurationError(
                f"Kafka at {connection.shown}: the group {group} must be configured, and this user "
                f"may not do that ({said}). Give it ALTER_CONFIGS on the group, or let an operator "
                f"run: kafka-configs.sh --alter --group {group} --add-config {settings}"
            )
    return Configured(lock / 1000, _settings(wanted), int(found.get(LIMIT, DEFAULT_LIMIT)))


def _settings(wanted: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in wanted.items()]


async def _described(connection: Connection, group: str) -> Mapping[str, str]:
    """Return a group's settings, as far as this user may see them."""
    request = Call(DescribeConfigs, [(TO_GROUP, group, None, {})], False, False)
    ((code, said, _, _, configs, _),) = (await _request(connection, request)).results
    if code:
        logger.debug("the settings of the group %s cannot be read: %s", group, said)
        return {}
    return {name: value for name, value, *_ in configs}


async def _alter(connection: Connection, group: str, wanted: Mapping[str, str]) -> tuple[int, str]:
    """Change settings of a group. Return the code of the server's error and its words."""
    configs: list[Any] = [(name, 0, value, {}) for name, value in wanted.items()]
    request = Call(AlterConfigs, [(TO_GROUP, group, configs, {})], False)
    ((code, said, *_),) = (await _request(connection, request)).results
    return code, said or f"error {code}"


async def _request(connection: Connection, request: Call, node: int | None = None) -> Any:
    with connection.reaching():
        async with asyncio.timeout(REQUEST):
            return await connection.started()._send_request(request, node)


class Position(NamedTuple):
    """How far a group has come in a partition."""

    start: int
    """The first offset that is not finished; -1 before the first fetch."""
    lag: int
    """How many records are not finished; -1 before the first fetch."""


async def positions(
    connection: Connection, group: str, topics: Iterable[str]
) -> dict[TopicPartition, Position]:
    """Return how far a group has come in topics."""
    asked: list[Any] = [(topic, await connection.partitions(topic), {}) for topic in topics]
    request = Call(Offsets, [(group, asked, {})])
    answer = await _request(connection, request, await coordinator(connection, group))
    ((_, answered, code, said, _),) = answer.groups
    if code == NO_GROUP:
        return {}
    check(connection, code, said, group)
    return {
        TopicPartition(topic, number): Position(start, lag)
        for topic, _, partitions, _ in answered
        for number, start, _, lag, *_ in partitions
    }


async def unfinished(connection: Connection, group: str, topic: str) -> int:
    """Count the records of a topic that the group has not finished."""
    found = await positions(connection, group, [topic])
    lags = {at.partition: position.lag for at, position in found.items()}
    unread = [at for at in await connection.partitions(topic) if lags.get(at, -1) < 0]
    kept = await _kept(connection, group, topic, unread)
    return kept + sum(lag for lag in lags.values() if lag > 0)


async def has_members(connection: Connection, group: str) -> bool:
    """Return whether a worker is in the group."""
    node = await coordinator(connection, group)
    ((code, said, _, state),) = (
        await _request(connection, Call(Describe, [group], False), node)
    ).groups
    if code == NO_GROUP:
        return False
    check(connection, code, said, group)
    return state not in _WITHOUT_MEMBERS


async def coordinator(connection: Connection, group: str) -> int:
    """Return the server that keeps the group."""
    with connection.reaching():
        async with asyncio.timeout(REQUEST):
            node: int = await connection.started().find_coordinator(group)
    return node


async def _kept(connection: Connection, group: str, topic: str, numbers: Sequence[int]) -> int:
    """Return how many records partitions have."""
    if not numbers:
        return 0
    async with looking(connection, group) as (looker, _):
        return await looker.kept(places_of(topic, numbers))


async def taken_away(connection: Connection, group: str, topic: str, lease: float) -> int:
    """Take all records of a topic that nobody holds, as a worker does, and return their number."""
    if not await connection.partitions(topic):
        return 0
    member = ShareGroup(connection, group, [topic], lease)
    count = 0
    try:
        await member.open()
        for session, places in await member.sessions([topic]):
            some = places[topic]
            # An answer may have the records of one partition only, so each is asked by itself.
            for place in some:
                while records := (await session.fetch([place], PURGED, wait=False))[0]:
                    answers = [session.settle(record, ACCEPT, ACCEPT) for record in records]
                    await asyncio.wait(answers)
                    count += sum(answer.result() for answer in answers)
    finally:
        await member.close()
    return count


def check(connection: Connection, code: int, said: str | None, group: str) -> None:
    """Raise the error that the answer of a group's coordinator means. Zero means none."""
    if code == NO_GROUP:
        raise ConfigurationError(
            f"Kafka at {connection.shown}: {said or group} It belongs to workers of kafka://. "
            "Their group has the same name, so that the two never run one message twice. Stop "
            f"those workers, then delete it: kafka-consumer-groups.sh --delete --group {group}"
        )
    connection.check(code, said or group)
