"""A worker killed with SIGKILL in the middle of 2,000 tasks: nothing lost, little run twice."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import message_of
from qtasks_core.schemas import Task
from tests.e2e.crash_app import router
from tests.pairs import Pair, pair_of
from tests.processes import Process, until

TASKS = 2000
SECONDS = 0.02
CONCURRENCY = 20
BACKENDS = ("sqlite", "redis", "postgres", "rabbitmq", "kafka")


class Log:
    """What the workers wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, kind: str, pid: int | None = None) -> list[tuple[int, int, str]]:
        """Return `(number, pid, rest)` of all lines of one kind, of one worker or of all."""
        found = []
        text = self.path.read_text() if self.path.exists() else ""
        # A reader may see a half of the line that is being written.
        for line in text.rpartition("\n")[0].splitlines():
            word, number, by, *rest = line.split()
            if word == kind and pid in (None, int(by)):
                found.append((int(number), int(by), " ".join(rest)))
        return found

    def numbers(self, kind: str, pid: int | None = None) -> list[int]:
        return [number for number, _, _ in self.lines(kind, pid)]

    def accepted(self) -> dict[int, set[str]]:
        """Return the runs whose final record the storage took, by task. One run may save again."""
        runs: dict[int, set[str]] = {}
        for number, _, answer in self.lines("saved"):
            status, run = answer.split()
            if status == "done":
                runs.setdefault(number, set()).add(run)
        return runs

    def running(self, pid: int) -> set[int]:
        """Return what a worker has begun and not ended."""
        return set(self.numbers("begin", pid)) - set(self.numbers("end", pid))


class Setting:
    """One namespace on one pair, a log, and the workers and client of it."""

    def __init__(self, pair: Pair, directory: Path) -> None:
        self.pair = pair
        self.name = f"crash-{uuid4().hex[:8]}"
        self.log = Log(directory / "events")
        self.environment = {
            **pair.environment,
            "QTASKS_NAME": self.name,
            "CRASH_LOG": str(self.log.path),
            "CRASH_CONCURRENCY": str(CONCURRENCY),
        }

    def worker(self) -> Process:
        return Process("-m", "tests.e2e.crash_app", environment=self.environment)

    def app(self) -> QueueTasks:
        app = QueueTasks(self.name, self.pair.broker, self.pair.storage)
        app.include_router(router)
        return app

    async def enqueue(self, app: QueueTasks, task: str, count: int, seconds: float) -> list[str]:
        definition = app.definition(task)
        messages = [message_of(app, definition, (n, seconds), {}) for n in range(count)]
        await app.submit_all(messages)
        return [message.uuid for message in messages]


@pytest.fixture(params=BACKENDS)
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(pair_of(request, request.param, tmp_path), tmp_path)


async def finals(app: QueueTasks, uuids: list[str], timeout: float) -> list[Task]:
    """Wait for the final records of all."""
    async with asyncio.timeout(timeout):
        return list(await asyncio.gather(*(app.wait(uuid, None) for uuid in uuids)))


async def kill_in_flight(setting: Setting, worker: Process, done: int) -> set[int]:
    """Kill a worker that has ended `done` tasks while at least 10 are in flight.

    Returns what may run again: begun, and its end not yet acknowledged.
    """
    while True:
        await asyncio.to_thread(
            until, lambda: len(setting.log.numbers("end", worker.pid)) >= done, "progress"
        )
        worker.signal(signal.SIGSTOP)
        if len(setting.log.running(worker.pid)) >= 10:
            break
        worker.signal(signal.SIGCONT)
    in_flight = len(setting.log.running(worker.pid))
    worker.kill()
    assert in_flight >= 10
    acknowledged = setting.log.numbers("saved", worker.pid)
    return set(setting.log.numbers("begin", worker.pid)) - set(acknowledged)


def check(setting: Setting, records: list[Task], may_run_again: set[int]) -> None:
    """Hold the log against what the invariants allow."""
    assert Counter(record.status for record in records) == {"success": TASKS}
    begun = Counter(setting.log.numbers("begin"))
    assert set(begun) == set(range(TASKS)), "a function was never entered"
    twice = {number for number, times in begun.items() if times > 1}
    assert twice <= may_run_again, f"ran twice without need: {sorted(twice - may_run_again)}"
    assert max(begun.values()) <= 2
    accepted = setting.log.accepted()
    assert max(map(len, accepted.values())) == 1, "two final records were accepted for one task"
    # The killed worker may have been told of its last accepted saves no more.
    assert set(range(TASKS)) - set(accepted) <= may_run_again


async def test_killed_worker(setting: Setting) -> None:
    work = TASKS * SECONDS / CONCURRENCY
    async with setting.app() as app:
        with setting.worker() as victim:
            await asyncio.to_thread(victim.wait_for, "worker ")
            uuids = await setting.enqueue(app, "work", TASKS, SECONDS)
            may_run_again = await kill_in_flight(setting, victim, TASKS // 4)
        killed = time.time()
        with setting.worker() as heir:
            records = await finals(app, uuids, 240)
            assert heir.terminate() == 0
    check(setting, records, may_run_again)
    ends = [record.finished_at - killed for record in records if record.finished_at]
    others = max(end for n, end in enumerate(ends) if n not in may_run_again)
    print(f"{max(ends):.1f} s from the kill to the last end, {others:.1f} s to that of the others")
    # However busy the machine is, the heir's other tasks have taken as much longer.
    assert max(ends) <= setting.pair.lease + 10 + 2 * max(work, others)


async def test_killed_beside_another(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker() as survivor:
            await asyncio.to_thread(survivor.wait_for, "worker ")
            with setting.worker() as victim:
                await asyncio.to_thread(victim.wait_for, "worker ")
                uuids = await setting.enqueue(app, "work", TASKS, SECONDS)
                may_run_again = await kill_in_flight(setting, victim, TASKS // 8)
            records = await finals(app, uuids, 120)
            assert survivor.terminate() == 0
    check(setting, records, may_run_again)
    own = Counter(setting.log.numbers("begin", survivor.pid))
    assert max(own.values()) == 1, "the survivor ran one of its tasks twice"
