"""The jobs that a worker holds, and waiting for changes among them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from qtasks.bridge.entry_queue import EntryQueue
from qtasks.worker.job import Job
from qtasks.worker.states import CANCELLING, RUNNING

_WITH_THE_RUNNER = (RUNNING, CANCELLING)


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
        """Return the jobs whose functions run."""
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
        """Take jobs that the runner has posted back; return those that are still waited for."""
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
        """Drop jobs whose settlement was answered; `notice` tells those who wait."""
        self._held.difference_update(jobs)
        for job in jobs:
            job.close()
            uuid = job.message.uuid
            if self._by_uuid.get(uuid) is job:
                del self._by_uuid[uuid]

    def listen(self, call: Callable[[], None]) -> None:
        """Call something at each `notice` from now on."""
        self._listeners.append(call)

    def notice(self) -> None:
        """Have everyone who waits in `until` look again."""
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
        """Wait until there is a job, so that watching over jobs costs nothing without any."""
        while not self._held:
            self._present.clear()
            await self._present.wait()


def _message_of(job: Job) -> tuple[str, str, int, str]:
    message = job.message
    return job.queue, message.uuid, message.attempt, message.submission
