"""A subscription on a share group: each record is locked, acknowledged and renewed on its own."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future, Task
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from qtasks_core import Delivery, Outcome, Release, Retry, Settlement, Subscription
from qtasks_core.errors import Closed, QTasksError
from qtasks_core.receivers import Leftovers, SettleCall, effect_of
from qtasks_core.wire import decode_message
from qtasks_kafka.connection import PAUSE, Connection
from qtasks_kafka.share_group import ShareGroup
from qtasks_kafka.share_protocol import ACCEPT, RELEASE
from qtasks_kafka.share_session import PRIOR, WAIT, Acquired, Place, ShareSession
from qtasks_kafka.subscription import Publisher
from qtasks_kafka.writer import Record

logger = logging.getLogger("qtasks.kafka")

IDLE = 1.0
"""Seconds that a record which no call has returned waits for one, before others get it."""


UNANSWERED = Outcome("unknown", "the connection broke before the server had answered")


class _Obeyed:
    """The settlements that the server has obeyed, by their keys: each record knows its own."""

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, tuple)
        record, effect = key
        return bool(record.settled == effect)


_OBEYED = _Obeyed()


class ShareSubscription(Subscription):
    """Receives from all partitions of its queues, whoever else does so."""

    def __init__(
        self,
        broker: Publisher,
        connection: Connection,
        group: ShareGroup,
        topics: Mapping[str, str],
        left: Callable[[ShareSubscription], None],
    ) -> None:
        self._broker = broker
        self._connection = connection
        self._group = group
        self._left = left
        """Called once the subscription holds nothing any more, and cannot get anything."""
        self._topics = {queue: topic for topic, queue in topics.items()}
        self._leftovers = Leftovers()
        self._fetching: dict[ShareSession, Task[None]] = {}
        self._error: QTasksError | None = None
        """Why the last request failed, until a `receive` has raised it."""
        self._receiving = False
        self._idle: asyncio.TimerHandle | None = None
        self._giving_back: set[Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._leaving: Task[None] | None = None
        self._closed: Future[None] = self._loop.create_future()

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        self._receiving = True
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        try:
            while not self._closed.done():
                if deliveries := self._take(wanted, limit):
                    return deliveries
                error, self._error = self._error, None
                if error is not None:
                    raise error
                await self._fetch({q: most for q, most in wanted.items() if most > 0}, limit)
        finally:
            self._receiving = False
            self._rest()
        raise Closed("the subscription is closed")

    def _take(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        now = self._loop.time()
        taken = self._leftovers.take(wanted, limit)
        return [delivery for delivery in taken if delivery.fence.held(now)]

    async def _fetch(self, wanted: Mapping[str, int], limit: int) -> None:
        """Fetch once, and wait for an answer. What comes is kept in the leftovers.

        First, ask for what is there, one queue after the other, so that the first one comes first.
        """
        sources = await self._group.sessions([self._topics[queue] for queue in wanted])
        if len(wanted) > 1 or len(sources) > 1:
            for queue, most in wanted.items():
                asked = self._ask(sources, {queue: most}, limit, wait=False)
                if asked:
                    await asyncio.wait(asked)
                if self._leftovers or self._error or self._closed.done():
                    return
        self._ask(sources, wanted, limit, wait=True)
        if self._fetching:
            waiting = {*self._fetching.values(), self._closed}
            await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
        else:  # no partition has a leader
            self._group.stale()
            await asyncio.wait({self._closed}, timeout=PAUSE)

    def _ask(
        self,
        sources: Iterable[tuple[ShareSession, Mapping[str, list[Place]]]],
        wanted: Mapping[str, int],
        limit: int,
        *,
        wait: bool,
    ) -> list[Task[None]]:
        """Start a request to each server that has none under way.

        Together they ask for no more records than are wanted, but each for one at least.
        """
        topics = {self._topics[queue]: queue for queue in wanted}
        idle = [
            (session, {topic: some for topic, some in places.items() if topic in topics})
            for session, places in sources
            if session not in self._fetching
        ]
        idle = [(session, places) for session, places in idle if places]
        if not idle:
            return []
        most = max(1, min(limit, *wanted.values()) // len(idle))
        asked: list[Task[None]] = []
        for session, places in idle:
            task = asyncio.create_task(self._acquire(session, places, most, wait=wait))
            self._fetching[session] = task
            task.add_done_callback(partial(self._fetched, session))
            asked.append(task)
        return asked

    async def _acquire(
        self, session: ShareSession, places: Mapping[str, list[Place]], most: int, *, wait: bool
    ) -> None:
        """Acquire records and keep their deliveries in the leftovers."""
        try:
            asked = [place for some in places.values() for place in some]
            records, failed = await session.fetch(asked, most, wait=wait)
            if failed:
                self._group.stale()
                if not records:
                    await asyncio.sleep(PAUSE)
        except QTasksError as error:
            self._group.stale()
            self._error = error
            return
        topics = {topic_id: topic for topic, ((topic_id, _), *_) in places.items()}
        worn = [record for record in records if record.count > self._group.worn]
        copied = await self._copy(worn, topics) if worn else set()
        queues = {topic: queue for queue, topic in self._topics.items()}
        for record in records:
            if record not in copied:
                queue = queues[topics[record.place[0]]]
                count = record.prior + record.count
                delivery = Delivery(decode_message(record.value), queue, record, count)
                self._leftovers.add([delivery])

    async def _copy(
        self, records: Sequence[Acquired], topics: Mapping[bytes, str]
    ) -> set[Acquired]:
        """Replace records by copies, and return those: the server counts a copy anew.

        It archives a record after a number of deliveries, so that nobody gets it any more. How
        often a task may be delivered is decided by the engine alone. A record that cannot be
        copied now is copied at its next delivery.
        """
        copies = [
            Record(
                topics[record.place[0]],
                record.value,
                headers=((PRIOR, str(record.prior + record.count - 1).encode()),),
                partition=record.place[1],
            )
            for record in records
        ]
        try:
            written = await self._connection.running_writer().write(copies)
        except QTasksError as error:
            logger.debug("messages that were delivered often could not be copied: %s", error)
            return set()
        copied = {r for r, w in zip(records, written, strict=True) if w.refused is None}
        for record in copied:
            record.session.settle(record, ACCEPT, ACCEPT)
        return copied

    def _fetched(self, session: ShareSession, task: Task[None]) -> None:
        del self._fetching[session]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a request of a share group failed", exc_info=error)
        self._rest()

    def _rest(self) -> None:
        """Give back what nobody receives: at once after `close`, else after a while."""
        if self._receiving or not self._leftovers:
            return
        if self._closed.done():
            self._give_back()
        elif self._idle is None:
            self._idle = self._loop.call_later(IDLE, self._give_back)

    def _give_back(self) -> None:
        self._idle = None
        answers = [
            delivery.fence.session.settle(delivery.fence, RELEASE, Release)
            for delivery in self._leftovers.take_all()
            if delivery.fence.held(self._loop.time())
        ]
        if answers:
            task = asyncio.create_task(_answered(answers))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        call = SettleCall(settlements, _OBEYED)
        retries = {
            place: settlement
            for place, settlement in call.first.items()
            if isinstance(settlement, Retry) and settlement.delivery.fence.held(self._loop.time())
        }
        refused = await self._replace(retries) if retries else {}
        answers: dict[int, Future[bool]] = {}
        for place, settlement in call.first.items():
            record: Acquired = settlement.delivery.fence
            if place in refused:
                call.answer(place, refused[place])
            elif record.settling is not None:
                # An earlier call was cancelled before it had its answer, or it was another one.
                if not _failed(record.settling[1]):
                    answers[place] = record.settling[1]
                elif record.sent:
                    call.answer(place, UNANSWERED)
            elif record.held(self._loop.time()):
                kind = RELEASE if isinstance(settlement, Release) else ACCEPT
                answers[place] = record.session.settle(record, kind, effect_of(settlement))
        if answers:
            await asyncio.wait(answers.values())
        for place, answer in answers.items():
            if answer.result() and call.keys[place] in _OBEYED:
                call.done(place)
        if self._closed.done():
            self._leave_if_done()
        return call.outcomes()

    async def _replace(self, retries: Mapping[int, Settlement]) -> dict[int, Outcome]:
        """Publish the new messages of retries, and return those that cannot be obeyed.

        The server is asked first, because a receiver without the lock must not publish anything.
        """
        new = {
            at: each
            for at, each in retries.items()
            if each.delivery.fence.replaced != effect_of(each)
        }
        held = await self._renew([each.delivery.fence for each in new.values()])
        mine = {at: each for (at, each), ours in zip(new.items(), held, strict=True) if ours}
        refused: dict[int, Outcome] = {}
        if mine:
            records = [
                self._broker.record(each.message)
                for each in mine.values()
                if isinstance(each, Retry)
            ]
            for at, outcome in zip(mine, await self._broker.append(records), strict=True):
                if outcome.status == "done":
                    mine[at].delivery.fence.replaced = effect_of(mine[at])
                else:
                    refused[at] = outcome
        return refused

    async def _renew(self, records: Sequence[Acquired]) -> list[bool]:
        """Renew locks, and return for each record whether it is still held."""
        now = self._loop.time()
        held = [record.held(now) for record in records]
        answers: dict[int, Future[bool]] = {}
        for place, record in enumerate(records):
            if held[place] and (answer := record.session.renew(record)) is not None:
                answers[place] = answer
        if answers:
            await asyncio.wait(answers.values())
        for place, answer in answers.items():
            held[place] = answer.result()
        return held

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        """Ask the server to renew the locks."""
        held = await self._renew([delivery.fence for delivery in deliveries])
        return [d if mine else None for d, mine in zip(deliveries, held, strict=True)]

    async def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        if self._idle is not None:
            self._idle.cancel()
        self._rest()
        pending = {*self._fetching.values(), *self._giving_back}
        if pending:
            # The server answers a request within this time, and what it brings is given back.
            await asyncio.wait(pending, timeout=2 * WAIT)
            self._rest()
            await asyncio.wait({*self._giving_back, self._closed}, timeout=WAIT)
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._leaving is None and not self._group.holding():
            self._leaving = asyncio.create_task(self._leave())

    async def leave(self) -> None:
        """Leave the group. The server releases what is held. Idempotent."""
        await self.close()
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        if self._fetching:
            await asyncio.wait(self._fetching.values(), timeout=2 * WAIT)
        pending = {*self._fetching.values(), *self._giving_back}
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        await self._group.close()
        self._left(self)


def _failed(answer: Future[bool]) -> bool:
    return answer.done() and answer.exception() is not None


async def _answered(answers: Iterable[Future[bool]]) -> None:
    """Wait until the server has taken records back. If it is away, it does so by itself."""
    await asyncio.wait(list(answers))
