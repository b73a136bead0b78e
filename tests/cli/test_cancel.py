"""How fast a cancel reaches a function that runs in a worker."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from qtasks import control
from qtasks.asyncio import QueueTasks
from tests.cli.command import Command
from tests.processes import until

SOON = 0.5
"""Seconds. A worker without commands finds out when it extends its leases, after some 10 s."""


@pytest.mark.usefixtures("worker")
async def test_a_cancel_reaches_a_running_function_at_once(qtasks: Command, tmp_path: Path) -> None:
    took: list[float] = []
    async with QueueTasks(qtasks.name, qtasks.url) as app:
        for number in range(3):
            stopped = tmp_path / f"stopped-{number}"
            uuid = (await asyncio.to_thread(qtasks.ok, "call", "hold", f'"{stopped}"')).line
            await running(app, uuid)
            began = time.time()
            assert await app.control(control.cancel, uuid)
            await asyncio.to_thread(until, stopped.exists, "the function to stop")
            await asyncio.sleep(0.1)  # until the time is written
            took.append(float(stopped.read_text()) - began)
    # The best of three: the machine may be busy.
    assert min(took) < SOON, took


async def running(app: QueueTasks, uuid: str) -> None:
    """Wait until a worker runs a task, as it says itself."""
    async with asyncio.timeout(120):
        while True:
            task = await app.get_task(uuid)
            if task is not None and task.status == "process":
                return
            await asyncio.sleep(0.05)
