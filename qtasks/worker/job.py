"""One run of one task in a worker, from its delivery until that is settled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from msgspec.structs import replace

from qtasks.bridge.crossing import EntryQueue
from qtasks.worker.states import (
    ADMITTING,
    CANCEL,
    CANCELLING,
    CLOSE,
    DISCARD,
    DISCARDED,
    FINISH,
    RUNNING,
    SET_ASIDE,
    SETTLE,
    SETTLING,
    START,
    JobState,
)
from qtasks_core import (
    Ack,
    Completion,
    Delivery,
    Release,
    Retry,
    Status,
    Task,
    TaskMessage,
)
from qtasks_core.records import record_of
from qtasks_core.schemas import LONGEST

_WITH_THE_RUNNER = (RUNNING, CANCELLING)
_CANDIDATE_FROM = 3
"""From this delivery on a message is a poison candidate."""
ISOLATED_RUNS = "qtasks-lone-runs"
"""The header of a record that counts isolated runs. Workers of other releases read it too."""


class Job:
    """What a worker holds for a message: its leases, its state, and the result of the run.

    Two threads use a job. The state and the leases belong to the I/O loop: every transition
    (`set_aside`, `start`, `cancel`, `finish`, `discard`, `settle`, `close`) is called there and
    nowhere else. The loop of the tasks calls `set_result` and `set_retry`, and only between `start`
    and the moment at which the runner posts the job back. A job that never runs gets its result on
    the I/O loop. The worker may give up waiting for a function that ignores its cancellation: the
    result is read once, by `settle`, and what the function sets later has no effect.
    """

    __slots__ = (
        "execution", "isolated_runs", "leases", "message", "next_message", "process_noted",
        "queue", "record", "started", "state",
    )  # fmt: skip

    def __init__(self, delivery: Delivery, message: TaskMessage, execution: str) -> None:
        self.state: JobState = ADMITTING
        """Read it anywhere; only the transitions below set it."""
        self.queue = delivery.queue
        self.leases: tuple[Delivery, ...] = (delivery,)
        """The deliveries of the message that are held; empty once all leases are lost.

        The first is settled with the result, the others are released then. There are several when
        the message was published twice, or was delivered again after a connection was lost.
        """
        self.message = message
        self.execution = execution
        self.started = time.time()
        self.process_noted = False
        """`process` was recorded, or is recorded by the isolated run."""
        self.isolated_runs = 0
        """For a poison candidate: how often the message has started an isolated run, this one
        included. 0 for others."""
        self.record: Task | None = None
        """The result as it is recorded; None for a job that is released."""
        self.next_message: TaskMessage | None = None
        """What is published in place of the message: the next attempt."""

    # -- transitions: each checks the state itself, since a call more a task is measurable ----

    def set_aside(self) -> None:
        """Let a poison candidate wait for its isolated run."""
        if self.state not in SET_ASIDE.sources:
            raise SET_ASIDE.refused(self.state)
        self.state = SET_ASIDE.target
        self.process_noted = True

    def start(self) -> None:
        """Hand the job to the runner."""
        if self.state not in START.sources:
            raise START.refused(self.state)
        self.state = START.target
        self.started = time.time()

    def cancel(self) -> None:
        """The task was cancelled while the function runs: its result does not count."""
        if self.state not in CANCEL.sources:
            raise CANCEL.refused(self.state)
        self.state = CANCEL.target

    def finish(self) -> None:
        """The function has returned, or is not waited for any more, or does not run at all."""
        if self.state not in FINISH.sources:
            raise FINISH.refused(self.state)
        self.state = FINISH.target

    def discard(self) -> None:
        """There is nothing to record: the task is final or cancelled, or this attempt is old."""
        if self.state not in DISCARD.sources:
            raise DISCARD.refused(self.state)
        self.state = DISCARD.target

    def settle(self) -> Completion:
        """Return what the composition has to record and to settle, which begins now."""
        is_discarded = self.state is DISCARDED
        if self.state not in SETTLE.sources:
            raise SETTLE.refused(self.state)
        self.state = SETTLE.target
        delivery = self.leases[0] if self.leases else None
        if is_discarded:
            return Completion(None if delivery is None else Ack(delivery), None)
        # In this order: `set_retry` may be at work on another thread, and sets the record last.
        record, next_message = self.record, self.next_message
        if delivery is None:
            # A result may still count: the order of records decides.
            return Completion(None, None if next_message is not None else record)
        if next_message is not None:
            return Completion(Retry(delivery, next_message), record)
        if record is not None:
            return Completion(Ack(delivery), record)
        return Completion(Release(delivery), self._not_counted())

    def close(self) -> None:
        """The servers have answered; the worker drops the job."""
        if self.state not in CLOSE.sources:
            raise CLOSE.refused(self.state)
        self.state = CLOSE.target

    # -- leases ----------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether no lease is left, so that another worker may run the message."""
        return not self.leases

    def adopt(self, delivery: Delivery) -> None:
        """Hold another delivery of the same message, so that no other worker runs it.

        The newest lease is the least likely to be lost, so it is the one that is settled.
        """
        if self.state is SETTLING:
            self.leases += (delivery,)
        else:
            self.leases = (delivery, *self.leases)

    def renew(self, asked: Delivery, answer: Delivery | None) -> None:
        """Apply the result of extending a lease: the lease, its replacement, or None if lost."""
        if answer is asked:
            return
        if answer is not None:
            self.leases = tuple(answer if lease is asked else lease for lease in self.leases)
        elif self.state is not SETTLING or asked not in self.leases[:1]:
            # Not while it is being settled: the answer of the settlement says whether it was held.
            self.leases = tuple(lease for lease in self.leases if lease is not asked)

    # -- the result ------------------------------------------------------------------------

    def set_result(
        self, status: Literal["success", "error", "cancel"], **fields: str | bytes | None
    ) -> None:
        """Set the final record of this run."""
        self.record = self.as_record(status, finished_at=time.time(), **fields)

    def set_retry(self, delay: float, error: str, traceback: str | None) -> None:
        """Have another attempt follow after `delay` seconds."""
        delay = min(delay, LONGEST)
        self.next_message = replace(self.message, attempt=self.message.attempt + 1, delay=delay)
        due = time.time() + delay
        self.record = self.as_record("retry", error=error, traceback=traceback, due_at=due)

    def as_record(self, status: Status, **fields: str | bytes | float | None) -> Task:
        """Return the record of this run with the given status and fields."""
        return replace(
            record_of(self.message),
            status=status,
            execution=self.execution,
            worker=self.execution.partition("/")[0],
            started_at=self.started,
            **fields,  # only those that are needed: each costs time
        )

    def _not_counted(self) -> Task | None:
        """Return the record of a poison candidate that is released: its run does not count."""
        if not self.isolated_runs:
            return None
        record = counted(self.as_record("process"), self.isolated_runs - 1)
        # With the same execution, the storage would take this for a retry of the same save.
        return replace(record, execution=f"{self.execution}/back")


def counted(record: Task, runs: int) -> Task:
    """Return the record with this number of isolated runs."""
    return replace(record, headers={**record.headers, ISOLATED_RUNS: str(runs)})


def is_candidate(delivery: Delivery, record: Task | None) -> bool:
    """Return whether a delivery has to run in isolation, if it runs at all."""
    return (delivery.count or 1) >= _CANDIDATE_FROM or isolated_runs(record) > 0


def isolated_runs(record: Task | None) -> int:
    """Return how many isolated runs of a message have started, by its record."""
    if record is None or not record.headers:
        return 0
    return count_in(record.headers, ISOLATED_RUNS)


def count_in(headers: Mapping[str, str], name: str) -> int:
    """Return the count in a header, or 0: other programs may write any text into headers."""
    text = headers.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else 0


class Jobs:
    """All jobs from their delivery to their settlement. Each of them has its lease extended."""

    def __init__(self, queues: Iterable[str], runner: EntryQueue[Job]) -> None:
        self._runner = runner
        self._held: set[Job] = set()
        self._by_uuid: dict[str, Job] = {}
        """The newest job of each task. A worker may hold two attempts of one task: it receives the
        second while it settles the first."""
        self.running = dict.fromkeys(queues, 0)
        """How many functions run, by queue."""
        self._changed = asyncio.Event()
        self._present = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Job]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, job: Job) -> bool:
        return job in self._held

    @property
    def idle(self) -> bool:
        """Whether no function runs."""
        return not any(self.running.values())

    def with_the_runner(self) -> list[Job]:
        """Return the jobs that the runner has."""
        return [job for job in self._held if job.state in _WITH_THE_RUNNER]

    def hold(self, jobs: list[Job]) -> list[Job]:
        """Hold jobs and extend their leases from now on; return those that are new.

        If the worker holds a job for the same message already, that job gets the delivery.
        """
        new: list[Job] = []
        for job in jobs:
            held = self._by_uuid.setdefault(job.message.uuid, job)
            if held is job:
                new.append(job)
            elif _message_of(held) == _message_of(job):
                held.adopt(job.leases[0])
            else:
                self._by_uuid[job.message.uuid] = job
                new.append(job)
        if new:
            self._held.update(new)
            self._present.set()
        return new

    def start(self, jobs: list[Job]) -> None:
        """Hand jobs to the runner."""
        for job in jobs:
            job.start()
            self.running[job.queue] += 1
        self._runner.post_all(jobs)

    def take_back(self, jobs: list[Job]) -> list[Job]:
        """Take jobs back from the runner. Return those that the worker still waits for."""
        returned: list[Job] = []
        for job in jobs:
            self.running[job.queue] -= 1
            if job.state is RUNNING:
                job.finish()
                returned.append(job)
            elif job.state is CANCELLING:
                job.discard()
                returned.append(job)
        self._changed.set()
        return returned

    def close(self, jobs: list[Job]) -> None:
        """Drop jobs whose settlement has an answer, and call `notice`."""
        self._held.difference_update(jobs)
        for job in jobs:
            job.close()
            uuid = job.message.uuid
            if self._by_uuid.get(uuid) is job:
                del self._by_uuid[uuid]

    def listen(self, call: Callable[[], None]) -> None:
        """Have `call` called at each `notice`."""
        self._listeners.append(call)

    def notice(self) -> None:
        """Have all calls of `until` check their conditions again."""
        self._changed.set()
        for call in self._listeners:
            call()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition over jobs, which is checked whenever something changes."""
        while not condition():
            await self.change()

    async def change(self) -> None:
        """Wait for the next change."""
        self._changed.clear()
        await self._changed.wait()

    async def present(self) -> None:
        """Wait until there is a job, so that background work costs nothing without jobs."""
        while not self._held:
            self._present.clear()
            await self._present.wait()


def _message_of(job: Job) -> tuple[str, str, int, str]:
    message = job.message
    return job.queue, message.uuid, message.attempt, message.submission
