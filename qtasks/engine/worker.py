"""The worker half of the engine: receive, admit, hand to the runner, complete.

It lives on the I/O loop. One batch goes: `receive` -> `admit` -> runner (the user's loop) ->
completion buffer -> `complete`, and the next is received while the last one runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import TypeVar
from uuid import NAMESPACE_OID, uuid5

from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.engine.backoff import Backoff
from qtasks.engine.client import Client
from qtasks.engine.gatherer import Gatherer
from qtasks.engine.job import Job
from qtasks.engine.mailbox import Mailbox
from qtasks.engine.runner import Runner
from qtasks_core import (
    Ack,
    Balancer,
    Completion,
    Delivery,
    Raw,
    Release,
    Retry,
    Subscription,
    Task,
    TaskMessage,
)
from qtasks_core.errors import Closed, Unavailable

logger = logging.getLogger("qtasks")
T = TypeVar("T")
_End = Job | Completion

_FLUSH = 500
"""Most completions in one `complete`."""
_FLIGHTS = 2
"""While one batch of ends waits for the server, the next is on its way."""
_UNSETTLED = 1000
"""How many ended jobs may wait for their completion before no more are received."""
_LAST_WORDS = 10.0
"""Seconds for recording the last ends when stopping, should the server be out of reach."""
_NOTE_AFTER = 0.1
"""Seconds a task has to run before `process` is recorded: shorter ones only record their end."""
_MAX_DELIVERIES = 20
"""A message delivered more often than this, without ever ending, is dead."""
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
    ) -> None:
        self.id = str(uuid7())
        self._client = client
        self._runner = runner
        self._known = known
        self._queues = tuple(queues)
        self._concurrency = concurrency
        self._balancer = balancer
        self._jobs: set[Job] = set()
        """Running, or ended and not yet completed: their leases are kept."""
        self._running = dict.fromkeys(self._queues, 0)
        self._count = 0
        self._changed = asyncio.Event()
        self._has_jobs = asyncio.Event()
        self._stopping = asyncio.Event()
        self._ending = asyncio.Event()
        self._subscription: Subscription | None = None
        runner.report_to(Mailbox(asyncio.get_running_loop(), self._ended))

    # -- life ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until `stop` has ended everything."""
        lease = self._client.broker.guarantees.lease
        subscription = await self._persist(self._subscribe, self._stopping)
        if subscription is None:
            return
        if self._stopping.is_set():
            await subscription.close()
            return
        self._subscription = subscription
        async with asyncio.TaskGroup() as group:
            self._ends = Gatherer(
                partial(self._flush, subscription), _FLUSH, _FLIGHTS, group.create_task
            )
            group.create_task(self._receive_loop(subscription))
            background = [group.create_task(self._note_loop())]
            if lease is not None:
                background.append(group.create_task(self._keep_loop(subscription, lease / 3)))
            await self._ending.wait()
            try:
                async with asyncio.timeout(_LAST_WORDS):
                    await self._until(lambda: not self._jobs)
                    await self._ends.drain()
            except TimeoutError:
                logger.error(
                    "%d ends could not be recorded before the stop; those tasks will run again",
                    len(self._jobs),
                )
            await self._ends.close()
            for task in background:
                task.cancel()

    async def stop(self, grace: float | None) -> None:
        """Stop receiving, let running tasks finish for `grace` seconds, give the rest back."""
        self._stopping.set()
        self._changed.set()
        if self._subscription is not None:
            await self._subscription.close()
        try:
            async with asyncio.timeout(grace):
                await self._until(lambda: not any(self._running.values()))
        except TimeoutError:
            self._runner.give_back()
        self._ending.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _subscribe(self) -> Subscription:
        return await self._client.broker.subscribe(dict.fromkeys(self._queues, self._concurrency))

    async def _persist(
        self, call: Callable[[], Awaitable[T]], until: asyncio.Event | None = None
    ) -> T | None:
        """Repeat `call` while the server is out of reach; None when `until` is set meanwhile."""
        backoff = Backoff()
        while True:
            try:
                return await call()
            except Unavailable as error:
                logger.warning("worker: %s; trying again", error)
            pause = backoff.next()
            if until is None:
                await asyncio.sleep(pause)
                continue
            try:
                async with asyncio.timeout(pause):
                    await until.wait()
                    return None
            except TimeoutError:
                continue

    # -- receiving -----------------------------------------------------------------------

    async def _receive_loop(self, subscription: Subscription) -> None:
        while not self._stopping.is_set():
            free = self._free()
            if free <= 0:
                self._changed.clear()
                await self._changed.wait()
                continue
            receive = partial(
                subscription.receive, self._balancer.wanted(free, self._running), free
            )
            try:
                deliveries = await self._persist(receive, self._stopping)
            except Closed:
                return
            if deliveries:
                await self._admit(deliveries)

    def _free(self) -> int:
        """Return the slots that may be filled now; unsettled ends count when they pile up."""
        running = sum(self._running.values())
        return min(self._concurrency - running, self._concurrency + _UNSETTLED - len(self._jobs))

    async def _admit(self, deliveries: list[Delivery]) -> None:
        admit = partial(self._client.composition.admit, deliveries)
        verdicts = await self._persist(admit, self._stopping)
        if verdicts is None:
            for delivery in deliveries:
                self._complete(Completion(Release(delivery), None))
            return
        jobs: list[Job] = []
        for delivery, (verdict, _) in zip(deliveries, verdicts, strict=True):
            message = delivery.message
            if isinstance(message, Raw):
                self._bury_raw(delivery, message)
            elif verdict != "run":
                self._complete(Completion(Ack(delivery), None))
            elif (job := self._accept(delivery, message)) is not None:
                jobs.append(job)
        for job in jobs:
            self._jobs.add(job)
            self._running[job.delivery.queue] += 1
        self._has_jobs.set()
        self._runner.inbox.post_all(jobs)

    def _accept(self, delivery: Delivery, message: TaskMessage) -> Job | None:
        """Return the job to run, or end the delivery otherwise."""
        self._count += 1
        job = Job(delivery, message, f"{self.id}/{self._count}")
        if message.task_name not in self._known:
            self._put_back(job)
        elif message.expires_at is not None and message.expires_at < time.time():
            job.end("error", error="expired before it could start", dead="expired")
            self._complete(job.completion())
        elif delivery.count is not None and delivery.count > _MAX_DELIVERIES:
            job.end(
                "error", error="its workers kept dying", dead=f"delivered {delivery.count} times"
            )
            self._complete(job.completion())
        else:
            return job
        return None

    def _put_back(self, job: Job) -> None:
        """Retry a task that this worker does not know later, at last end it."""
        message = job.message
        tries = int(message.headers.get(_UNKNOWN, "0")) + 1
        if tries > _UNKNOWN_TRIES:
            job.end("error", error=f"no worker knows {message.task_name!r}", dead="unknown task")
            self._complete(job.completion())
            return
        if tries == 1:
            logger.warning("unknown task %s %s; put back", message.task_name, message.uuid)
        headers = {**message.headers, _UNKNOWN: str(tries)}
        again = replace(message, headers=headers, delay=_UNKNOWN_DELAY)
        self._complete(Completion(Retry(job.delivery, again), None))

    def _bury_raw(self, delivery: Delivery, raw: Raw) -> None:
        """Keep what cannot be decoded as a dead record of its own."""
        logger.error("undecodable message in queue %s: %s", delivery.queue, raw.error)
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

    # -- completing ----------------------------------------------------------------------

    def _ended(self, jobs: list[Job]) -> None:
        """Take jobs whose functions ended; called once for all that ended meanwhile."""
        for job in jobs:
            self._running[job.delivery.queue] -= 1
        self._ends.extend(list(jobs))
        self._changed.set()

    def _complete(self, completion: Completion) -> None:
        """Complete what never became a job, or record a word in between."""
        self._ends.add(completion)

    async def _flush(self, subscription: Subscription, batch: list[_End]) -> None:
        # Asked only now: an extension may have replaced a delivery since its job ended.
        completions = [end.completion() if isinstance(end, Job) else end for end in batch]
        complete = partial(self._client.composition.complete, subscription, completions)
        outcomes = await self._persist(complete) or ()
        for end, outcome in zip(batch, outcomes, strict=True):
            if not isinstance(end, Job):
                continue
            self._jobs.discard(end)
            if outcome.status == "refused":
                logger.warning(
                    "task %s %s: its end was refused (%s); another run of it counts",
                    end.message.task_name,
                    end.message.uuid,
                    outcome.reason,
                )
        self._changed.set()

    # -- long tasks ----------------------------------------------------------------------

    async def _keep_loop(self, subscription: Subscription, period: float) -> None:
        """Extend the leases of all jobs, while there are any."""
        while True:
            await self._wait_for_jobs()
            await asyncio.sleep(period)
            held = [job for job in self._jobs if not job.lost]
            if not held:
                continue
            extend = partial(subscription.extend, [job.delivery for job in held])
            extended = await self._persist(extend) or ()
            for job, delivery in zip(held, extended, strict=True):
                if delivery is not None:
                    job.delivery = delivery
                elif job in self._jobs:
                    job.lost = True
                    logger.warning(
                        "task %s %s: the lease was lost; another worker may run it",
                        job.message.task_name, job.message.uuid,
                    )  # fmt: skip

    async def _note_loop(self) -> None:
        """Record `process` for tasks that run long enough for somebody to look."""
        while True:
            await self._wait_for_jobs()
            await asyncio.sleep(_NOTE_AFTER)
            before = time.time() - _NOTE_AFTER
            for job in self._jobs:
                if not job.noted and job.record is None and job.started <= before:
                    job.noted = True
                    self._complete(Completion(None, job.as_record("process")))

    async def _wait_for_jobs(self) -> None:
        while not self._jobs:
            self._has_jobs.clear()
            await self._has_jobs.wait()
