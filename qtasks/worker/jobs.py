"""The jobs a worker holds, and the waiting for changes among them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

from qtasks.worker.job import Job


class Jobs:
    """Jobs that are looked up, run, wait to run alone or to be completed: all leased."""

    def __init__(self, queues: Iterable[str]) -> None:
        self._held: set[Job] = set()
        self._by_uuid: dict[str, Job] = {}
        """The newest of each task: it may be held for two attempts, one of them at its end."""
        self.running = dict.fromkeys(queues, 0)
        """How many functions run, by queue."""
        self._changed = asyncio.Event()
        self._present = asyncio.Event()

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

    def hold(self, jobs: list[Job]) -> list[Job]:
        """Hold jobs: their leases are kept from now on; return those that are new.

        The delivery of another, whose message was delivered again, goes to the job that is held
        for it.
        """
        new: list[Job] = []
        for job in jobs:
            held = self._by_uuid.setdefault(job.message.uuid, job)
            if held is job:
                new.append(job)
            elif _message_of(held) == _message_of(job):
                held.adopt(job.delivery)
            else:
                self._by_uuid[job.message.uuid] = job
                new.append(job)
        self._held.update(new)
        self._present.set()
        return new

    def begun(self, job: Job) -> None:
        """Count a job that is handed to the runner."""
        job.begun = True
        job.started = time.time()
        self.running[job.delivery.queue] += 1

    def ended(self, jobs: Iterable[Job]) -> None:
        """Count jobs whose functions ended."""
        for job in jobs:
            job.returned = True
            self.running[job.delivery.queue] -= 1
        self._changed.set()

    def drop(self, jobs: list[Job]) -> None:
        """Let go of jobs that are completed; `notice` tells who waits."""
        self._held.difference_update(jobs)
        for job in jobs:
            uuid = job.message.uuid
            if self._by_uuid.get(uuid) is job:
                del self._by_uuid[uuid]

    def notice(self) -> None:
        """Have everybody look again who waits in `until`."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition over jobs, looked at whenever something changes."""
        while not condition():
            await self.change()

    async def change(self) -> None:
        """Wait for the next change."""
        self._changed.clear()
        await self._changed.wait()

    async def present(self) -> None:
        """Wait until there is a job: what watches over jobs costs nothing without any."""
        while not self._held:
            self._present.clear()
            await self._present.wait()


def _message_of(job: Job) -> tuple[str, str, int, str]:
    message = job.message
    return job.delivery.queue, message.uuid, message.attempt, message.submission
