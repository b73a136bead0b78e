"""Workers killed exactly between a result and its acknowledgement: no function runs again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qtasks import control
from qtasks.asyncio import QueueTasks
from tests.e2e.crash import Setting, finals
from tests.faults.dying import LAST
from tests.pairs import pair_of
from tests.processes import Process, until

LEASE = 3.0
"""Seconds: each life of a worker has to wait for the lease of the one before."""
LONGER = "postgres+redis", "rabbitmq", "kafka", "kafka+postgres"
"""Pairs whose turn is in the long form; with Kafka, four lives take a minute."""


@pytest.mark.parametrize(
    # On one server, Redis and Postgres record and acknowledge in one step.
    "pair",
    [
        "redis+postgres",
        "rabbitmq+redis",
        *(pytest.param(pair, marks=pytest.mark.full) for pair in LONGER),
    ],
)
@pytest.mark.parametrize("lives", [4, pytest.param(200, marks=pytest.mark.full)])
async def test_a_worker_killed_between_result_and_acknowledgement(
    request: pytest.FixtureRequest, tmp_path: Path, pair: str, lives: int
) -> None:
    setting = Setting(pair_of(request, pair, tmp_path, LEASE), tmp_path)
    async with setting.app() as app:
        # A life may record several tasks at once, on a slow machine more than two.
        uuids = await setting.enqueue(app, "work", 8 * lives + 1, 0.0)
        with Process(
            "-m", "tests.faults.dying", str(lives), environment=setting.environment
        ) as worker:
            records = await finals(app, uuids, 240 + 10 * lives)
            await asyncio.to_thread(
                until, lambda: "worker " in worker.output().partition(LAST)[2], "the last worker"
            )
            await drained(app)
            assert await asyncio.to_thread(worker.terminate) == 0
        await drained(app)
    assert {record.status for record in records} == {"success"}
    recorded: set[int] = set()
    for line in setting.log.path.read_text().splitlines():
        event, number, *_ = line.split()
        assert event != "begin" or int(number) not in recorded, "it runs, though it is recorded"
        if event == "killed":
            recorded.add(int(number))
    assert len({pid for _, pid, _ in setting.log.lines("killed")}) == lives


async def drained(app: QueueTasks) -> None:
    """Wait until the queue has no message."""
    async with asyncio.timeout(120):
        while True:
            (depth,) = (await app.control(control.depths, ["default"])).values()
            if not depth.ready and not depth.in_flight:
                return
            await asyncio.sleep(0.1)
