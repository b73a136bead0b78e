"""What expires does so by one clock: those of the machines may differ by hours."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks import AsyncResult
from qtasks.asyncio import QueueTasks
from tests.e2e.sender import router
from tests.pairs import pair_of
from tests.processes import ROOT

HOUR = 3600.0


async def sent(environment: dict[str, str], ahead: float, expires: float) -> str:
    """Enqueue from a process whose clock is ahead by so many seconds; return the task's uuid."""
    command = (sys.executable, "-m", "tests.e2e.sender", str(ahead), str(expires))
    sender = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **environment}, cwd=ROOT, stdout=PIPE
    )
    output, _ = await sender.communicate()
    assert sender.returncode == 0
    return output.decode().strip()


@pytest.mark.parametrize("names", ["redis", "postgres", "rabbitmq+redis", "kafka+postgres"])
async def test_a_limit_holds_whatever_the_senders_clock_shows(
    request: pytest.FixtureRequest, tmp_path: Path, names: str
) -> None:
    pair, name = pair_of(request, names, tmp_path), f"clocks-{uuid4().hex[:8]}"
    environment = {**pair.environment, "QTASKS_NAME": name}
    behind = await sent(environment, -HOUR, HOUR / 2)
    ahead = await sent(environment, HOUR, 0.001)
    app = QueueTasks(name, broker=pair.broker, storage=pair.storage)
    app.include_router(router)
    async with app, app.worker():
        ran, late = [await AsyncResult(u, app=app).wait_result(timeout=60) for u in (behind, ahead)]
    assert (ran.status, ran.dead) == ("success", None)
    assert (late.status, late.dead) == ("error", "expired")
