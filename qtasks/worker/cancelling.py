"""Stopping the runs of tasks that were cancelled.

A cancelled task is one whose record says `cancel`. So the worker looks at the records: at once for
a task that a command names, and at intervals for all long-running tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from qtasks.client.retrying import Retrying
from qtasks.worker.job import Job, Jobs
from qtasks.worker.runner import Runner
from qtasks.worker.states import ADMITTING, RUNNING, WAITING
from qtasks_core import Storage

logger = logging.getLogger("qtasks")

_CHECK_EVERY = 10.0
"""Seconds between checks if the broker has no leases."""
_ARRIVING = 1.5
"""Seconds after which a command is obeyed a second time if no job was of its task: a message that
had left its queue before the command came, with its record already looked at, is a job by then."""
_MOST_NAMED = 1000
_BEFORE_ITS_RUN = (ADMITTING, WAITING)


class Cancelling:
    """Looks for cancelled tasks among the jobs of a worker. It lives on the I/O loop.

    It is separate from the heartbeat, so that no lease is lost while the storage does not answer.
    """

    def __init__(self, jobs: Jobs, storage: Storage, runner: Runner, retrying: Retrying) -> None:
        self._jobs = jobs
        self._storage = storage
        self._runner = runner
        self._retrying = retrying
        self._named: set[str] = set()
        self._named_before: set[str] = set()
        """The tasks that were named and are of no job yet."""
        self._asked = asyncio.Event()

    async def watch(self, lease: float | None) -> None:
        """Look for cancelled tasks, for ever, as often as leases are extended."""
        every = _CHECK_EVERY if lease is None else lease / 3
        while True:
            await self._jobs.present()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_ARRIVING, every) if self._named_before else every):
                    await self._asked.wait()
            self._asked.clear()
            named, self._named = self._named, set()
            asked = named | self._named_before
            self._named_before = named - {job.message.uuid for job in self._jobs}
            await self._check(
                job
                for job in self._jobs
                if (job.process_noted and not job.is_lost) or job.message.uuid in asked
            )

    def check_soon(self, uuid: str) -> None:
        """Check at once whether a task was cancelled, if this worker has or gets a job of it."""
        if len(self._named) < _MOST_NAMED:
            self._named.add(uuid)
            self._asked.set()

    async def _check(self, jobs: Iterable[Job]) -> None:
        """Cancel those of these jobs whose records say so."""
        asked = [job for job in jobs if _can_be_cancelled(job)]
        if not asked:
            return
        get = partial(self._storage.get, [job.message.uuid for job in asked])
        records = await self._retrying.call(get) or ()
        cancelled = [
            job
            for job, record in zip(asked, records, strict=True)
            if record is not None and record.status == "cancel" and _can_be_cancelled(job)
        ]
        for job in cancelled:
            if job.state in _BEFORE_ITS_RUN:
                job.discard()
            else:
                job.cancel()
            logger.info("task %s %s was cancelled", job.message.task_name, job.message.uuid)
        if cancelled:
            self._runner.cancel(cancelled)


def _can_be_cancelled(job: Job) -> bool:
    return job.state is RUNNING or job.state in _BEFORE_ITS_RUN
