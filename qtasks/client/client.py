"""The client half of the engine: submitting tasks and waiting for their ends.

It lives on the I/O loop. Faces reach it through `IOThread`, with a `Reply` for each question.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from math import inf

from msgspec import Struct
from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.bridge.reply import Reply, anew
from qtasks.client import driver_logs
from qtasks.client.backoff import Backoff, repeat
from qtasks.client.batcher import Batcher
from qtasks.client.cancelling import only_from_outside
from qtasks.client.clock import Clock
from qtasks.client.outage import Outage
from qtasks.client.retention import cancelled_kept_for
from qtasks_core import Broker, Command, Composition, Inbox, Outcome, Storage, Task, TaskMessage
from qtasks_core.errors import (
    Closed,
    NotSupported,
    PayloadTooLarge,
    Refused,
    Unavailable,
    UnknownTask,
)
from qtasks_core.records import ENVELOPE, FINAL, not_taken, within
from qtasks_core.separate import compose

logger = logging.getLogger("qtasks")

_BATCH = 500
_FLIGHTS = 2
"""While one batch waits for the server, the next is encoded."""


class Submission(Struct, frozen=True, eq=False):
    """A message on its way, and who wants to hear of it."""

    message: TaskMessage
    deadline: float
    """On the monotonic clock; past it publishing is not tried again."""
    reply: Reply[Task | None]
    wait: bool
    """Answer with the final record; else as soon as the write is durable, with None, or with the
    record that is there already."""


class Client:
    """One broker and one storage in use, under one app's name."""

    def __init__(self, name: str, broker: Broker, storage: Storage) -> None:
        self.name = name
        self.broker = broker
        self.storage = storage
        self._driver_loggers = {*broker.driver_loggers, *storage.driver_loggers}
        self.composition: Composition = compose(broker, storage)
        self.clock = Clock(broker, storage)
        self._least: tuple[float, str] = (inf, "")
        """How many bytes each part takes at least, and the part that takes no more; known after the
        start."""
        self._inbox: Inbox | None = None
        self._outage = Outage("waiting for results")
        self._listening: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._waiters: dict[str, list[Reply[Task | None]]] = {}
        self._submissions: Batcher[Submission] = Batcher(self._submit, _BATCH, _FLIGHTS, _bytes_of)
        self._watches: Batcher[str] = Batcher(self._watch, _BATCH, 1, len)

    async def start(self, deadline: float) -> None:
        """Connect both parts. Raises `Unavailable` when that has not worked by the deadline."""
        driver_logs.quiet(self._driver_loggers)
        try:
            await self._start_parts(deadline)
        except BaseException:
            await self._stop_parts()
            raise
        told = (self.broker.guarantees, self.storage.guarantees)
        self._least = min((inf if g.largest is None else g.largest, g.part) for g in told)
        driver_logs.cover()

    async def _start_parts(self, deadline: float) -> None:
        backoff, outage = Backoff(), Outage()
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.broker.start(self.name))
                    group.create_task(self.storage.start(self.name))
                outage.over()
                return
            except BaseExceptionGroup as errors:
                error = errors.exceptions[0]
                pause = backoff.next()
                late = asyncio.get_running_loop().time() + pause > deadline
                if late or not isinstance(error, Unavailable):
                    raise error from None
                driver_logs.cover()
                outage.failed(error)
                await asyncio.sleep(pause)

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
                await self._stop_parts()
            finally:
                # Last, and whatever failed: what came in meanwhile would else wait for ever.
                self._fail_waits(list(self._waiters), closed)

    async def _stop_parts(self) -> None:
        try:
            await self.broker.stop()
        finally:
            try:
                await self.storage.stop()
            finally:
                driver_logs.release(self._driver_loggers)

    def submit(
        self, message: TaskMessage, deadline: float, wait: bool, reply: Reply[Task | None]
    ) -> None:
        """Submit a message with all others of this turn of the loop."""
        if _payload(message) > self._least[0] - ENVELOPE:
            reply.fail(self._too_large(message))
            return
        self._submissions.add(Submission(message, deadline, reply, wait))

    def submit_all(
        self, messages: Sequence[TaskMessage], deadline: float, reply: Reply[Task | None]
    ) -> None:
        """Submit many messages; answer once all writes are durable, or with the first error."""
        largest = max(messages, key=_payload, default=None)
        if largest is not None and _payload(largest) > self._least[0] - ENVELOPE:
            reply.fail(self._too_large(largest))
            return
        share = _Countdown(reply, len(messages))
        self._submissions.extend([Submission(m, deadline, share, False) for m in messages])

    def _too_large(self, message: TaskMessage) -> PayloadTooLarge:
        """Return the error of a message that the broker or the storage would not take."""
        largest, part = self._least
        return PayloadTooLarge(
            f"the arguments of {message.task_name!r} have {_payload(message)} bytes; "
            f"{part} takes at most {largest} with everything"
        )

    def wait(self, uuid: str, reply: Reply[Task | None]) -> None:
        """Answer with the final record of any task, now or when there is one."""
        if uuid not in self._waiters:
            self._watches.add(uuid)
        self._waiters.setdefault(uuid, []).append(reply)

    def forget(self, uuid: str, reply: Reply[Task | None]) -> None:
        """Take back a wait: nobody wants the answer any more."""
        reply.wanted = False
        replies = self._waiters.get(uuid, [])
        if reply in replies:
            replies.remove(reply)
        if not replies and self._waiters.pop(uuid, None) is not None and self._inbox is not None:
            self._inbox.forget([uuid])

    def forget_all(self) -> None:
        """Take back all waits, so that `stop` tells nobody."""
        self._waiters.clear()

    async def get(self, uuids: Sequence[str], deadline: float) -> list[Task | None]:
        """Return the newest records. Raises `Unavailable` past the deadline."""
        return await repeat(partial(self.storage.get, uuids), deadline)

    async def cancel(self, uuid: str, deadline: float) -> Task:
        """Record that a task is cancelled, and tell who runs it; return its final record.

        That of a task which had ended already is returned as it is. Raises `UnknownTask`, and
        `Unavailable` past the deadline.
        """
        record = (await self.get([uuid], deadline))[0]
        while record is not None and record.status not in FINAL:
            end = cancelled(record, self.storage.guarantees.retention)
            outcome = (await repeat(partial(self.storage.save, [end]), deadline))[0]
            if not_taken(outcome):
                end = within(end, outcome.reason)
                outcome = (await repeat(partial(self.storage.save, [end]), deadline))[0]
            if not_taken(outcome):
                raise Refused(f"task {uuid} cannot be cancelled: {outcome.reason}")
            if outcome.status == "done":
                await self._tell(Command(name="cancel", target=uuid))
                return end
            # It has gone on meanwhile: to its end, or to another attempt.
            record = (await self.get([uuid], deadline))[0]
        if record is None:
            raise UnknownTask(f"there is no record of a task {uuid}")
        return record

    async def _tell(self, command: Command) -> None:
        """Broadcast what workers find out by themselves too, only later."""
        try:
            await self.broker.broadcast(command)
        except NotSupported:
            return
        except Unavailable as error:
            logger.warning("%s of %s is not broadcast: %s", command.name, command.target, error)

    async def _submit(self, batch: list[Submission]) -> None:
        """Flush one batch: repeat until each item has its answer or is past its deadline."""
        backoff = Backoff()
        clock = asyncio.get_running_loop().time
        while batch:
            try:
                async with asyncio.timeout_at(max(s.deadline for s in batch)):
                    messages = await self._dated(await self._addressed(batch))
                    outcomes = await self.composition.submit(messages)
            except (Unavailable, TimeoutError) as error:
                pause = backoff.next()
                for submission in batch:
                    submission.reply.trouble = str(error) or "no answer in time"
                for late in [s for s in batch if s.deadline < clock() + pause]:
                    batch.remove(late)
                    self._fail(late, unconfirmed(late.message, late.reply.trouble))
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
        """Return the messages; those whose end is waited for bear this client's address."""
        waited = [s for s in batch if s.wait and s.reply.wanted]
        if not waited:
            return [s.message for s in batch]
        inbox = await self._open_inbox()
        inbox.expect([s.message.uuid for s in waited])
        for submission in waited:
            replies = self._waiters.setdefault(submission.message.uuid, [])
            if submission.reply not in replies:
                replies.append(submission.reply)
        return [replace(s.message, reply_to=inbox.address) if s.wait else s.message for s in batch]

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
        message = submission.message
        if outcome.there is not None:
            self._answer_taken(submission, outcome.there)
        elif outcome.status == "refused":
            reason = f"task {message.uuid} for queue {message.queue!r}: {outcome.reason}"
            self._fail(submission, Refused(reason))
        elif outcome.status == "unknown":
            self._fail(submission, unconfirmed(message, outcome.reason))
        elif submission.wait:
            submission.reply.durable = True
        else:
            submission.reply.set(None)

    def _answer_taken(self, submission: Submission, there: Task) -> None:
        """Answer with what has the key, once it has ended if that is waited for."""
        if submission.wait and there.status not in FINAL:
            # Its end may be on its way to another client's address only.
            submission.reply.durable = True
            self._watches.add(there.uuid)
            return
        self.forget(there.uuid, submission.reply)
        submission.reply.set(there)

    def _fail(self, submission: Submission, error: BaseException) -> None:
        self.forget(submission.message.uuid, submission.reply)
        submission.reply.fail(error)

    def _fail_all(self, batch: list[Submission], error: BaseException) -> None:
        for submission in batch:
            self._fail(submission, anew(error))

    def _fail_waits(self, uuids: Sequence[str], error: BaseException) -> None:
        for uuid in uuids:
            for reply in self._waiters.pop(uuid, ()):
                reply.fail(anew(error))

    async def _watch(self, uuids: list[str]) -> None:
        backoff = Backoff()
        while waiting := [uuid for uuid in uuids if uuid in self._waiters]:
            try:
                inbox = await self._open_inbox()
                await inbox.watch(waiting)
                # Those that were taken back meanwhile.
                inbox.forget([uuid for uuid in waiting if uuid not in self._waiters])
                self._outage.over()
                return
            except Unavailable as error:
                self._outage.failed(error)
                await asyncio.sleep(backoff.next())
            except Exception as error:  # noqa: BLE001  # raised at each caller
                self._fail_waits(waiting, error)
                return

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
        backoff = Backoff()
        while True:
            try:
                with only_from_outside():
                    tasks = await inbox.receive()
            except Unavailable as error:
                self._outage.failed(error)
                await asyncio.sleep(backoff.next())
                continue
            except Exception as error:  # raised at each caller
                logger.error("waiting for results failed: %s", error, exc_info=error)
                self._inbox = None
                self._fail_waits(list(self._waiters), error)
                await inbox.close()
                return
            backoff.reset()
            self._outage.over()
            for task in tasks:
                for reply in self._waiters.pop(task.uuid, ()):
                    reply.set(task)


def _bytes_of(submission: Submission) -> int:
    return _payload(submission.message)


def _payload(message: TaskMessage) -> int:
    return len(message.args) + len(message.kwargs)


def cancelled(record: Task, retention: float | None) -> Task:
    """Return the record of a task that is cancelled now; `retention` is the storage's own."""
    # An execution of its own tells this record from a task's own end.
    return replace(
        record,
        status="cancel",
        execution=f"cancel/{uuid7()}",
        finished_at=time.time(),
        due_at=None,
        retention=cancelled_kept_for(record, retention),
    )


class _Countdown(Reply[Task | None]):
    """One answer for many submissions, given after the last of them."""

    def __init__(self, reply: Reply[Task | None], count: int) -> None:
        self._reply = reply
        self._count = count
        self._error: BaseException | None = None

    def set(self, value: Task | None) -> None:
        self._count -= 1
        if self._count == 0:
            if self._error is not None:
                self._reply.fail(self._error)
            else:
                self._reply.set(None)

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self.set(None)


def _anew(submission: Submission) -> Submission:
    """Return a submission whose first try may have been published, to be tried again.

    With a key it is another publishing, so that not both are run. What has none may run twice.
    """
    message = submission.message
    if not message.submission:
        return submission
    return replace(submission, message=replace(message, submission=str(uuid7())))


def unconfirmed(message: TaskMessage, trouble: str) -> Unavailable:
    """Return the error of a submission whose deadline has passed before its write was durable."""
    again = "with the same key" if message.submission else "the same uuid"
    return Unavailable(
        f"task {message.uuid} for queue {message.queue!r} is not known to be enqueued: the write "
        f"was not confirmed in time ({trouble}); submitting {again} again is safe"
    )
