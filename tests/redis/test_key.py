"""A key on a server whose answers are lost after it has done what it was asked."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from qtasks_core.errors import Unavailable
from qtasks_redis import RedisBroker, connection, joint_scripts, record_scripts, scripts
from tests.services import Service


@pytest.mark.parametrize(
    "lost",
    [joint_scripts.SUBMIT, scripts.PUBLISH, record_scripts.SAVE],
    ids=["submit", "publish", "save"],
)
async def test_a_key_holds_across_lost_answers(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch, lost: scripts.Script
) -> None:
    """Three times it is written and said not to be; what there is of it is run once."""
    app = QueueTasks(f"key-{uuid4().hex[:8]}", redis_server.url)
    if lost is not joint_scripts.SUBMIT:
        monkeypatch.setattr(RedisBroker, "join", lambda *_: None)
    run = connection.Connection.run
    left, ran = 3, 0

    async def deaf(self: connection.Connection, script: scripts.Script, *rest: Any) -> Any:
        nonlocal left
        answer = await run(self, script, *rest)
        if script is lost and left > 0:
            left -= 1
            raise Unavailable("the answer was lost")
        return answer

    @app.task()
    async def charge(amount: int) -> int:
        nonlocal ran
        ran += 1
        await asyncio.sleep(0.5)  # time for every copy to come while it runs
        return amount

    async with app:
        monkeypatch.setattr(connection.Connection, "run", deaf)
        task = await charge.add_task(5, key="order 7")
        assert left == (2 if lost is record_scripts.SAVE else 0), "what was saved is found"
        async with app.worker():
            assert (await task.wait_result(120)).returning == 5
            assert (await charge.add_task(6, key="order 7", timeout=120)).returning == 5
            await charge.add_task(7, timeout=120)  # what was in the queue before has been received
    assert ran == 2
