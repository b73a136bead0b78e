"""The workers and clients of an app whose workers are killed, and what they wrote down."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import message_of
from qtasks_core.schemas import Task
from tests.e2e.crash_app import router
from tests.pairs import Pair
from tests.processes import Process

CONCURRENCY = 20
BACKENDS = ("sqlite", "redis", "postgres", "rabbitmq", "kafka")


class Log:
    """What the workers wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, kind: str, pid: int | None = None) -> list[tuple[int, int, str]]:
        """Return `(number, pid, rest)` of all lines of one kind, of one worker or of all."""
        found = []
        text = self.path.read_text() if self.path.exists() else ""
        # A reader may see a half of the line that is being written.
        for line in text.rpartition("\n")[0].splitlines():
            word, number, by, *rest = line.split()
            if word == kind and pid in (None, int(by)):
                found.append((int(number), int(by), " ".join(rest)))
        return found

    def numbers(self, kind: str, pid: int | None = None) -> list[int]:
        return [number for number, _, _ in self.lines(kind, pid)]

    def accepted(self) -> dict[int, set[str]]:
        """Return the runs whose final record the storage took, by task. One run may save again."""
        runs: dict[int, set[str]] = {}
        for number, _, answer in self.lines("saved"):
            status, run = answer.split()
            if status == "done":
                runs.setdefault(number, set()).add(run)
        return runs

    def running(self, pid: int) -> set[int]:
        """Return what a worker has begun and not ended."""
        return set(self.numbers("begin", pid)) - set(self.numbers("end", pid))


class Setting:
    """One namespace on one pair, a log, and the workers and client of it."""

    def __init__(self, pair: Pair, directory: Path) -> None:
        self.pair = pair
        self.name = f"crash-{uuid4().hex[:8]}"
        self.log = Log(directory / "events")
        self.environment = {
            **pair.environment,
            "QTASKS_NAME": self.name,
            "CRASH_LOG": str(self.log.path),
            "CRASH_CONCURRENCY": str(CONCURRENCY),
        }

    def worker(self) -> Process:
        return Process("-m", "tests.e2e.crash_app", environment=self.environment)

    def app(self) -> QueueTasks:
        app = QueueTasks(self.name, self.pair.broker, self.pair.storage)
        app.include_router(router)
        return app

    async def enqueue(self, app: QueueTasks, task: str, count: int, seconds: float) -> list[str]:
        definition = app.definition(task)
        messages = [message_of(app, definition, (n, seconds), {}) for n in range(count)]
        await app.submit_all(messages)
        return [message.uuid for message in messages]


async def finals(app: QueueTasks, uuids: list[str], timeout: float) -> list[Task]:
    """Wait for the final records of all."""
    async with asyncio.timeout(timeout):
        return list(await asyncio.gather(*(app.wait(uuid, None) for uuid in uuids)))
