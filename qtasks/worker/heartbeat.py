"""What a worker does for tasks that run long: it keeps their leases, says so, hears of cancels."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from qtasks.worker.job import Job
from qtasks.worker.jobs import Jobs
from qtasks.worker.reach import Reach
from qtasks_core import Completion, Storage, Subscription

logger = logging.getLogger("qtasks")

_NOTE_AFTER = 0.1
"""Seconds a task has to run before `process` is recorded: shorter ones only record their end."""
_CHECK_EVERY = 10.0
"""Seconds between looks for cancelled tasks where there is no lease to tell how often."""


class Heartbeat:
    """Watches over the jobs of a worker, while there are any."""

    def __init__(
        self, jobs: Jobs, storage: Storage, reach: Reach, cancel: Callable[[list[Job]], None]
    ) -> None:
        self._jobs = jobs
        self._storage = storage
        self._reach = reach
        self._cancel = cancel
        self._named: set[str] = set()
        self._asked = asyncio.Event()

    async def keep(self, subscription: Subscription, lease: float | None) -> None:
        """Extend the leases of all jobs, for ever; return where there are none to be kept."""
        while lease is not None:
            await self._jobs.present()
            await asyncio.sleep(lease / 3)
            if held := [job for job in self._jobs if not job.lost]:
                await self._extend(subscription, held)

    async def look(self, lease: float | None) -> None:
        """Look which jobs were cancelled, for ever.

        Apart from the leases, which a storage that is out of reach must not cost.
        """
        while True:
            await self._jobs.present()
            with suppress(TimeoutError):
                async with asyncio.timeout(_CHECK_EVERY if lease is None else lease / 3):
                    await self._asked.wait()
            self._asked.clear()
            named, self._named = self._named, set()
            await self._check(
                job
                for job in self._jobs
                if (job.noted and not job.lost) or job.message.uuid in named
            )

    def ask(self, uuid: str) -> None:
        """Have it look at once whether a task was cancelled, should it be one of the jobs."""
        if any(job.message.uuid == uuid for job in self._jobs):
            self._named.add(uuid)
            self._asked.set()

    async def _extend(self, subscription: Subscription, held: list[Job]) -> None:
        asked = [(job, d) for job in held for d in (job.delivery, *job.also)]
        extend = partial(subscription.extend, [delivery for _, delivery in asked])
        extended = await self._reach.persist(extend) or ()
        for (job, asked_for), delivery in zip(asked, extended, strict=True):
            if job.delivery is not asked_for:
                others = tuple(other for other in job.also if other is not asked_for)
                job.also = others if delivery is None else (*others, delivery)
            elif delivery is not None:
                job.delivery = delivery
            elif job.also:
                job.delivery, job.also = job.also[0], job.also[1:]
            elif job in self._jobs and not job.settling:
                job.lost = True
                logger.warning(
                    "task %s %s: the lease was lost; another worker may run it",
                    job.message.task_name, job.message.uuid,
                )  # fmt: skip

    async def _check(self, jobs: Iterable[Job]) -> None:
        """Stop those of these jobs whose records say that they were cancelled."""
        asked = [job for job in jobs if not job.cancelled]
        if not asked:
            return
        get = partial(self._storage.get, [job.message.uuid for job in asked])
        records = await self._reach.persist(get) or ()
        cancelled = [
            job
            for job, record in zip(asked, records, strict=True)
            if record is not None and record.status == "cancel"
        ]
        if cancelled:
            self._cancel(cancelled)

    async def note(self, complete: Callable[[Completion], None]) -> None:
        """Record `process` for tasks that run long enough for somebody to look, for ever."""
        while True:
            await self._jobs.present()
            await asyncio.sleep(_NOTE_AFTER)
            before = time.time() - _NOTE_AFTER
            for job in self._jobs:
                if job.begun and not job.noted and job.record is None and job.started <= before:
                    job.noted = True
                    complete(Completion(None, job.as_record("process")))
