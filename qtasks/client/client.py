"""The client: it submits tasks and waits for their results.

It lives on the I/O loop. An app posts calls to it by `IOThread`, and gets a `Reply` for each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import inf

from msgspec import Struct
from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.bridge.crossing import IOThread, Reply, copy_of
from qtasks.client import retrying
from qtasks.client.batcher import Batcher
from qtasks.client.depths import Depths
from qtasks.client.overdue import look_once, unconfirmed
from qtasks.client.requirements import Requirements
from qtasks.client.retrying import Backoff, Outage, retry
from qtasks.client.times import Clock
from qtasks_core import Broker, Composition, Inbox, Outcome, Storage, Task, TaskMessage
from qtasks_core.errors import (
    Closed,
    ConfigurationError,
    PayloadTooLarge,
    Refused,
    TaskTimeout,
    Unavailable,
)
from qtasks_core.records import ENVELOPE, FINAL, record_of
from qtasks_core.separate import compose

logger = logging.getLogger("qtasks")

_BATCH = 500
_FLIGHTS = 2
"""While one batch waits for the server, the next is encoded."""


class Waiter(Reply[Task]):
    """The reply with the final record of one task. After `deadline` it fails by itself.

    `submitted` is the message of the task if one call both submits it and waits for it.
    """

    def __init__(
        self,
        thread: IOThread,
        client: Client,
        uuid: str,
        timeout: float | None,
        deadline: float,
        submitted: TaskMessage | None = None,
    ) -> None:
        super().__init__()
        self._thread = thread
        self._client = client
        self.uuid = uuid
        self.timeout = timeout
        """Seconds that the caller gave; None: no limit."""
        self.deadline = deadline
        """Seconds on the monotonic clock."""
        self.submitted = submitted
        self.durable = False
        """Whether the write of `submitted` was confirmed."""
        self.trouble = "no answer yet"
        """Why the write is not confirmed yet."""
        self.wanted = True
        """False once the caller has stopped waiting."""
        self.timer: asyncio.TimerHandle | None = None

    def set(self, value: Task) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().set(value)

    def fail(self, error: BaseException) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().fail(error)

    def leave(self) -> None:
        self._thread.post(self._client.forget, self)


class Submission(Struct, frozen=True, eq=False):
    """A message to be submitted, and the replies that wait for it."""

    message: TaskMessage
    deadline: float
    """Seconds on the monotonic clock. After it the message is not published again."""
    reply: Reply[Task] | _Countdown
    """Gets its answer when the write is durable. If it is the `waiter`: with the final record."""
    waiter: Waiter | None = None
    """Gets the final record; None if nobody waits for the result."""


class Client:
    """Uses one broker and one storage under the name of one app."""

    def __init__(
        self,
        name: str,
        broker: Broker,
        storage: Storage,
        where: Callable[[], str | None] = lambda: None,
        requirements: Requirements | None = None,
    ) -> None:
        """`where` returns a text about the broker for the message of a `TaskTimeout`, or None.

        `requirements`: what tasks require of both. None: nothing.
        """
        self.name = name
        self.broker = broker
        self.storage = storage
        self._where = where
        self._driver_loggers = {*broker.driver_loggers, *storage.driver_loggers}
        self.composition: Composition = compose(broker, storage)
        self.clock = Clock(broker, storage)
        self.requirements = requirements or Requirements(broker, storage)
        self.depths = Depths(broker)
        self._least: tuple[float, str] = (inf, "")
        """The largest message that both the broker and the storage take, in bytes.

        The text names the one with this limit. Both are known after the start.
        """
        self._inbox: Inbox | None = None
        self._outage = Outage("waiting for results")
        self._listening: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._waiters: dict[str, list[Waiter]] = {}
        self._submissions: Batcher[Submission] = Batcher(self._submit, _BATCH, _FLIGHTS, _bytes_of)
        self._watches: Batcher[str] = Batcher(self._watch, _BATCH, 1, len)
        self._looking: set[asyncio.Task[None]] = set()

    async def start(self, deadline: float) -> None:
        """Connect the broker and the storage.

        Raises `Unavailable` if they do not answer before `deadline` (loop time, in seconds).
        """
        retrying.quiet_drivers(self._driver_loggers)
        try:
            await retry(self._connect, deadline=deadline, outage=Outage())
        except BaseException:
            await self._disconnect()
            raise
        told = (self.broker.guarantees, self.storage.guarantees)
        self._least = min((inf if g.largest is None else g.largest, g.part) for g in told)
        retrying.quiet_late_loggers()

    async def _connect(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.broker.start(self.name))
                group.create_task(self.storage.start(self.name))
        except BaseExceptionGroup as errors:
            retrying.quiet_late_loggers()
            raise errors.exceptions[0] from None

    async def stop(self) -> None:
        """Fail all waits with `Closed`, and disconnect."""
        closed = Closed(f"the app {self.name!r} was stopped")
        for submission in await self._submissions.close():
            submission.reply.fail(copy_of(closed))
        await self._watches.close()
        await self.depths.stop()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        try:
            if self._inbox is not None:
                await self._inbox.close()
        finally:
            try:
                await self._disconnect()
            finally:
                # Last, and even after an error: waits that were added meanwhile would never finish.
                self._fail_waits(list(self._waiters), closed)

    async def _disconnect(self) -> None:
        try:
            await self.broker.stop()
        finally:
            try:
                await self.storage.stop()
            finally:
                retrying.release_drivers(self._driver_loggers)

    def submit(self, message: TaskMessage, deadline: float, reply: Reply[Task]) -> None:
        """Submit a message in one batch with the others of this turn of the loop.

        The reply gets the new record when the write is durable. If another task has the key
        already, it gets the existing record. After `deadline` (seconds on the monotonic clock) it
        fails with `Unavailable`.
        """
        self._submit_one(Submission(message, deadline, reply))

    def submit_and_wait(self, message: TaskMessage, waiter: Waiter) -> None:
        """Submit a message as `submit` does. The waiter gets the task's final record."""
        self._start_timer(waiter)
        self._submit_one(Submission(message, waiter.deadline, waiter, waiter))

    def _submit_one(self, submission: Submission) -> None:
        if _payload(submission.message) > self._least[0] - ENVELOPE:
            submission.reply.fail(self._too_large(submission.message))
            return
        self._submissions.add(submission)

    async def submit_all(self, messages: Sequence[TaskMessage], deadline: float) -> None:
        """Submit many messages, and return when all writes are durable.

        Raises the first error once every message has an answer. Raises `PayloadTooLarge` before
        anything is submitted.
        """
        largest = max(messages, key=_payload, default=None)
        if largest is None:
            return
        if _payload(largest) > self._least[0] - ENVELOPE:
            raise self._too_large(largest)
        reply = _Countdown(len(messages))
        self._submissions.extend([Submission(m, deadline, reply) for m in messages])
        await reply

    async def submit_within(
        self, messages: Sequence[TaskMessage], transaction: object
    ) -> list[Task]:
        """Submit messages in the caller's transaction, and return their records.

        Not on the I/O loop, but on that of the transaction's connection. Raises `NotSupported`,
        `Refused` and `PayloadTooLarge`.
        """
        for message in messages:
            if _payload(message) > self._least[0] - ENVELOPE:
                raise self._too_large(message)
        outcomes = await self.composition.submit(messages, transaction)
        records: list[Task] = []
        for message, outcome in zip(messages, outcomes, strict=True):
            if outcome.status == "done":
                records.append(record_of(message))
            elif outcome.status == "taken" and outcome.current is not None:
                records.append(outcome.current)
            else:
                raise _refused(message, outcome)
        return records

    async def check(self, messages: Sequence[TaskMessage]) -> None:
        """Raise `ConfigurationError` if the servers do not guarantee what a task requires now."""
        if self.requirements.required():
            await self.requirements.ask()
            for message in messages:
                if (why := self.requirements.missing.get(message.task_name)) is not None:
                    raise ConfigurationError(why)

    async def dated(self, messages: Sequence[TaskMessage]) -> list[TaskMessage]:
        """Return the messages, with `expires_at` by the clock that the workers use too."""
        if not [message for message in messages if message.expires_at is not None]:
            return list(messages)
        await self.clock.ask()
        return [
            m if m.expires_at is None else replace(m, expires_at=self.clock.shown_at(m.expires_at))
            for m in messages
        ]

    def _too_large(self, message: TaskMessage) -> PayloadTooLarge:
        """Return the error for a message that is too large for the broker or the storage."""
        largest, part = self._least
        return PayloadTooLarge(
            f"the arguments of {message.task_name!r} have {_payload(message)} bytes; "
            f"{part} takes at most {largest} with everything"
        )

    def wait(self, waiter: Waiter) -> None:
        """Give the waiter the final record of its task: now, or when the task has finished."""
        self._start_timer(waiter)
        if waiter.uuid not in self._waiters:
            self._watches.add(waiter.uuid)
        self._waiters.setdefault(waiter.uuid, []).append(waiter)

    def forget(self, waiter: Waiter) -> None:
        """Drop a wait: the caller does not need the answer any more."""
        waiter.wanted = False
        if waiter.timer is not None:
            waiter.timer.cancel()
        waiters = self._waiters.get(waiter.uuid, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if waiters or self._waiters.pop(waiter.uuid, None) is None:
            return
        if self._inbox is not None:
            self._inbox.forget([waiter.uuid])

    def _start_timer(self, waiter: Waiter) -> None:
        if waiter.timeout is not None:
            loop = asyncio.get_running_loop()
            waiter.timer = loop.call_at(waiter.deadline, self._time_is_up, waiter)

    def _time_is_up(self, waiter: Waiter) -> None:
        self.forget(waiter)
        if waiter.submitted is not None and not waiter.durable:
            waiter.fail(unconfirmed(waiter.submitted, waiter.trouble))
            return
        task = asyncio.create_task(self._look_once(waiter))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _look_once(self, waiter: Waiter) -> None:
        """Read the record once for a waiter whose time is up, and answer the waiter."""
        uuid, timeout, submitted = waiter.uuid, waiter.timeout, waiter.submitted
        try:
            where = self._where()
            waiter.set(await look_once(self.storage, uuid, timeout, submitted, where))
        except TaskTimeout as late:
            waiter.fail(late.with_traceback(None))  # its frames do not help the caller
        except asyncio.CancelledError:
            waiter.fail(Closed(f"the app {self.name!r} was stopped"))
            raise
        except Exception as error:  # noqa: BLE001  # raised at the caller
            waiter.fail(error)

    def forget_all(self) -> None:
        """Drop all waits, so that `stop` does not fail them."""
        self._waiters.clear()

    async def _submit(self, batch: list[Submission]) -> None:
        """Submit one batch; retry until each item has an answer or is past its deadline."""
        # Not by `retry`, which has one deadline: here each item has its own.
        backoff = Backoff()
        clock = asyncio.get_running_loop().time
        while batch:
            try:
                async with asyncio.timeout_at(max(s.deadline for s in batch)):
                    if self.requirements.required():
                        batch = await self._met(batch)
                        if not batch:
                            return
                    messages = await self.dated(await self._addressed(batch))
                    outcomes = await self.composition.submit(messages)
            except (Unavailable, TimeoutError) as error:
                self.requirements.forget()
                pause = backoff.next()
                trouble = str(error) or "no answer in time"
                for submission in batch:
                    if submission.waiter is not None:
                        submission.waiter.trouble = trouble
                for late in [s for s in batch if s.deadline < clock() + pause]:
                    batch.remove(late)
                    self._fail(late, unconfirmed(late.message, trouble))
                if batch:
                    await asyncio.sleep(pause)
                    batch = [_resubmitted(submission) for submission in batch]
            except asyncio.CancelledError:
                self._fail_all(batch, Closed(f"the app {self.name!r} was stopped"))
                raise
            except Exception as error:  # noqa: BLE001  # raised at each caller
                self._fail_all(batch, error)
                return
            else:
                for submission, outcome in zip(batch, outcomes, strict=True):
                    self._answer(submission, outcome)
                return

    async def _met(self, batch: list[Submission]) -> list[Submission]:
        """Return the submissions whose tasks have what they require. Fail the others."""
        await self.requirements.ask()
        missing = self.requirements.missing
        for submission in batch:
            if (why := missing.get(submission.message.task_name)) is not None:
                self._fail(submission, ConfigurationError(why))
        return [s for s in batch if s.message.task_name not in missing] if missing else batch

    async def _addressed(self, batch: list[Submission]) -> list[TaskMessage]:
        """Return the messages, with this client's address if a caller waits for the result."""
        waited = [s.waiter for s in batch if s.waiter is not None and s.waiter.wanted]
        if not waited:
            return [s.message for s in batch]
        inbox = await self._open_inbox()
        inbox.expect([waiter.uuid for waiter in waited])
        for waiter in waited:
            waiters = self._waiters.setdefault(waiter.uuid, [])
            if waiter not in waiters:
                waiters.append(waiter)
        return [
            s.message if s.waiter is None else replace(s.message, reply_to=inbox.address)
            for s in batch
        ]

    def _answer(self, submission: Submission, outcome: Outcome) -> None:
        message, waiter = submission.message, submission.waiter
        if outcome.status == "taken" and outcome.current is not None:
            self._answer_taken(submission, outcome.current)
        elif outcome.status == "refused":
            self._fail(submission, _refused(message, outcome))
        elif outcome.status == "unknown":
            self._fail(submission, unconfirmed(message, outcome.reason))
        elif waiter is not None:
            waiter.durable = True
        elif isinstance(submission.reply, _Countdown):
            submission.reply.set(None)
        else:
            submission.reply.set(record_of(message))

    def _answer_taken(self, submission: Submission, existing: Task) -> None:
        """Answer with the existing record of the key.

        A waiter gets it when the task has finished.
        """
        if (waiter := submission.waiter) is not None:
            if existing.status not in FINAL:
                # The result may be sent only to the address of another client.
                waiter.durable = True
                self._watches.add(existing.uuid)
                return
            self.forget(waiter)
        submission.reply.set(existing)

    def _fail(self, submission: Submission, error: BaseException) -> None:
        if submission.waiter is not None:
            self.forget(submission.waiter)
        submission.reply.fail(error)

    def _fail_all(self, batch: list[Submission], error: BaseException) -> None:
        for submission in batch:
            self._fail(submission, copy_of(error))

    def _fail_waits(self, uuids: Sequence[str], error: BaseException) -> None:
        for uuid in uuids:
            for waiter in self._waiters.pop(uuid, ()):
                waiter.fail(copy_of(error))

    async def _watch(self, uuids: list[str]) -> None:
        """Have the inbox deliver results that are not sent to this client's address."""
        try:
            await retry(partial(self._watch_once, uuids), outage=self._outage)
        except _NobodyWaits:
            return
        except Exception as error:  # noqa: BLE001  # raised at each caller
            self._fail_waits(uuids, error)

    async def _watch_once(self, uuids: list[str]) -> None:
        waited = [uuid for uuid in uuids if uuid in self._waiters]
        if not waited:
            raise _NobodyWaits
        inbox = await self._open_inbox()
        await inbox.watch(waited)
        # The callers of these have stopped waiting meanwhile.
        inbox.forget([uuid for uuid in waited if uuid not in self._waiters])

    async def _open_inbox(self) -> Inbox:
        async with self._opening:
            if self._inbox is None:
                self._inbox = await self.storage.inbox()
                self._listening = asyncio.create_task(self._listen(self._inbox))
            return self._inbox

    async def _listen(self, inbox: Inbox) -> None:
        """Give arriving records to their waiters, for ever.

        If the inbox raises an error that a retry cannot fix, all waits fail with that error. The
        next wait opens a new inbox.
        """
        while True:
            try:
                tasks = await retry(inbox.receive, outage=self._outage)
            except Exception as error:  # raised at each caller
                logger.error("waiting for results failed: %s", error, exc_info=error)
                self._inbox = None
                self._fail_waits(list(self._waiters), error)
                await inbox.close()
                return
            self._outage.over()
            for task in tasks:
                for waiter in self._waiters.pop(task.uuid, ()):
                    waiter.set(task)


class _NobodyWaits(Exception):
    """No caller waits any more, so the server was not asked.

    An exception, because a return would end the outage: the server may still not answer.
    """


def _refused(message: TaskMessage, outcome: Outcome) -> Refused:
    return Refused(f"task {message.uuid} for queue {message.queue!r}: {outcome.reason}")


def _bytes_of(submission: Submission) -> int:
    return _payload(submission.message)


def _payload(message: TaskMessage) -> int:
    return len(message.args) + len(message.kwargs)


class _Countdown(Reply[Task | None]):
    """One reply for many submissions, answered after the last of them.

    If any of them fails, it fails with the first error.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._left = count
        self._first: BaseException | None = None

    def set(self, value: Task | None) -> None:
        self._left -= 1
        if self._left == 0:
            super().set(value) if self._first is None else super().fail(self._first)

    def fail(self, error: BaseException) -> None:
        self._first = self._first or error
        self._left -= 1
        if self._left == 0:
            super().fail(self._first)


def _resubmitted(submission: Submission) -> Submission:
    """Return the submission to retry; the first try may have published its message.

    A message with a key gets a new `submission` id, so that only one of the two runs. A message
    without a key may run twice.
    """
    message = submission.message
    if not message.submission:
        return submission
    return replace(submission, message=replace(message, submission=str(uuid7())))
