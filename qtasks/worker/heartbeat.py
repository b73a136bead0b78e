"""A worker's heartbeat: it extends leases, and records which long tasks run."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from qtasks.client.retrying import Retrying
from qtasks.worker.completer import Completer
from qtasks.worker.job import Job, Jobs
from qtasks.worker.states import RUNNING
from qtasks_core import Completion, Subscription

logger = logging.getLogger("qtasks")

NOTE_AFTER = 0.1
"""Seconds that a task has to run before `process` is recorded. Of shorter ones only the result is
recorded."""


class Heartbeat:
    """Extends leases and records `process` while a worker has jobs. It lives on the I/O loop."""

    def __init__(self, jobs: Jobs, completer: Completer, retrying: Retrying) -> None:
        self._jobs = jobs
        self._completer = completer
        self._retrying = retrying

    async def extend_leases(self, subscription: Subscription, lease: float | None) -> None:
        """Extend the leases of all jobs, for ever. Return at once if the broker has no leases."""
        while lease is not None:
            await self._jobs.present()
            await asyncio.sleep(lease / 3)
            if held := [job for job in self._jobs if not job.is_lost]:
                await self._extend(subscription, held)

    async def _extend(self, subscription: Subscription, held: list[Job]) -> None:
        asked = [(job, lease) for job in held for lease in job.leases]
        extend = partial(subscription.extend, [lease for _, lease in asked])
        answers = await self._retrying.call(extend) or ()
        for (job, lease), answer in zip(asked, answers, strict=True):
            if job not in self._jobs or job.is_lost:
                continue
            job.renew(lease, answer)
            if job.is_lost:
                logger.warning(
                    "task %s %s: the lease was lost; another worker may run it",
                    job.message.task_name, job.message.uuid,
                )  # fmt: skip

    async def note_running(self) -> None:
        """Record `process` for tasks that run longer than `NOTE_AFTER`, for ever."""
        while True:
            await self._jobs.present()
            await asyncio.sleep(NOTE_AFTER)
            before = time.time() - NOTE_AFTER
            for job in self._jobs:
                if (
                    job.state is RUNNING
                    and not job.process_noted
                    and job.record is None
                    and job.started <= before
                ):
                    job.process_noted = True
                    self._completer.complete(Completion(None, job.as_record("process")))
