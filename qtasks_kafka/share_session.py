"""A share session: acquires and acknowledges records of the partitions that one server leads."""

from __future__ import annotations

import asyncio
import base64
import os
from asyncio import Future, Task
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby
from math import inf
from typing import Any, NamedTuple, TypeAlias

from aiokafka.conn import AIOKafkaConnection
from aiokafka.record.memory_records import MemoryRecords

from qtasks_core.errors import QTasksError, Unavailable
from qtasks_kafka.connection import PAUSE, Connection
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.share_protocol import (
    ACCEPT,
    AT_MOST,
    GAP,
    INVALID_RECORD_STATE,
    INVALID_REQUEST,
    RENEW,
    Acknowledge,
    Call,
    Fetch,
)

Place: TypeAlias = tuple[bytes, int]
"""The id of a topic, and the number of one of its partitions."""

WAIT = 0.5
"""Seconds that the server may wait for a record before it answers that there is none."""
HOLDING_WAIT = 0.1
"""The same while records are held: what acknowledges them has to wait for that answer."""
LARGEST_ANSWER = 32 * 1024 * 1024
FRESH = 0.75
"""A lock with more than this part of its time left is not renewed."""
PRIOR = "delivered"
"""Header: how often a record was delivered before it was copied."""


class Acquired:
    """A record that a share session has acquired. It is the fence of its delivery."""

    __slots__ = (
        "count", "leased", "lost", "offset", "place", "prior", "replaced", "sent", "session",
        "settled", "settling", "until", "value",
    )  # fmt: skip

    def __init__(
        self, session: ShareSession, place: Place, offset: int, value: bytes, count: int, prior: int
    ) -> None:
        self.session = session
        self.place = place
        self.offset = offset
        self.value = value
        self.count = count
        """How often the server has delivered this record, including this time."""
        self.prior = prior
        """How often the records were delivered that this one is a copy of."""
        self.until = 0.0
        """The time of the loop until which the server's lock surely holds."""
        self.leased = 0.0
        """The time of the loop until which the session renews the lock by itself."""
        self.lost = False
        self.settling: tuple[Hashable, Future[bool]] | None = None
        """How it is or was settled, and the server's answer: whether it has obeyed."""
        self.sent = False
        """Whether the server may know how it is settled."""
        self.settled: Hashable = None
        """How it was settled, once the server has obeyed."""
        self.replaced: Hashable = None
        """The retry whose new message exists."""

    def held(self, now: float) -> bool:
        """Return whether it is ours, and not settled.

        The server cannot be asked once the lock has expired: it answers that all is well if the
        next holder has finished the record and all before it.
        """
        if now >= self.until or self.session.broken:
            self.lost = True
        return not self.lost and self.settling is None


class _Ack(NamedTuple):
    """One acknowledgement to send, and the future of its answer."""

    record: Acquired
    kind: int
    answer: Future[bool]


class ShareSession:
    """Acquires and acknowledges records. Its requests go one after the other, on one connection.

    The server releases what the session holds when its connection is closed. So after an error, a
    session is broken: all that it held is lost, and another one takes its place.
    """

    def __init__(
        self,
        connection: Connection,
        group: str,
        address: tuple[str, int],
        *,
        lease: float,
        longest_lock: float,
    ) -> None:
        """`longest_lock` is the lock time in seconds that the group is configured to have."""
        self._connection = connection
        self._lease = lease
        self._longest_lock = longest_lock
        self._lock_time = inf
        """Seconds after which the server takes back what is not renewed. It tells them."""
        self._group = group
        self._address = address
        self._member = new_id()
        self._link: AIOKafkaConnection | None = None
        self._epoch = 0
        self._places: set[Place] = set()
        """The partitions that the server fetches from."""
        self._known: set[Place] = set()
        """All partitions that it has ever fetched from."""
        self._turn = asyncio.Lock()
        self._held: set[Acquired] = set()
        self._outbox: list[_Ack] = []
        self._sending: Task[None] | None = None
        self._renewing: Task[None] | None = None
        self._abandoned = False
        self.accepted = False
        """Whether a record was accepted since somebody has cleared this."""

    @property
    def broken(self) -> bool:
        """Whether its connection was lost, and with it all that it held."""
        return self._abandoned or (self._link is not None and not self._link.connected())

    def holding(self) -> bool:
        """Return whether a record is held."""
        now = asyncio.get_running_loop().time()
        self._held = {record for record in self._held if record.held(now)}
        return bool(self._held)

    async def fetch(
        self, places: Sequence[Place], most: int, *, wait: bool
    ) -> tuple[list[Acquired], bool]:
        """Acquire at most so many records, and return whether a partition has an error.

        The leader of a partition may have changed. Raises `Unavailable`, `ConfigurationError`.
        """
        loop = asyncio.get_running_loop()
        async with self._turn:
            if self._epoch == 0:
                await self._open()
            patience = WAIT if wait and not self.holding() else HOLDING_WAIT
            if not wait and self._known >= set(places):
                patience = 0.0  # the server has read how far the group has come in all of them
            self._known.update(places)
            sent = loop.time()
            answer = await self._acquire(places, most, patience)
        records: list[Acquired] = []
        failed = False
        for topic, partitions, _ in answer.topics:
            for number, error, said, _, _, _, data, ranges, _ in partitions:
                try:
                    self._connection.check(error, said or self._group)
                except Unavailable:
                    failed = True
                records += self._acquired((topic, number), data or b"", ranges or [])
        for record in records:
            record.until = sent + self._lock_time
            record.leased = sent + self._lease
        self._held.update(records)
        if records and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.create_task(self._renew_all())
        return records, failed

    async def _open(self) -> None:
        """Open the session, and wait until its server knows the configuration of the group.

        A partition that is fetched from before would start with the messages that come from then
        on. The lock time belongs to the same configuration, and each answer tells it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + REQUEST
        await self._acquire([], 1, 0.0)
        while self._lock_time > self._longest_lock:
            if loop.time() > deadline:
                self.abandon()
                raise Unavailable(f"Kafka at {self._connection.shown} still configures the group")
            await asyncio.sleep(PAUSE)
            await self._acquire([], 1, 0.0)

    async def _acquire(self, places: Sequence[Place], most: int, patience: float) -> Any:
        """Ask for records of these partitions. Only the difference to the last request is sent."""
        new, old = set(places) - self._places, self._places - set(places)
        answer = await self._ask(
            lambda: Call(
                Fetch, self._group, self._member, self._epoch, int(patience * 1000), 1,
                LARGEST_ANSWER, most, most, AT_MOST, False,
                _topics((place, []) for place in sorted(new)),
                [
                    (topic, [number for _, number in some], {})
                    for topic, some in groupby(sorted(old), _topic_of)
                ],
            )
        )  # fmt: skip
        self._places = set(places)
        self._lock_time = answer.acquisition_lock_timeout_ms / 1000
        return answer

    def _acquired(
        self, place: Place, data: bytes, ranges: Iterable[tuple[int, int, int, Any]]
    ) -> list[Acquired]:
        """Return the acquired ones among the records of an answer, and acknowledge the gaps."""
        counts = {
            offset: count for first, last, count, _ in ranges for offset in range(first, last + 1)
        }
        records: list[Acquired] = []
        batches = MemoryRecords(data)
        while counts and batches.has_next():
            batch = batches.next_batch()
            if batch.is_control_batch:
                continue
            for record in batch:
                if (count := counts.pop(record.offset, None)) is not None:
                    value, prior = record.value or b"", _prior(record.headers)
                    records.append(Acquired(self, place, record.offset, value, count, prior))
        for offset, count in counts.items():
            # The mark of a transaction. Without an acknowledgement it comes again.
            self._send(Acquired(self, place, offset, b"", count, 0), GAP)
        return records

    def settle(self, record: Acquired, kind: int, effect: Hashable) -> Future[bool]:
        """Accept or release a held record. The answer comes even if nobody waits for it.

        The future says whether the server has obeyed. It fails with `Unavailable`. `effect` tells
        this settlement from others of the record.
        """
        answer = self._send(record, kind)
        record.settling = effect, answer
        return answer

    def renew(self, record: Acquired) -> Future[bool] | None:
        """Hold a record for one more lease. The future says whether it is still ours.

        None: it surely is, as its lock is new. A worker renews what it has just received.
        """
        now = asyncio.get_running_loop().time()
        record.leased = now + self._lease
        if record.until - now > self._lock_time * FRESH:
            return None
        return self._send(record, RENEW)

    async def _renew_all(self) -> None:
        """Renew locks that end before the lease does: others may have asked for a shorter lock."""
        while self.holding():
            # A worker with a shorter lease may shorten the lock meanwhile.
            await asyncio.sleep(min(self._lock_time / 4, 0.5))
            now = asyncio.get_running_loop().time()
            ending = now + self._lock_time / 2
            due = [
                self._send(record, RENEW)
                for record in self._held
                if record.held(now) and record.until < ending and now < record.leased
            ]
            if due:
                await asyncio.wait(due)

    def _send(self, record: Acquired, kind: int) -> Future[bool]:
        answer: Future[bool] = asyncio.get_running_loop().create_future()
        self._outbox.append(_Ack(record, kind, answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())
        return answer

    async def _send_all(self) -> None:
        acks: list[_Ack] = []
        try:
            while self._outbox:
                async with self._turn:
                    acks = self._take_acks()
                    await self._acknowledge(acks)
        except BaseException as error:
            failure = (
                error
                if isinstance(error, QTasksError)
                else Unavailable("the session was closed before the server had answered")
            )
            for ack in (*acks, *self._outbox):
                if not ack.answer.done():
                    ack.answer.set_exception(failure)
                    ack.answer.exception()  # its caller may be gone, and asyncio would complain
            self._outbox = []
            if failure is not error:
                raise

    def _take_acks(self) -> list[_Ack]:
        """Take acknowledgements to send, one of each record, since a request may name it once."""
        acks: dict[Acquired, _Ack] = {}
        later = [ack for ack in self._outbox if acks.setdefault(ack.record, ack) is not ack]
        self._outbox = later
        return list(acks.values())

    async def _acknowledge(self, acks: list[_Ack]) -> None:
        """Send acknowledgements, and answer them."""
        now = asyncio.get_running_loop().time()
        open_: list[_Ack] = []
        for ack in acks:
            record = ack.record
            lost = record.lost or now >= record.until
            if ack.kind != GAP and (lost or (ack.kind == RENEW and record.settling is not None)):
                ack.answer.set_result(False)
            else:
                open_.append(ack)
        if not open_:
            return
        open_.sort(key=lambda ack: (ack.record.place, ack.record.offset))
        by_place = {
            place: list(some) for place, some in groupby(open_, lambda ack: ack.record.place)
        }
        for ack in open_:
            ack.record.sent = ack.record.sent or (ack.kind != RENEW and not self.broken)
        renewing = any(ack.kind == RENEW for ack in open_)
        answer = await self._ask(
            lambda: Call(
                Acknowledge, self._group, self._member, self._epoch, renewing,
                _topics((place, _batches(some)) for place, some in by_place.items()),
            )
        )  # fmt: skip
        self._lock_time = answer.acquisition_lock_timeout_ms / 1000
        errors = {
            (topic, number): error
            for topic, partitions, _ in answer.topics
            for number, error, *_ in partitions
        }
        for place, some in by_place.items():
            error = errors.get(place, 0)
            if error in (INVALID_RECORD_STATE, INVALID_REQUEST) and len(some) > 1:
                # Nothing of this partition was obeyed. One of the records is not ours any more.
                await self._acknowledge(some[: len(some) // 2])
                await self._acknowledge(some[len(some) // 2 :])
            else:
                for ack in some:
                    self._answer(ack, error == 0, now + self._lock_time)

    def _answer(self, ack: _Ack, obeyed: bool, until: float) -> None:
        if not obeyed:
            ack.record.lost = True
        elif ack.kind == RENEW:
            ack.record.until = until
        elif ack.record.settling is not None:
            ack.record.settled = ack.record.settling[0]
        if not obeyed or ack.kind != RENEW:
            self._held.discard(ack.record)
        self.accepted = self.accepted or (obeyed and ack.kind == ACCEPT)
        ack.answer.set_result(obeyed)

    async def _ask(self, make: Callable[[], Call]) -> Any:
        """Send the next request of the session and return its answer. An error breaks the session.

        Raises `Unavailable`, `ServerTooOld`, `ConfigurationError`.
        """
        try:
            if self.broken:
                raise Unavailable("the session with this server was lost")
            with self._connection.reaching():
                if self._link is None:
                    self._link = await self._connection.connect(*self._address)
                answer = await self._link.send(make())
                self._connection.check(answer.error_code, answer.error_message or self._group)
        except BaseException:
            self.abandon()
            raise
        self._epoch = self._epoch % (2**31 - 1) + 1
        return answer

    def abandon(self) -> None:
        """Close the connection. The server then releases all records that are held here."""
        self._abandoned = True
        self._held.clear()
        if self._link is not None:
            self._link.close()

    async def close(self) -> None:
        """Send what is still to be acknowledged, and close. Raises nothing."""
        try:
            async with asyncio.timeout(WAIT * 2):
                if self._sending is not None:
                    await asyncio.shield(self._sending)
        except TimeoutError:
            pass  # the server does not answer
        finally:
            for task in (self._sending, self._renewing):
                if task is not None:
                    task.cancel()
            self.abandon()


def new_id() -> str:
    """Return the id of a member or a session, as Kafka writes a uuid."""
    return base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")


def _topic_of(place: Place) -> bytes:
    return place[0]


def _topics(entries: Iterable[tuple[Place, list[Any]]]) -> list[Any]:
    """Return sorted partitions with their acknowledgements as a request names them."""
    return [
        (topic, [(place[1], batches, {}) for place, batches in some], {})
        for topic, some in groupby(entries, lambda entry: entry[0][0])
    ]


def _batches(acks: Iterable[_Ack]) -> list[Any]:
    """Return sorted acknowledgements of one partition, with neighbours of one kind joined."""
    batches: list[tuple[int, int, int]] = []
    for ack in acks:
        offset = ack.record.offset
        if batches and batches[-1][1:] == (offset - 1, ack.kind):
            batches[-1] = batches[-1][0], offset, ack.kind
        else:
            batches.append((offset, offset, ack.kind))
    return [(first, last, [kind], {}) for first, last, kind in batches]


def _prior(headers: Iterable[tuple[str, bytes | None]]) -> int:
    """Return how often a record was delivered before it was copied. Others may write any header."""
    value = next((value for name, value in headers if name == PRIOR), None) or b"0"
    return int(value) if value.isdigit() and len(value) < 9 else 0
