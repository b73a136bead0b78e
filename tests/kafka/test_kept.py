"""What a log storage kept in its directory is of use at its next start."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from qtasks_core import DONE, Task
from qtasks_core.lookup import resolve_storage
from tests.services import Service


async def test_a_start_goes_on_where_the_last_one_ended(
    kafka_server: Service, namespace: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after a start that has only read what others wrote."""
    caplog.set_level(logging.INFO, "qtasks.log")
    tasks = [Task(uuid=f"u{n}", task_name="a", status="success") for n in range(50)]
    other = resolve_storage(kafka_server.url)
    await other.start(namespace)
    assert await other.save(tasks) == [DONE] * 50
    for _ in range(3):
        storage = resolve_storage(f"{kafka_server.url}?directory={tmp_path}")
        await storage.start(namespace)
        assert [task and task.uuid for task in await storage.get(["u7", "u8"])] == ["u7", "u8"]
        await storage.stop()
    await other.stop()
    assert "is read anew" not in caplog.text
