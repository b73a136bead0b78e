"""Passwords are in no error, no traceback and no line of any log, not even for debugging."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qtasks.asyncio import QueueTasks
from qtasks_core.errors import ConfigurationError, Unavailable
from tests.pairs import url_of
from tests.processes import Process, until

UNREACHABLE = [
    "redis://me:hunter2@127.0.0.1:1/0",
    "redis://127.0.0.1:1/0?username=me&password=hunter2",
    "rediss://:hunter2@127.0.0.1:1/0",
    "postgresql://me:hunter2@127.0.0.1:1/db",
    "postgresql://127.0.0.1:1/db?user=me&password=hunter2",
    "amqp://me:hunter2@127.0.0.1:1/",
    "amqps://me:hunter2@127.0.0.1:1/",
    "kafka://me:hunter2@127.0.0.1:1",
]

APP = """
import logging
from qtasks.asyncio import QueueTasks

logging.basicConfig(level=logging.DEBUG)
app = QueueTasks()


@app.task()
async def work() -> None: ...
"""


@pytest.mark.parametrize("url", UNREACHABLE)
async def test_of_a_server_that_is_not_there(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(Unavailable) as caught:
        await QueueTasks("secrets", url).start(0.3)
    told = "".join(traceback.format_exception(caught.value))
    assert "***" in told
    assert "hunter2" not in told + caplog.text


@pytest.mark.parametrize("backend", ["redis", "postgres", "rabbitmq"])
async def test_of_a_server_that_refuses_it(
    backend: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    parts = urlsplit(url_of(request, backend, tmp_path))
    host = parts.netloc.rpartition("@")[2]
    url = parts._replace(netloc=f"{parts.username or ''}:hunter2@{host}").geturl()
    with pytest.raises(ConfigurationError) as caught:
        await QueueTasks("secrets", url).start(5)
    told = "".join(traceback.format_exception(caught.value))
    assert "***" in told
    assert "hunter2" not in told + caplog.text


@pytest.mark.parametrize("url", UNREACHABLE)
def test_of_a_worker_that_waits_for_its_server(url: str, tmp_path: Path) -> None:
    (tmp_path / "debugged.py").write_text(APP)
    command = ("-m", "qtasks", "-A", "debugged:app", "run")
    environment = {"QTASKS_BROKER_URL": url, "PYTHONASYNCIODEBUG": "1"}
    with Process(*command, environment=environment, cwd=tmp_path) as worker:
        until(lambda: "trying again" in worker.output(), "an attempt")
        assert worker.terminate() == 0
        assert "***" in worker.output()
        assert "hunter2" not in worker.output()
