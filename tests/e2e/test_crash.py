"""A worker killed with SIGKILL in the middle of 2,000 tasks: nothing lost, little run twice."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from qtasks_core.schemas import Task
from tests.e2e.crash import BACKENDS, CONCURRENCY, Setting, finals
from tests.pairs import pair_of
from tests.processes import Process, until

TASKS = 2000
SECONDS = 0.02


@pytest.fixture(params=BACKENDS)
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(pair_of(request, request.param, tmp_path), tmp_path)


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
