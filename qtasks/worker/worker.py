"""The worker half of the engine: receive, admit, hand to the runner, complete.

It lives on the I/O loop. One batch goes: `receive` -> `admit` -> runner (the user's loop) ->
completion buffer -> `complete`, and the next is received while the last one runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Collection, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.bridge.entry_queue import EntryQueue
from qtasks.client.batcher import Batcher
from qtasks.client.client import Client
from qtasks.client.retention import LEASES, kept_for
from qtasks.worker.commands import obey
from qtasks.worker.expiry import expire
from qtasks.worker.heartbeat import Heartbeat
from qtasks.worker.job import Job, count_in
from qtasks.worker.jobs import Jobs
from qtasks.worker.limits import Limits
from qtasks.worker.poison import Suspects, acquitted, convicted, suspicious
from qtasks.worker.reach import Reach
from qtasks.worker.registration import Registration
from qtasks.worker.runner import Runner
from qtasks.worker.watchdog import watch
from qtasks_core import (
    Ack,
    Balancer,
    Command,
    Completion,
    Delivery,
    Outcome,
    Raw,
    Release,
    Retry,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.records import ENVELOPE, within

logger = logging.getLogger("qtasks")
_End = Job | Completion

_FLUSH = 500
"""Most completions in one `complete`."""
_FLIGHTS = 2
"""While one batch of ends waits for the server, the next is on its way."""
_UNSETTLED = 1000
"""How many ended jobs may wait for their completion before no more are received."""
_AMPLE = 16 * 1024 * 1024
"""Bytes that no record of a batch of several has: see `Batcher`."""
_UNWIND = 3.0
"""Seconds in which a function that was cancelled has to end."""
_LAST_WORDS = 10.0
"""Seconds for recording the last ends when stopping, should the server be out of reach."""
_SKEW = 1.0
"""Seconds by which a sender's clock may be ahead before that is told."""
_UNKNOWN = "qtasks-unknown"
_UNKNOWN_DELAY = 5.0
_UNKNOWN_TRIES = 60
"""A task no worker knows is put back for about five minutes: a rolling deploy may bring it."""


class Worker:
    """Receives from `queues` and keeps up to `concurrency` jobs running."""

    def __init__(
        self,
        client: Client,
        runner: Runner,
        known: Collection[str],
        queues: Iterable[str],
        concurrency: int,
        balancer: Balancer,
        limits: Limits,
    ) -> None:
        self.id = str(uuid7())
        self.limits = limits
        self._ended_count = 0
        self._client = client
        self._runner = runner
        self._known = known
        self._queues = tuple(queues)
        self._concurrency = concurrency
        self._balancer = balancer
        self._count = 0
        self._skew_told = False
        self._paused: set[str] = set()
        self._receiving: asyncio.Timeout | None = None
        self._stopping = asyncio.Event()
        self._ending = asyncio.Event()
        self._stop: asyncio.Task[None] | None = None
        self._hurried = False
        self._finished = asyncio.Event()
        self._over = False
        """What ends from now on is not recorded: it was left to run again."""
        self._failing = asyncio.Event()
        self.failure: Exception | None = None
        """What a part has raised that no repeating mends."""
        self._subscription: Subscription | None = None
        storage = client.storage
        self._retention = storage.guarantees.retention
        self._least_retention = LEASES * (client.broker.guarantees.lease or 0.0)
        self._largest = storage.guarantees.largest
        self._storage_name = storage.guarantees.part
        self._reach = Reach()
        self._jobs = Jobs(self._queues)
        self._heartbeat = Heartbeat(self._jobs, storage, self._reach, self._cancel)
        self._suspects = Suspects(self._jobs, storage, self._reach, self._run, self._end)
        self._registration = Registration(self.id, self._queues, concurrency, self._jobs, storage)
        runner.report_to(EntryQueue(asyncio.get_running_loop(), self._ended))

    @property
    def ready(self) -> bool:
        """Whether it receives, and its servers answer."""
        return self._subscription is not None and not self._stopping.is_set() and self._reach.fine

    # -- life ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until `stop` has ended everything.

        Raises what a part raised that was not `Unavailable`: nothing more is received then, what
        runs goes on, and `failed` says so at once.
        """
        try:
            await self._work()
        except Exception as error:  # noqa: BLE001  # raised below
            self._fail(error)
        finally:
            self._finished.set()
        self._failing.set()
        if self.failure is not None:
            raise self.failure

    async def failed(self) -> None:
        """Wait until the worker has failed, or is over."""
        await self._failing.wait()

    def _fail(self, error: Exception) -> None:
        if self.failure is not None:
            return
        self.failure = error
        self._stopping.set()
        self._failing.set()
        self._interrupt_receive()
        self._jobs.notice()
        if self._runner.gone:
            # So is everybody who would stop this worker.
            self._begin_to_end(0.0)
        logger.error("worker %s failed: %s: %s", self.id, type(error).__name__, error)

    async def _work(self) -> None:
        subscription = await self._reach.persist(self._subscribe, self._stopping)
        if subscription is None:
            return
        if self._stopping.is_set():
            await self._close(subscription)
            return
        self._subscription = subscription
        async with asyncio.TaskGroup() as group:
            self._ends = Batcher(
                partial(self._flush, subscription), _FLUSH, _FLIGHTS, _bytes_of, group.create_task
            )
            receiving = group.create_task(self._vital(self._receive_loop(subscription)))
            background = [group.create_task(call) for call in self._background(subscription)]
            await self._ending.wait()
            await receiving
            await self._last_words()
            for task in background:
                task.cancel()
            await self._ends.close()

    def _background(self, subscription: Subscription) -> Iterable[Coroutine[Any, Any, None]]:
        """Return what goes on beside receiving, and costs nothing while there is no job."""
        lease = self._client.broker.guarantees.lease
        return (
            self._vital(self._heartbeat.keep(subscription, lease)),
            self._vital(self._heartbeat.look(lease)),
            self._vital(self._heartbeat.note(self._complete)),
            self._vital(watch(self._jobs, self._runner)),
            _beside(self._registration.keep(), "the registry of workers"),
            _beside(obey(self._client.broker, self._obey), "commands"),
            _beside(expire(self._client.storage, self.id), "deleting old records"),
        )

    async def _vital(self, call: Coroutine[Any, Any, None]) -> None:
        """Await what tasks depend on; should it fail, the worker does."""
        try:
            await call
        except Exception as error:  # noqa: BLE001  # raised by `run`
            self._fail(error)

    async def _last_words(self) -> None:
        self._ends.extend([*self._suspects.surrender(), *await self._abandoned()])
        try:
            async with asyncio.timeout(_LAST_WORDS):
                await self._jobs.until(lambda: not self._jobs)
                await self._ends.drain()
        except TimeoutError:
            logger.error(
                "%d ends could not be recorded before the stop; those tasks will run again",
                len(self._jobs),
            )

    async def _abandoned(self) -> list[Job]:
        """Return what does not end though it was cancelled: a loop is blocked, or it goes on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNWIND):
                await self._jobs.until(lambda: self._jobs.idle)
        self._over = True
        left = [job for job in self._jobs if job.begun and not job.returned]
        for job in left:
            logger.error(
                "task %s %s does not end though it was cancelled; it is given back",
                job.message.task_name, job.message.uuid,
            )  # fmt: skip
        return left

    async def stop(self, grace: float | None) -> None:
        """Stop receiving, let running tasks finish for `grace` seconds, give the rest back.

        Returns at the end of `run`. Asked again, it waits for the same end.
        """
        await asyncio.shield(self._begin_to_end(grace))

    def _begin_to_end(self, grace: float | None) -> asyncio.Task[None]:
        if self._stop is None:
            self._stop = asyncio.create_task(self._end_within(grace))
        return self._stop

    def give_back(self) -> None:
        """Cancel what runs and give it back at once, whatever grace is left."""
        self._hurried = True
        if not self._runner.gone:
            self._runner.give_back()
        self._jobs.notice()

    async def _end_within(self, grace: float | None) -> None:
        self._stopping.set()
        self.limits.close()
        self._jobs.notice()
        try:
            if self._subscription is not None:
                await self._close(self._subscription)
            async with asyncio.timeout(grace):
                await self._jobs.until(lambda: self._jobs.idle or self._hurried)
        except TimeoutError:
            self.give_back()
        finally:
            self._ending.set()
        await self._finished.wait()

    async def _close(self, subscription: Subscription) -> None:
        """Receive nothing more; what runs has its grace even if the server is out of reach."""
        try:
            await subscription.close()
        except Unavailable as error:
            logger.warning("closing the subscription: %s", error)
        except Exception as error:  # noqa: BLE001  # raised by `run`
            self._fail(error)
        self._interrupt_receive()

    async def _subscribe(self) -> Subscription:
        return await self._client.broker.subscribe(dict.fromkeys(self._queues, self._concurrency))

    # -- receiving -----------------------------------------------------------------------

    async def _receive_loop(self, subscription: Subscription) -> None:
        while not self._stopping.is_set():
            if self._suspects.due:
                await self._suspects.run_next(self._stopping)
                continue
            free = self._free()
            wanted = self._wanted(free)
            if not wanted:
                await self._jobs.change()
                continue
            receive = partial(subscription.receive, wanted, free)
            try:
                async with asyncio.timeout(None) as self._receiving:
                    deliveries = await self._reach.persist(receive, self._stopping)
            except TimeoutError:
                if self._receiving is not None and not self._receiving.expired():
                    raise  # a part's own, which would be repeated without a pause
                continue
            except Closed:
                return
            finally:
                self._receiving = None
            if deliveries:
                await self._admit(deliveries)

    def _free(self) -> int:
        """Return the slots that may be filled now; unsettled ends count when they pile up."""
        running = sum(self._jobs.running.values())
        return min(self._concurrency - running, self._concurrency + _UNSETTLED - len(self._jobs))

    def _wanted(self, free: int) -> dict[str, int]:
        """Return what to ask for next; nothing while all slots are taken or all queues paused."""
        if free <= 0:
            return {}
        wanted = self._balancer.wanted(free, self._jobs.running)
        if self._paused:
            return {queue: most for queue, most in wanted.items() if queue not in self._paused}
        return wanted

    async def _admit(self, deliveries: list[Delivery]) -> None:
        """Run what has to run. The leases are kept already while the storage is asked."""
        came = [job for delivery in deliveries if (job := self._job(delivery)) is not None]
        jobs = self._jobs.hold(came)
        if not jobs:
            return
        if [job for job in jobs if job.message.expires_at is not None]:
            await self._reach.persist(self._client.clock.ask, self._stopping)
        admit = partial(self._client.composition.admit, [job.delivery for job in jobs])
        verdicts = None
        try:
            verdicts = await self._reach.persist(admit, self._stopping)
        finally:
            # What began after the stop would be given no time to end.
            refused = verdicts is None or self._stopping.is_set()
            if refused:
                self._ends.extend([*jobs])
        if verdicts is None or refused:
            return
        accepted = [
            job
            for job, (verdict, record) in zip(jobs, verdicts, strict=True)
            if self._accept(job, verdict, record)
        ]
        self._run(accepted)

    def _job(self, delivery: Delivery) -> Job | None:
        """Return the job of a delivery; what cannot be decoded is buried."""
        message = delivery.message
        if isinstance(message, Raw):
            self._bury_raw(delivery, message)
            return None
        self._count += 1
        return Job(delivery, message, f"{self.id}/{self._count}")

    def _run(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._jobs.begun(job)
        self._runner.inbox.post_all(jobs)

    def _accept(self, job: Job, verdict: Verdict, record: Task | None) -> bool:
        """Say whether a job runs now, or end it or set it aside."""
        message = job.message
        if verdict != "run":
            self._finish(job, Completion(Ack(job.delivery), None))
            return False
        keep = kept_for(message.retention, self._retention, self._least_retention)
        if keep != message.retention:
            message = job.message = replace(message, retention=keep)
        if job.lost:
            self._finish(job, Completion(None, None))
        elif message.task_name not in self._known:
            self._put_back(job)
        elif message.expires_at is not None and (late := self._late(message)) > 0:
            whose = "the server" if self._client.clock.shared else "this worker"
            said = f"expired {late:.3g} s before it could start, by the clock of {whose}"
            self._bury(job, said, "expired")
        elif not suspicious(job.delivery, record):
            return True
        elif (reason := convicted(record)) is not None:
            self._bury(job, "its workers kept dying", reason)
        else:
            self._suspects.add(job, record)
        return False

    def _late(self, message: TaskMessage) -> float:
        """Return for how many seconds a message has expired.

        Where no server tells the time the limit was set by its sender's clock, and is looked at by
        this worker's. That the two differ shows where one is of the future.
        """
        if message.expires_at is None:
            return 0.0
        clock = self._client.clock
        ahead = message.created_at - time.time()
        if ahead > _SKEW and not (clock.shared or self._skew_told):
            self._skew_told = True
            logger.warning(
                "the clock of a sender is %.1f s ahead of this worker's: expires= is off by that; "
                "synchronise them",
                ahead,
            )
        return clock.now() - message.expires_at

    def _put_back(self, job: Job) -> None:
        """Retry a task that this worker does not know later, at last end it."""
        message = job.message
        tries = count_in(message.headers, _UNKNOWN) + 1
        if tries > _UNKNOWN_TRIES:
            self._bury(job, f"no worker knows {message.task_name!r}", "unknown task")
            return
        headers = {**message.headers, _UNKNOWN: str(tries)}
        again = replace(message, headers=headers, delay=_UNKNOWN_DELAY)
        self._finish(job, Completion(Retry(job.delivery, again), None))
        if tries == 1:
            logger.warning(
                'unknown task %s %s; put back: another program may use the name "%s", or a '
                "deployment is under way",
                message.task_name, message.uuid, self._client.name,
            )  # fmt: skip

    def _bury(self, job: Job, error: str, dead: str) -> None:
        """End a job that does not run."""
        job.end("error", error=error, dead=dead)
        self._finish(job, job.completion())
        name, uuid = job.message.task_name, job.message.uuid
        logger.error("task %s %s is dead: %s (%s)", name, uuid, error, dead)

    def _bury_raw(self, delivery: Delivery, raw: Raw) -> None:
        """Keep what cannot be decoded as a dead record of its own."""
        record = Task(
            uuid=str(uuid5(NAMESPACE_OID, hashlib.sha256(raw.data).hexdigest())),
            task_name="",
            status="error",
            queue=delivery.queue,
            args=raw.data,
            encoding="raw",
            execution=self.id,
            error=raw.error,
            dead="undecodable",
            finished_at=time.time(),
        )
        self._complete(Completion(Ack(delivery), record))
        logger.error("undecodable message in queue %s: %s", delivery.queue, raw.error)

    # -- completing ----------------------------------------------------------------------

    def _ended(self, jobs: list[Job]) -> None:
        """Take jobs whose functions ended; called once for all that ended meanwhile."""
        if self._over:
            return
        self._jobs.ended(jobs)
        self._ends.extend(list(jobs))

    def _end(self, job: Job) -> None:
        """Complete a job that did not run."""
        self._ends.add(job)

    def _finish(self, job: Job, completion: Completion) -> None:
        """Complete a job that did not run, in its own way."""
        self._complete(completion)
        self._let_go([job])

    def _let_go(self, jobs: list[Job]) -> None:
        """Drop jobs, and give back other deliveries of their messages: their records stop them."""
        self._jobs.drop(jobs)
        also = [Completion(Release(delivery), None) for job in jobs for delivery in job.also]
        self._ends.extend([*also])

    def _complete(self, completion: Completion) -> None:
        """Complete what never became a job, or record a word in between."""
        self._ends.add(completion)

    async def _flush(self, subscription: Subscription, batch: list[_End]) -> None:
        # Asked only now: an extension may have replaced a delivery since its job ended.
        completions = [_completion(end) if isinstance(end, Job) else end for end in batch]
        if self._largest is not None and (len(batch) == 1 or self._largest < _AMPLE):
            completions = [self._fitting(completion, self._largest) for completion in completions]
        jobs = [end for end in batch if isinstance(end, Job)]
        for job in jobs:
            job.settling = True
        complete = partial(self._client.composition.complete, subscription, completions)
        try:
            outcomes = await self._reach.persist(complete) or ()
        except Exception as error:  # noqa: BLE001  # raised by `run`
            # As far as is known these are neither recorded nor settled: they run again elsewhere.
            outcomes = [Outcome("unknown")] * len(batch)
            self._fail(error)
        self._let_go(jobs)
        self._ended_count += len(jobs)
        for end, outcome in zip(batch, outcomes, strict=True):
            if outcome.status == "refused" and isinstance(end, Job) and not end.cancelled:
                _tell_refused(end, outcome)
        self._jobs.notice()
        if self._suspects.due:
            self._interrupt_receive()
        self.limits.look(self._ended_count)

    def _fitting(self, completion: Completion, largest: int) -> Completion:
        """Return what is over the storage's limit without its arguments and result."""
        task = completion.task
        if task is None:
            return completion
        size = len(task.args) + len(task.kwargs) + len(task.returning or b"") + ENVELOPE
        size += 4 * len(task.traceback or "") + 4 * len(task.error or "")
        if size <= largest:
            return completion
        reason = (
            f"arguments and result have about {size} bytes, {self._storage_name} takes {largest}"
        )
        return replace(completion, task=within(task, reason))

    # -- commands ------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        if command.name == "cancel" and command.target is not None:
            self._heartbeat.ask(command.target)
        elif command.name in ("pause", "resume"):
            self._pause(command)
        elif command.name == "ping":
            self._registration.ask()

    def _cancel(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.cancelled = True
        self._runner.cancel(jobs)
        for job in jobs:
            logger.info("task %s %s was cancelled", job.message.task_name, job.message.uuid)

    def _pause(self, command: Command) -> None:
        """Stop or begin to receive from a queue (None: all); what runs goes on."""
        for queue in self._queues:
            if command.target in (None, queue):
                (self._paused.add if command.name == "pause" else self._paused.discard)(queue)
        logger.info("worker %s: paused queues: %s", self.id, ", ".join(self._paused) or "none")
        self._interrupt_receive()  # what waits now asks for the wrong queues
        self._jobs.notice()

    def _interrupt_receive(self) -> None:
        if self._receiving is not None:
            self._receiving.reschedule(asyncio.get_running_loop().time())


async def _beside(call: Coroutine[Any, Any, None], what: str) -> None:
    """Await what tasks do not depend on; should it fail, they go on without it."""
    try:
        await call
    except Exception as error:  # said, and nothing that a task would have to end for
        logger.error("%s failed, and rests until the next start: %s", what, error, exc_info=error)


def _bytes_of(end: _End) -> int:
    record = end.record if isinstance(end, Job) else end.task
    if record is None:
        return 0
    return len(record.args) + len(record.kwargs) + len(record.returning or b"")


def _tell_refused(job: Job, outcome: Outcome) -> None:
    said = (
        "its end was refused (%s); another run of it counts"
        if outcome.there is not None
        else "its message was not settled (%s); it may run again"
    )
    logger.warning(f"task %s %s: {said}", job.message.task_name, job.message.uuid, outcome.reason)


def _completion(job: Job) -> Completion:
    """Return how a job's end is settled; a suspect that is given back did not kill anybody."""
    completion = job.completion()
    if isinstance(completion.settlement, Release) and completion.task is None:
        return replace(completion, task=acquitted(job))
    return completion
