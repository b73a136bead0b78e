"""Poison: messages that crash their worker. A candidate runs alone, and finally is dead-lettered.

A crash counts against everything that was in flight: the broker's count of deliveries rises for all
of it, so it cannot tell which message is poison. It only says which messages are candidates. A
candidate runs in isolation, while nothing else runs in its worker. Before that, its record is saved
with the number of its isolated runs. A message that has not finished after the last of them is
poison. While a candidate waits for its turn this number stays, however often its worker is killed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from functools import partial

from qtasks.client.retrying import Retrying
from qtasks.worker.completer import Completer
from qtasks.worker.job import Job, Jobs, counted, isolated_runs
from qtasks.worker.states import DISCARDED
from qtasks_core import Outcome, Storage, Task
from qtasks_core.records import not_taken, within

logger = logging.getLogger("qtasks")

_MOST_ISOLATED_RUNS = 3
"""A candidate that has not finished after so many isolated runs is poison."""
ISOLATION = 10.0
"""Seconds after which others run beside a candidate that is still running. If it crashes the worker
then, they become candidates too, and each of them has an isolated run that it survives."""


def poisoned(record: Task | None) -> str | None:
    """Return why a message is poison; None while it may run."""
    runs = isolated_runs(record)
    if runs < _MOST_ISOLATED_RUNS:
        return None
    return f"poison: its worker died {runs} times running it alone"


class PoisonCandidates:
    """The poison candidates of one worker, in order of arrival. It lives on the I/O loop."""

    def __init__(
        self,
        jobs: Jobs,
        storage: Storage,
        completer: Completer,
        retrying: Retrying,
        stopping: asyncio.Event,
    ) -> None:
        self._jobs = jobs
        self._storage = storage
        self._completer = completer
        self._retrying = retrying
        self._stopping = stopping
        self.waiting: deque[tuple[Job, int]] = deque()
        """Those that have not run yet, with the number of their isolated runs so far."""
        self._isolated: Job | None = None
        """The last that ran in isolation; it may still run, with others beside it."""

    @property
    def may_run(self) -> bool:
        """Whether the last one that ran in isolation is completed."""
        return self._isolated is None or self._isolated not in self._jobs

    def add(self, job: Job, record: Task | None) -> None:
        """Take a candidate that waits for its isolated run."""
        job.set_aside()
        self.waiting.append((job, isolated_runs(record)))

    async def run_next(self) -> None:
        """Run one candidate once nothing else runs; return when others may run again."""
        await self._jobs.until(lambda: self._jobs.idle or self._stopping.is_set())
        if self._stopping.is_set():
            return
        job, runs = self.waiting[0]
        if job.is_lost or job.state is DISCARDED:
            self.waiting.popleft()
            self._completer.release([job])
            return
        logger.warning(
            "task %s %s was delivered often and never finished; it runs alone (%d)",
            job.message.task_name, job.message.uuid, runs + 1,
        )  # fmt: skip
        job.started = time.time()
        record = counted(job.as_record("process"), runs + 1)
        outcome = await self._save(record)
        if outcome is not None and not_taken(outcome):
            # Save the count at least: without the arguments, as other records that are too large.
            record = counted(within(record, outcome.reason), runs + 1)
            outcome = await self._save(record)
        if outcome is None:
            return  # the worker stops, and releases it
        self.waiting.popleft()
        if outcome.status == "refused":
            self._drop(job, record, outcome)
        else:
            job.isolated_runs = runs + 1
            await self._run(job)

    async def _save(self, record: Task) -> Outcome | None:
        save = partial(self._storage.save, [record])
        outcomes = await self._retrying.call(save, self._stopping)
        return None if outcomes is None else outcomes[0]

    def _drop(self, job: Job, record: Task, outcome: Outcome) -> None:
        """Complete a candidate whose record was refused, so that it must not run."""
        if not_taken(outcome):
            job.set_result("error", error=record.error, dead="unstorable record")
            self._completer.release([job])
            name, uuid = job.message.task_name, job.message.uuid
            logger.error("task %s %s is dead: %s", name, uuid, record.error)
            return
        if job.state is not DISCARDED:
            job.discard()  # cancelled meanwhile, or another run has finished it
        self._completer.add(job)

    async def _run(self, job: Job) -> None:
        if self._stopping.is_set() or job.state is DISCARDED:
            self._completer.release([job])
            return
        self._isolated = job
        self._jobs.start([job])
        try:
            async with asyncio.timeout(ISOLATION):
                await self._jobs.until(lambda: job not in self._jobs or self._stopping.is_set())
        except TimeoutError:
            return

    def release(self) -> None:
        """Release those that have not run."""
        self._completer.release([job for job, _ in self.waiting])
        self.waiting.clear()
