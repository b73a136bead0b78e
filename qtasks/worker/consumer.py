"""The consumer: it receives a delivery for each free slot, and starts or finishes its job."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Collection
from functools import partial
from uuid import NAMESPACE_OID, uuid5

from msgspec.structs import replace

from qtasks.client.client import Client
from qtasks.client.retrying import Retrying
from qtasks.client.times import LEASES, kept_for
from qtasks.worker.completer import Completer
from qtasks.worker.job import Job, Jobs, count_in, is_candidate
from qtasks.worker.life import Life
from qtasks.worker.poison import PoisonCandidates, poisoned
from qtasks.worker.states import DISCARDED
from qtasks_core import (
    Ack,
    Balancer,
    Completion,
    Delivery,
    Raw,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import Closed, Unavailable

logger = logging.getLogger("qtasks")

_UNSETTLED = 1000
"""How many finished jobs may wait for their settlement before no more are received."""
_SKEW = 1.0
"""Seconds by which a sender's clock may be ahead before that is logged."""
_UNKNOWN = "qtasks-unknown"
UNKNOWN_DELAY = 5.0
UNKNOWN_TRIES = 60
"""How often an unknown task is retried, for about five minutes in all.

A rolling deployment may start a worker that knows it.
"""


class Consumer:
    """Receives, asks the storage which jobs still have to run, and starts those.

    It lives on the I/O loop.
    """

    def __init__(
        self,
        worker_id: str,
        client: Client,
        known: Collection[str],
        queues: tuple[str, ...],
        concurrency: int,
        balancer: Balancer,
        jobs: Jobs,
        completer: Completer,
        candidates: PoisonCandidates,
        life: Life,
        retrying: Retrying,
    ) -> None:
        self._worker_id = worker_id
        self._app_name = client.name
        self._broker = client.broker
        self._composition = client.composition
        self._clock = client.clock
        self._known = known
        self._queues = queues
        self._concurrency = concurrency
        self._balancer = balancer
        self._jobs = jobs
        self._completer = completer
        self._candidates = candidates
        self._life = life
        self._retrying = retrying
        self._retention = client.storage.guarantees.retention
        self._least_retention = LEASES * (client.broker.guarantees.lease or 0.0)
        self._kept_by_default = kept_for(None, self._retention, self._least_retention)
        self._received = 0
        self._skew_logged = False
        self._paused: set[str] = set()
        self._subscription: Subscription | None = None
        self._receiving: asyncio.Timeout | None = None
        jobs.listen(self._look_again)

    # -- the subscription ------------------------------------------------------------------

    async def open(self) -> Subscription | None:
        """Subscribe to the queues. Return None if the worker is stopped before it succeeds."""
        subscription = await self._retrying.call(self._subscribe, self._life.stopping)
        self._subscription = subscription
        if self._life.stopping.is_set():
            await self.close()
            return None
        return subscription

    async def _subscribe(self) -> Subscription:
        return await self._broker.subscribe(dict.fromkeys(self._queues, self._concurrency))

    async def close(self) -> None:
        """Receive no more. Running tasks keep their grace period if the server does not answer."""
        if self._subscription is None:
            return
        try:
            await self._subscription.close()
        except Unavailable as error:
            logger.warning("closing the subscription: %s", error)
        except Exception as error:  # noqa: BLE001  # raised by `Worker.run`
            self._life.fail(error)

    # -- receiving -------------------------------------------------------------------------

    async def receive(self, subscription: Subscription) -> None:
        """Receive and start jobs until the worker stops."""
        while not self._life.stopping.is_set():
            if self._candidates.waiting and self._candidates.may_run:
                await self._candidates.run_next()
                continue
            free = self._free()
            wanted = self._wanted(free)
            if not wanted:
                await self._jobs.change()
                continue
            receive = partial(subscription.receive, wanted, free)
            try:
                async with asyncio.timeout(None) as self._receiving:
                    deliveries = await self._retrying.call(receive, self._life.stopping)
            except TimeoutError:
                if self._receiving is not None and not self._receiving.expired():
                    raise  # raised by the broker; a loop would retry it without a pause
                continue
            except Closed:
                return
            finally:
                self._receiving = None
            if deliveries:
                await self._admit(deliveries)

    def _free(self) -> int:
        """Return the slots that may be filled now; unsettled jobs count when they pile up."""
        running = sum(self._jobs.running.values())
        return min(self._concurrency - running, self._concurrency + _UNSETTLED - len(self._jobs))

    def _wanted(self, free: int) -> dict[str, int]:
        """Return what to ask for next: nothing if no slot is free or all queues are paused."""
        if free <= 0:
            return {}
        wanted = self._balancer.wanted(free, self._jobs.running)
        if self._paused:
            return {queue: most for queue, most in wanted.items() if queue not in self._paused}
        return wanted

    def pause(self, queue: str | None) -> None:
        """Stop receiving from a queue (None: from all). Running tasks are not affected."""
        self._paused.update(self._queues if queue is None else {queue} & {*self._queues})
        self._interrupt_for_pauses()

    def resume(self, queue: str | None) -> None:
        """Receive from a queue (None: from all) again."""
        self._paused.difference_update(self._queues if queue is None else (queue,))
        self._interrupt_for_pauses()

    def _interrupt_for_pauses(self) -> None:
        paused = ", ".join(self._paused) or "none"
        logger.info("worker %s: paused queues: %s", self._worker_id, paused)
        self._interrupt()  # a call that waits now asks for the wrong queues
        self._jobs.notice()

    def _look_again(self) -> None:
        """Interrupt a call that waits for deliveries if other work is due."""
        other_work = self._candidates.waiting and self._candidates.may_run
        if self._receiving is not None and (other_work or self._life.stopping.is_set()):
            self._interrupt()

    def _interrupt(self) -> None:
        if self._receiving is not None and not self._receiving.expired():
            self._receiving.reschedule(asyncio.get_running_loop().time())

    # -- admitting -------------------------------------------------------------------------

    async def _admit(self, deliveries: list[Delivery]) -> None:
        """Start the jobs that have to run. Leases are extended while the storage is asked."""
        jobs = self._jobs.hold(
            [job for delivery in deliveries if (job := self._job(delivery)) is not None]
        )
        if not jobs:
            return
        admit = partial(self._composition.admit, [job.leases[0] for job in jobs])
        verdicts = None
        try:
            if [job for job in jobs if job.message.expires_at is not None]:
                await self._retrying.call(self._clock.ask, self._life.stopping)
            verdicts = await self._retrying.call(admit, self._life.stopping)
        finally:
            # A job that started after the stop would have no time to finish.
            is_released = verdicts is None or self._life.stopping.is_set()
            if is_released:
                self._completer.release(jobs)
        if verdicts is None or is_released:
            return
        self._jobs.start(
            [
                job
                for job, (verdict, record) in zip(jobs, verdicts, strict=True)
                if self._may_start(job, verdict, record)
            ]
        )

    def _job(self, delivery: Delivery) -> Job | None:
        """Return the job of a delivery; one that cannot be decoded is dead-lettered."""
        message = delivery.message
        if isinstance(message, Raw):
            self._dead_letter_raw(delivery, message)
            return None
        self._received += 1
        return Job(delivery, message, f"{self._worker_id}/{self._received}")

    def _may_start(self, job: Job, verdict: Verdict, record: Task | None) -> bool:
        """Return whether a job starts now. If not, complete it or set it aside."""
        message = job.message
        if verdict != "run" or job.state is DISCARDED:
            if job.state is not DISCARDED:
                job.discard()
            self._completer.add(job)
            return False
        keep = self._kept_by_default
        if message.retention is not None:
            keep = kept_for(message.retention, self._retention, self._least_retention)
        if keep != message.retention:
            message = job.message = replace(message, retention=keep)
        if not job.leases:
            self._finish(job)
        elif message.task_name not in self._known:
            self._put_back(job)
        elif message.expires_at is not None and (late := self._late(message)) > 0:
            whose = "the server" if self._clock.shared else "this worker"
            said = f"expired {late:.3g} s before it could start, by the clock of {whose}"
            self._dead_letter(job, said, "expired")
        elif not is_candidate(job.leases[0], record):
            return True
        elif (reason := poisoned(record)) is not None:
            self._dead_letter(job, "its workers kept dying", reason)
        else:
            self._candidates.add(job, record)
        return False

    def _late(self, message: TaskMessage) -> float:
        """Return for how many seconds a message has expired.

        If neither server has a clock, the sender has set the limit by its own clock, and this
        worker uses its own. A creation time in the future shows that the two differ.
        """
        if message.expires_at is None:
            return 0.0
        ahead = message.created_at - time.time()
        if ahead > _SKEW and not (self._clock.shared or self._skew_logged):
            self._skew_logged = True
            logger.warning(
                "the clock of a sender is %.1f s ahead of this worker's: expires= is off by that; "
                "synchronise them",
                ahead,
            )
        return self._clock.now() - message.expires_at

    def _put_back(self, job: Job) -> None:
        """Retry an unknown task later. After `UNKNOWN_TRIES` retries, dead-letter it."""
        message = job.message
        tries = count_in(message.headers, _UNKNOWN) + 1
        if tries > UNKNOWN_TRIES:
            self._dead_letter(job, f"no worker knows {message.task_name!r}", "unknown task")
            return
        headers = {**message.headers, _UNKNOWN: str(tries)}
        job.next_message = replace(message, headers=headers, delay=UNKNOWN_DELAY)
        self._finish(job)
        if tries == 1:
            logger.warning(
                'unknown task %s %s; put back: another program may use the name "%s", or a '
                "deployment is under way",
                message.task_name, message.uuid, self._app_name,
            )  # fmt: skip

    def _dead_letter(self, job: Job, error: str, dead: str) -> None:
        """Record that a job will never run, and why."""
        job.set_result("error", error=error, dead=dead)
        self._finish(job)
        name, uuid = job.message.task_name, job.message.uuid
        logger.error("task %s %s is dead: %s (%s)", name, uuid, error, dead)

    def _finish(self, job: Job) -> None:
        """Complete a job that does not run."""
        job.finish()
        self._completer.add(job)

    def _dead_letter_raw(self, delivery: Delivery, raw: Raw) -> None:
        """Keep a message that cannot be decoded, as a dead letter with a new record."""
        record = Task(
            uuid=str(uuid5(NAMESPACE_OID, hashlib.sha256(raw.data).hexdigest())),
            task_name="",
            status="error",
            queue=delivery.queue,
            args=raw.data,
            encoding="raw",
            execution=self._worker_id,
            error=raw.error,
            dead="undecodable",
            finished_at=time.time(),
        )
        self._completer.complete(Completion(Ack(delivery), record))
        logger.error("undecodable message in queue %s: %s", delivery.queue, raw.error)
