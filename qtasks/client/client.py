"""The client half of the engine: submitting tasks and waiting for their results.

It lives on the I/O loop. An app reaches it through `IOThread`, with a `Reply` for each question.
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

from qtasks.bridge.io_thread import IOThread
from qtasks.bridge.reply import Reply, anew
from qtasks.client import retrying
from qtasks.client.batcher import Batcher
from qtasks.client.late import look_once, unconfirmed
from qtasks.client.retrying import Backoff, Outage, retry
from qtasks.client.times import Clock
from qtasks_core import Broker, Composition, Inbox, Outcome, Storage, Task, TaskMessage
from qtasks_core.errors import Closed, PayloadTooLarge, Refused, TaskTimeout, Unavailable
from qtasks_core.records import ENVELOPE, FINAL
from qtasks_core.separate import compose, record_of

logger = logging.getLogger("qtasks")

_BATCH = 500
_FLIGHTS = 2
"""While one batch waits for the server, the next is encoded."""


class Waiter(Reply[Task]):
    """The reply with the final record of one task; past `deadline` it fails by itself.

    `submitted` is the task's message, where its submission and the wait are one call.
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
        """Seconds, as the caller said; None: no limit."""
        self.deadline = deadline
        """On the monotonic clock."""
        self.submitted = submitted
        self.durable = False
        """Whether the write of `submitted` is confirmed."""
        self.trouble = "no answer yet"
        """Why it is not."""
        self.wanted = True
        """False: nobody waits for it any more."""
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
    """A message on its way, and who wants to hear of it."""

    message: TaskMessage
    deadline: float
    """On the monotonic clock; past it publishing is not tried again."""
    reply: Reply[Task] | _Countdown
    """Answered as soon as the write is durable, unless it is the `waiter`."""
    waiter: Waiter | None = None
    """Answered with the final record."""


class Client:
    """One broker and one storage in use, under one app's name."""

    def __init__(
        self,
        name: str,
        broker: Broker,
        storage: Storage,
        where: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`where` returns which broker is used, for a `TaskTimeout` to say."""
        self.name = name
        self.broker = broker
        self.storage = storage
        self._where = where
        self._driver_loggers = {*broker.driver_loggers, *storage.driver_loggers}
        self.composition: Composition = compose(broker, storage)
        self.clock = Clock(broker, storage)
        self._least: tuple[float, str] = (inf, "")
        """The smaller of the largest messages that broker and storage take, in bytes, and which of
        the two that is; known after the start."""
        self._inbox: Inbox | None = None
        self._outage = Outage("waiting for results")
        self._listening: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._waiters: dict[str, list[Waiter]] = {}
        self._submissions: Batcher[Submission] = Batcher(self._submit, _BATCH, _FLIGHTS, _bytes_of)
        self._watches: Batcher[str] = Batcher(self._watch, _BATCH, 1, len)
        self._looking: set[asyncio.Task[None]] = set()

    async def start(self, deadline: float) -> None:
        """Connect broker and storage. Raises `Unavailable` when that fails until the deadline."""
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
        """End all waits with `Closed` and disconnect."""
        closed = Closed(f"the app {self.name!r} was stopped")
        for submission in await self._submissions.close():
            submission.reply.fail(anew(closed))
        await self._watches.close()
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
                # Last, and whatever failed: what came in meanwhile would else wait for ever.
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
        """Submit a message with all others of this turn of the loop.

        Answer once the write is durable: with the new record, or for a key that is taken with the
        record that is there. Past `deadline` (monotonic) fail with `Unavailable`.
        """
        self._submit_one(Submission(message, deadline, reply))

    def submit_and_wait(self, message: TaskMessage, waiter: Waiter) -> None:
        """Submit a message as `submit` does; answer with the task's final record."""
        self._start_timer(waiter)
        self._submit_one(Submission(message, waiter.deadline, waiter, waiter))

    def _submit_one(self, submission: Submission) -> None:
        if _payload(submission.message) > self._least[0] - ENVELOPE:
            submission.reply.fail(self._too_large(submission.message))
            return
        self._submissions.add(submission)

    async def submit_all(self, messages: Sequence[TaskMessage], deadline: float) -> None:
        """Submit many messages; return once all writes are durable, or raise the first error."""
        largest = max(messages, key=_payload, default=None)
        if largest is None:
            return
        if _payload(largest) > self._least[0] - ENVELOPE:
            raise self._too_large(largest)
        reply = _Countdown(len(messages))
        self._submissions.extend([Submission(m, deadline, reply) for m in messages])
        await reply

    def _too_large(self, message: TaskMessage) -> PayloadTooLarge:
        """Return the error of a message that the broker or the storage would not take."""
        largest, part = self._least
        return PayloadTooLarge(
            f"the arguments of {message.task_name!r} have {_payload(message)} bytes; "
            f"{part} takes at most {largest} with everything"
        )

    def wait(self, waiter: Waiter) -> None:
        """Answer with the final record of any task, now or when there is one."""
        self._start_timer(waiter)
        if waiter.uuid not in self._waiters:
            self._watches.add(waiter.uuid)
        self._waiters.setdefault(waiter.uuid, []).append(waiter)

    def forget(self, waiter: Waiter) -> None:
        """Take back a wait: nobody wants the answer any more."""
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
        """Answer one whose time is up with what is known of its task now."""
        uuid, timeout, submitted = waiter.uuid, waiter.timeout, waiter.submitted
        try:
            where = self._where()
            waiter.set(await look_once(self.storage, uuid, timeout, submitted, where))
        except TaskTimeout as late:
            waiter.fail(late.with_traceback(None))  # where it was found out helps no caller
        except asyncio.CancelledError:
            waiter.fail(Closed(f"the app {self.name!r} was stopped"))
            raise
        except Exception as error:  # noqa: BLE001  # raised at the caller
            waiter.fail(error)

    def forget_all(self) -> None:
        """Take back all waits, so that `stop` tells nobody."""
        self._waiters.clear()

    async def _submit(self, batch: list[Submission]) -> None:
        """Flush one batch: repeat until each item has its answer or is past its deadline."""
        # Not by `retry`: each item has a deadline of its own.
        backoff = Backoff()
        clock = asyncio.get_running_loop().time
        while batch:
            try:
                async with asyncio.timeout_at(max(s.deadline for s in batch)):
                    messages = await self._dated(await self._addressed(batch))
                    outcomes = await self.composition.submit(messages)
            except (Unavailable, TimeoutError) as error:
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
                    batch = [_anew(submission) for submission in batch]
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

    async def _addressed(self, batch: list[Submission]) -> list[TaskMessage]:
        """Return the messages; those whose result is waited for bear this client's address."""
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

    async def _dated(self, messages: list[TaskMessage]) -> list[TaskMessage]:
        """Return the messages; what expires does so by the clock that workers have too."""
        if not [message for message in messages if message.expires_at is not None]:
            return messages
        await self.clock.ask()
        return [
            m if m.expires_at is None else replace(m, expires_at=self.clock.shown_at(m.expires_at))
            for m in messages
        ]

    def _answer(self, submission: Submission, outcome: Outcome) -> None:
        message, waiter = submission.message, submission.waiter
        if outcome.status == "taken" and outcome.current is not None:
            self._answer_taken(submission, outcome.current)
        elif outcome.status == "refused":
            reason = f"task {message.uuid} for queue {message.queue!r}: {outcome.reason}"
            self._fail(submission, Refused(reason))
        elif outcome.status == "unknown":
            self._fail(submission, unconfirmed(message, outcome.reason))
        elif waiter is not None:
            waiter.durable = True
        elif isinstance(submission.reply, _Countdown):
            submission.reply.set(None)
        else:
            submission.reply.set(record_of(message))

    def _answer_taken(self, submission: Submission, existing: Task) -> None:
        """Answer with what has the key, once it has finished if that is waited for."""
        if (waiter := submission.waiter) is not None:
            if existing.status not in FINAL:
                # Its result may be on its way to another client's address only.
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
            self._fail(submission, anew(error))

    def _fail_waits(self, uuids: Sequence[str], error: BaseException) -> None:
        for uuid in uuids:
            for waiter in self._waiters.pop(uuid, ()):
                waiter.fail(anew(error))

    async def _watch(self, uuids: list[str]) -> None:
        """Have the inbox deliver the results of tasks that others have submitted."""
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
        # Those that were taken back meanwhile.
        inbox.forget([uuid for uuid in waited if uuid not in self._waiters])

    async def _open_inbox(self) -> Inbox:
        async with self._opening:
            if self._inbox is None:
                self._inbox = await self.storage.inbox()
                self._listening = asyncio.create_task(self._listen(self._inbox))
            return self._inbox

    async def _listen(self, inbox: Inbox) -> None:
        """Hand arriving records to who waits for them, for ever.

        When the inbox fails in an unknown way all waits end with that error, and the next wait
        opens another inbox.
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
    """All waits were taken back; the server was not asked, so it may still be out of reach."""


def _bytes_of(submission: Submission) -> int:
    return _payload(submission.message)


def _payload(message: TaskMessage) -> int:
    return len(message.args) + len(message.kwargs)


class _Countdown(Reply[Task | None]):
    """One answer for many submissions, given after the last of them: an error if there was one."""

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


def _anew(submission: Submission) -> Submission:
    """Return a submission whose first try may have been published, to be tried again.

    With a key it is another publishing, so that not both are run. What has none may run twice.
    """
    message = submission.message
    if not message.submission:
        return submission
    return replace(submission, message=replace(message, submission=str(uuid7())))
