"""Delays and tasks that last for several leases: each runs once."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from qtasks.declare.tasks import message_of
from tests.e2e.crash import BACKENDS, Setting, finals
from tests.pairs import pair_of

SLOTS = 2
OCCUPIED = 560.0
"""Seconds: longer than any lease, timeout and interval here, and than the 9 minutes after which
Kafka's driver closes an idle connection."""


@pytest.mark.parametrize("backend", BACKENDS)
async def test_delays_and_tasks_beyond_the_lease_run_once(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    """One of the tasks blocks its loop all the time.

    Two workers have no free slot then. So what loses its lease is taken by the third, and runs.
    """
    setting = Setting(pair_of(request, backend, tmp_path), tmp_path)
    setting.environment["CRASH_CONCURRENCY"] = "1"
    lease = setting.pair.lease
    async with setting.app() as app:
        with setting.worker() as one, setting.worker() as other, setting.worker() as third:
            workers = (one, other, third)
            for worker in workers:
                await asyncio.to_thread(worker.wait_for, "worker ")
            work, block = app.definition("work"), app.definition("block")
            messages = [
                message_of(app, work, (0, 4 * lease), {}),
                message_of(app, work, (1, 0.0), {}, delay=3 * lease),
                message_of(app, block, (2, 4 * lease), {}),
            ]
            await app.submit_all(messages)
            records = await finals(app, [message.uuid for message in messages], 9 * lease + 120)
            assert [await asyncio.to_thread(worker.terminate) for worker in workers] == [0] * 3
    assert [record.status for record in records] == ["success"] * 3
    assert Counter(setting.log.numbers("begin")) == {0: 1, 1: 1, 2: 1}
    assert {number: len(runs) for number, runs in setting.log.accepted().items()} == {
        0: 1, 1: 1, 2: 1,
    }  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
async def test_slots_that_are_full_for_longer_than_any_timeout(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    """A worker that asks for nothing for so long goes on by itself, and has lost nothing."""
    setting = Setting(pair_of(request, backend, tmp_path), tmp_path)
    setting.environment["CRASH_CONCURRENCY"] = str(SLOTS)
    async with setting.app() as app:
        with setting.worker() as worker:
            await asyncio.to_thread(worker.wait_for, "worker ")
            work = app.definition("work")
            seconds = [OCCUPIED] * SLOTS + [0.01] * 200
            messages = [message_of(app, work, (n, each), {}) for n, each in enumerate(seconds)]
            await app.submit_all(messages)
            records = await finals(app, [message.uuid for message in messages], OCCUPIED + 120)
            assert worker.terminate() == 0
    assert {record.status for record in records} == {"success"}
    assert Counter(setting.log.numbers("begin")) == dict.fromkeys(range(len(messages)), 1)
