"""Workers that come, go and are killed while thousands of tasks are in flight."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.e2e.crash import Setting
from tests.faults.load import loaded
from tests.pairs import pair_of

EVERY = 3.0
"""Seconds between two changes."""


@pytest.mark.parametrize(
    ("pair", "tasks", "changes"),
    [
        pytest.param("kafka", 2_000, 3, marks=pytest.mark.full),
        pytest.param("kafka", 10_000, 20, marks=pytest.mark.full),
        pytest.param("kafka+postgres", 10_000, 20, marks=pytest.mark.full),
        pytest.param("rabbitmq", 10_000, 20, marks=pytest.mark.full),
        pytest.param("rabbitmq+redis", 10_000, 20, marks=pytest.mark.full),
        pytest.param("redis", 10_000, 20, marks=pytest.mark.full),
        pytest.param("postgres", 10_000, 20, marks=pytest.mark.full),
    ],
)
async def test_workers_come_and_go(
    request: pytest.FixtureRequest, tmp_path: Path, pair: str, tasks: int, changes: int
) -> None:
    """Every change begins one more worker; the one before leaves, or is killed, by turns."""
    setting = Setting(pair_of(request, pair, tmp_path), tmp_path)
    async with loaded(setting) as load:
        await load.backlog(tasks)
        for change in range(changes):
            began = time.monotonic()
            with setting.worker() as guest:
                await asyncio.to_thread(guest.wait_for, "worker ")
                await asyncio.sleep(max(0.0, EVERY - (time.monotonic() - began)))
                if change % 2 == 0:
                    guest.kill()
                else:
                    assert await asyncio.to_thread(guest.terminate) == 0
