"""Completing jobs: their records are saved and their deliveries settled, in batches.

Finished jobs go into the completion buffer. It is flushed as one batch at the next turn of the
I/O loop, while the next jobs run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from msgspec.structs import replace

from qtasks.client.batcher import Batcher
from qtasks.client.retrying import Retrying
from qtasks.worker.job import Job, Jobs
from qtasks.worker.life import Life
from qtasks.worker.limits import Limits
from qtasks.worker.states import CANCELLING, DISCARDED
from qtasks_core import Ack, Completion, Composition, Guarantees, Outcome, Release, Subscription
from qtasks_core.records import ENVELOPE, within

logger = logging.getLogger("qtasks")

_FLUSH = 500
"""Most completions in one `complete`."""
_FLIGHTS = 2
"""While one batch waits for the server, the next is on its way."""
_AMPLE = 16 * 1024 * 1024
"""More bytes than a record in a batch of several can have: `Batcher` limits the batch."""


class Completer:
    """The completion buffer of one worker. It lives on the I/O loop."""

    def __init__(
        self,
        composition: Composition,
        storage: Guarantees,
        jobs: Jobs,
        life: Life,
        retrying: Retrying,
        limits: Limits,
    ) -> None:
        self._composition = composition
        self._largest = storage.largest
        self._storage_name = storage.part
        self._jobs = jobs
        self._life = life
        self._retrying = retrying
        self._limits = limits
        self._returned = 0
        """How many functions have returned."""

    def open(
        self,
        subscription: Subscription,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """Start to flush added jobs. `spawn` starts the task of each flush."""
        self._buffer: Batcher[Job | Completion] = Batcher(
            partial(self._flush, subscription), _FLUSH, _FLIGHTS, _bytes_of, spawn
        )

    def take_back(self, jobs: list[Job]) -> None:
        """Complete jobs that the runner has posted back; called once for all of one turn."""
        self._returned += len(jobs)
        self._buffer.extend([*self._jobs.take_back(jobs)])

    def add(self, job: Job) -> None:
        """Complete a job that is finished or discarded and did not come from the runner."""
        self._buffer.add(job)

    def release(self, jobs: list[Job]) -> None:
        """Release jobs for another worker, unless their tasks were cancelled.

        These jobs have not run, or the worker does not wait for their functions any more.
        """
        for job in jobs:
            if job.state is CANCELLING:
                job.discard()
            elif job.state is not DISCARDED:
                job.finish()
        self._buffer.extend([*jobs])

    def complete(self, completion: Completion) -> None:
        """Record or settle something else: a delivery without a job, or an intermediate record."""
        self._buffer.add(completion)

    async def drain(self) -> None:
        """Wait until the buffer is empty and the servers have answered."""
        await self._buffer.drain()

    async def close(self) -> None:
        """Cancel the flushes in flight."""
        await self._buffer.close()

    async def _flush(self, subscription: Subscription, batch: list[Job | Completion]) -> None:
        # Settled only now: an extension may have replaced a delivery since its job finished.
        completions = [item.settle() if isinstance(item, Job) else item for item in batch]
        if self._largest is not None and (len(batch) == 1 or self._largest < _AMPLE):
            completions = [self._fitting(completion, self._largest) for completion in completions]
        complete = partial(self._composition.complete, subscription, completions)
        try:
            outcomes = await self._retrying.call(complete) or ()
        except Exception as error:  # noqa: BLE001  # raised by `Worker.run`
            # These may be neither recorded nor settled. Then another worker runs them again.
            outcomes = [Outcome("unknown")] * len(batch)
            self._life.fail(error)
        self._close([item for item in batch if isinstance(item, Job)])
        for item, completion, outcome in zip(batch, completions, outcomes, strict=True):
            if outcome.status == "refused" and isinstance(item, Job):
                _log_refused(item, completion, outcome)
        self._jobs.notice()
        if self._limits.are_set:
            self._limits.check(self._returned)

    def _close(self, jobs: list[Job]) -> None:
        """Drop jobs and release their other deliveries: the records stop those messages."""
        self._jobs.close(jobs)
        others = [Completion(Release(lease), None) for job in jobs for lease in job.leases[1:]]
        self._buffer.extend([*others])

    def _fitting(self, completion: Completion, largest: int) -> Completion:
        """Return a completion with a record that the storage takes.

        A larger one is recorded without its arguments and result.
        """
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


def _bytes_of(item: Job | Completion) -> int:
    record = item.record if isinstance(item, Job) else item.task
    if record is None:
        return 0
    return len(record.args) + len(record.kwargs) + len(record.returning or b"")


def _log_refused(job: Job, completion: Completion, outcome: Outcome) -> None:
    current = outcome.current
    is_discarded = completion.task is None and isinstance(completion.settlement, Ack)
    if is_discarded or (current is not None and current.status == "cancel"):
        return  # nothing is lost: another worker has the task, or it was cancelled
    message = (
        "its result was refused (%s); the result of another run counts"
        if current is not None
        else "its message was not settled (%s); it may run again"
    )
    logger.warning(
        f"task %s %s: {message}", job.message.task_name, job.message.uuid, outcome.reason
    )
