"""A namespace on a pair of parts, its worker processes and a client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from qtasks.asyncio import QueueTasks
from qtasks.declare.handle import Task
from tests.life.app import router
from tests.pairs import Pair
from tests.processes import ROOT, Process


class Setting:
    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.name = f"life-{uuid4().hex[:8]}"

    def worker(
        self, *, python: str = sys.executable, path: str = str(ROOT), **options: object
    ) -> Process:
        """Start a worker with these options of `run_forever`."""
        environment = {
            **self.pair.environment,
            "QTASKS_NAME": self.name,
            "LIFE": json.dumps(options),
            "PYTHONPATH": path,
        }
        return Process("-m", "tests.life.app", environment=environment, python=python)

    def app(self) -> QueueTasks:
        app = QueueTasks(self.name, self.pair.broker, self.pair.storage)
        app.include_router(router)
        return app

    async def begun(self, app: QueueTasks, task: Task[Any]) -> None:
        """Wait until a task's record says that it runs."""
        status = ""
        async with asyncio.timeout(120):
            while status != "process":
                await asyncio.sleep(0.02)
                status = getattr(await app.get(task.uuid), "status", "")


def children(pid: int) -> set[int]:
    """Return the processes that a process has started and that still run."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(status.parent.name))
    return found


def alive(pid: int) -> bool:
    """Say whether a process runs."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    """Kill one process."""
    os.kill(pid, signal.SIGKILL)
