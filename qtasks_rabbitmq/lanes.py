"""The lanes of a task queue: one queue of the server for each priority in use.

The first message of a priority creates its lane. Only the lane of the usual priority always exists,
so a queue whose messages all have that priority costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtasks_core import Delivery
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.together import together
from qtasks_rabbitmq.topology import NOT_FOUND, PRIORITIES, USUAL, Names

if TYPE_CHECKING:
    from pamqp.base import Frame

    from qtasks_rabbitmq.channel import Channel
    from qtasks_rabbitmq.connection import Connection
    from qtasks_rabbitmq.lane import Lane

LaneName = tuple[str, int]
"""A task queue and a priority."""


class Lanes:
    """Receives from the lanes of one task queue, the highest priority first.

    The consumer of a single lane stays: each acknowledgement makes the server push the next
    message. With several lanes, that message could come from a low lane while a higher one has
    some. So then consumers exist only while `receive` waits.
    """

    def __init__(self, usual: Lane, connection: Connection) -> None:
        self._lanes = {USUAL: usual}
        self._connection = connection
        self._stale = False
        self.expected = False
        """Whether the lanes had messages when they were counted. Others may have taken them."""

    async def add(self, priority: int, lane: Lane) -> None:
        """Receive from one more lane. Raises `Unavailable`."""
        await self._pause()
        lanes = {**self._lanes, priority: lane}
        self._lanes = {each: lanes[each] for each in PRIORITIES if each in lanes}

    def needs(self, wanted: int) -> bool:
        """Return whether `prepare` has something to do."""
        if len(self._lanes) == 1:
            return self._lanes[USUAL].needs(wanted)
        if self._stale or any(lane.needs(0) for lane in self._lanes.values()):
            return True
        # If both are true, consumers are left to cancel. If both are false, none wait yet.
        return wanted > 0 and self._has_ready() == self._consumes()

    def count_again(self) -> None:
        """Make `prepare` look again where messages are."""
        self._stale = True

    async def prepare(self, wanted: int) -> None:
        """Reconnect if needed, and make up to `wanted` messages come. Raises `Unavailable`."""
        if len(self._lanes) == 1:
            await self._lanes[USUAL].prepare(wanted)
            return
        for lane in self._lanes.values():
            if lane.needs(0):
                await lane.prepare(0)
        if self._stale or self._consumes():
            await self._pause()
            self._stale = False
        if not self._has_ready():
            await self._consume(wanted)

    def take(self, most: int) -> list[Delivery]:
        """Return up to `most` of the deliveries that are here, the highest priority first."""
        deliveries: list[Delivery] = []
        for lane in self._lanes.values():
            for _ in range(min(most - len(deliveries), len(lane.ready))):
                deliveries.append(lane.ready.popleft()[0])
        return deliveries

    async def _consume(self, wanted: int) -> None:
        """Ask for the messages that wait in the highest lanes. If none wait, for one of each."""
        async with self._connection.asking() as channel:
            counts = await _count(channel, [lane.source for lane in self._lanes.values()])
        self.expected = any(counts)
        left = wanted
        plan: list[tuple[Lane, int]] = []
        for lane, count in zip(self._lanes.values(), counts, strict=True):
            share = min(left, count) if self.expected else 1
            if share:
                plan.append((lane, share))
            left -= share
        await together([lane.prepare(share) for lane, share in plan])

    async def _pause(self) -> None:
        """Cancel all consumers. What they were sent before is here afterwards."""
        await together([lane.cancel_consumers() for lane in self._lanes.values()])

    def _has_ready(self) -> bool:
        return any(lane.ready for lane in self._lanes.values())

    def _consumes(self) -> bool:
        return any(lane.consumes for lane in self._lanes.values())


async def find_lanes(channel: Channel, names: Names, queues: Sequence[str]) -> list[LaneName]:
    """Return the existing lanes of queues, without the usual ones.

    If no queue of the namespace has such a lane, it is a single question.
    """
    from pamqp.commands import Exchange, Queue

    if not await _exists(channel, Exchange.Declare(exchange=names.lanes, passive=True)):
        return []
    found: list[LaneName] = []
    for queue in queues:
        priorities = [priority for priority in PRIORITIES if priority != USUAL]
        exist = await together(
            [
                _exists(channel, Queue.Declare(queue=names.queue(queue, priority), passive=True))
                for priority in priorities
            ]
        )
        found += [(queue, p) for p, exists in zip(priorities, exist, strict=True) if exists]
    return found


async def _exists(channel: Channel, question: Frame) -> bool:
    """Return whether the queue or exchange of a passive declaration exists."""
    async with channel.aside() as aside:
        try:
            await aside.call(question)
        except Unavailable:
            if aside.close_code != NOT_FOUND:
                raise
            return False
        except ConfigurationError:
            # A user without any right to it cannot receive from it either.
            return False
    return True


async def _count(channel: Channel, sources: Sequence[str]) -> list[int]:
    """Return the numbers of ready messages in existing queues of the server."""
    from pamqp.commands import Queue

    async with channel.aside() as aside:
        questions = [Queue.Declare(queue=source, passive=True) for source in sources]
        answers = await aside.call(*questions)
    return [answer.message_count or 0 for answer in answers if isinstance(answer, Queue.DeclareOk)]
