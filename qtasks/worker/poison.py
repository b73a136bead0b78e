"""Messages that may be what kills workers: each runs alone, and is dead after a few times.

A crash counts against everything that was in flight, so a broker's count accuses and never
convicts. A suspect runs while nothing else does, with the number of its lone runs made durable
in its record before; what is still without an end after the last of them is the culprit. What
waits for its turn has no such number, however often its worker is killed around it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from qtasks.worker.job import Job, count_in
from qtasks.worker.jobs import Jobs
from qtasks.worker.reach import Reach
from qtasks_core import Delivery, Outcome, Storage, Task
from qtasks_core.records import not_taken, within

logger = logging.getLogger("qtasks")

_SUSPICIOUS = 3
"""From this delivery on a message is a suspect."""
_LONE_RUNS = 3
"""So often may a suspect begin alone and not come to an end."""
_ALONE = 10.0
"""Seconds after which others run beside a suspect that goes on: what kills then makes suspects of
them, and each of those has an innocent's lone run."""
_HEADER = "qtasks-lone-runs"


def lone_runs(record: Task | None) -> int:
    """Return how often a message has begun alone, by its record."""
    return count_in(record.headers, _HEADER) if record is not None else 0


def counted(record: Task, runs: int) -> Task:
    """Return a record that says so many lone runs."""
    return replace(record, headers={**record.headers, _HEADER: str(runs)})


def suspicious(delivery: Delivery, record: Task | None) -> bool:
    """Say whether a delivery has to run alone, if at all."""
    return (delivery.count or 1) >= _SUSPICIOUS or lone_runs(record) > 0


def convicted(record: Task | None) -> str | None:
    """Return why a message is dead; None while it may run."""
    runs = lone_runs(record)
    if runs < _LONE_RUNS:
        return None
    return f"poison: its worker died {runs} times running it alone"


class Suspects:
    """Suspects of one worker, in order of arrival."""

    def __init__(
        self,
        jobs: Jobs,
        storage: Storage,
        reach: Reach,
        run: Callable[[list[Job]], None],
        end: Callable[[Job], None],
    ) -> None:
        self._jobs = jobs
        self._storage = storage
        self._reach = reach
        self._run = run
        self._end = end
        self._waiting: deque[tuple[Job, int]] = deque()
        self._last: Job | None = None

    @property
    def due(self) -> bool:
        """Whether one waits, and the last has ended: while that goes on, others run beside it."""
        return bool(self._waiting) and (self._last is None or self._last not in self._jobs)

    def add(self, job: Job, record: Task | None) -> None:
        """Take a suspect that waits for its lone run."""
        job.noted = True  # by its own record, just before it runs
        self._waiting.append((job, lone_runs(record)))

    async def run_next(self, stopping: asyncio.Event) -> None:
        """Run one suspect, once nothing else runs; return when others may run again."""
        await self._jobs.until(lambda: self._jobs.idle or stopping.is_set())
        if stopping.is_set():
            return
        job, runs = self._waiting[0]
        if job.lost:
            self._waiting.popleft()
            self._end(job)
            return
        job.started = time.time()
        logger.warning(
            "task %s %s was delivered often and never ended; it runs alone (%d)",
            job.message.task_name, job.message.uuid, runs + 1,
        )  # fmt: skip
        record = _begun(job, runs + 1)
        outcome = await self._save(record, stopping)
        if outcome is not None and not_taken(outcome):
            # The count is what matters: it is kept without arguments, as other records are.
            record = counted(within(record, outcome.reason), runs + 1)
            outcome = await self._save(record, stopping)
        if outcome is None:
            return
        self._waiting.popleft()
        if not_taken(outcome):
            job.end("error", error=record.error, dead="unstorable record")
            self._end(job)
            name, uuid = job.message.task_name, job.message.uuid
            logger.error("task %s %s is dead: %s", name, uuid, record.error)
            return
        if outcome.status == "refused":
            # Cancelled meanwhile, or another run has ended it: there is nothing left to be done.
            job.cancelled = True
            self._end(job)
            return
        job.lone_runs = runs + 1
        if stopping.is_set():
            self._end(job)
            return
        self._last = job
        self._run([job])
        try:
            async with asyncio.timeout(_ALONE):
                await self._jobs.until(lambda: job not in self._jobs or stopping.is_set())
        except TimeoutError:
            return

    async def _save(self, record: Task, stopping: asyncio.Event) -> Outcome | None:
        outcomes = await self._reach.persist(partial(self._storage.save, [record]), stopping)
        return None if outcomes is None else outcomes[0]

    def surrender(self) -> list[Job]:
        """Return those that have not run, to be given back."""
        left = [job for job, _ in self._waiting]
        self._waiting.clear()
        return left


def _begun(job: Job, runs: int) -> Task:
    return counted(job.as_record("process"), runs)


def acquitted(job: Job) -> Task | None:
    """Return the record of a suspect that is given back in order: this run does not count."""
    if not job.lone_runs:
        return None
    # A record of the same execution would be taken for a repetition.
    return replace(_begun(job, job.lone_runs - 1), execution=f"{job.execution}/back")
