"""The watch over the loop of the tasks names the one that blocks it, once a blockage."""

from __future__ import annotations

import time

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.worker import watchdog


async def test_a_task_that_blocks_its_loop_is_named_once(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 0.1)

    @app.task()
    async def blocks() -> None:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            pass

    async with app.worker():
        task = await blocks.add_task(timeout=120)
    said = [r.getMessage() for r in caplog.records if "blocked its event loop" in r.getMessage()]
    # On a busy machine the loop may be late at other times too.
    said = [line for line in said if f"task {task.task_name} {task.uuid}" in line]
    assert len(said) == 1
    assert "while time.monotonic() < deadline" in said[0], "the stack says where"


async def test_a_loop_that_answers_is_not_reported(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 0.5)

    @app.task()
    def in_a_thread() -> None:
        time.sleep(1.5)

    async with app.worker():
        await in_a_thread.add_task(timeout=120)
    assert "blocked its event loop" not in caplog.text
