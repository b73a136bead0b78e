"""Workers that come and go all the time, with long and short tasks: each task runs once."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import message_of
from qtasks_core import Task
from tests.e2e.crash_app import router
from tests.processes import PATIENCE, Process, until
from tests.services import Service

SECONDS = (0.01, 0.1, 1.0, 8.0)


class Log:
    """What the workers wrote down: see `tests.e2e.crash_app`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def numbers(self, kind: str, pid: int | None = None) -> list[int]:
        """Return the numbers of the tasks with such a line, of one worker or of all."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = [line.split() for line in text.rpartition("\n")[0].splitlines()]
        return [int(n) for word, n, by, *_ in lines if word == kind and pid in (None, int(by))]


@pytest.mark.full
@pytest.mark.parametrize("transactional", [False, True])
@pytest.mark.parametrize("kills", [False, True])
async def test_each_task_runs_once_unless_its_worker_is_killed(
    kafka_server: Service, namespace: str, tmp_path: Path, kills: bool, transactional: bool
) -> None:
    pick = random.Random(kills)
    log = Log(tmp_path / "log")
    broker, storage = f"{kafka_server.url}?lease=15", f"sqlite:///{tmp_path}/tasks.db"
    if transactional:
        broker = storage = broker.replace("kafka://", "kafka+transactional://")
    environment = {
        "QTASKS_NAME": namespace,
        "QTASKS_BROKER_URL": broker,
        "QTASKS_STORAGE_URL": storage,
        "CRASH_LOG": str(log.path),
        "CRASH_CONCURRENCY": "20",
    }
    tasks, may_run_again = 600, set[int]()
    app = QueueTasks(namespace, broker, storage)
    app.include_router(router)

    with ExitStack() as processes:

        def worker() -> Process:
            return processes.enter_context(
                Process("-m", "tests.e2e.crash_app", environment=environment)
            )

        async def change(workers: list[Process]) -> None:
            if len(workers) < 2 or (len(workers) < 4 and pick.random() < 0.5):
                workers.append(worker())
                return
            leaving = workers.pop(pick.randrange(len(workers)))
            if kills and pick.random() < 0.5:
                leaving.signal(signal.SIGSTOP)
                unsaved = set(log.numbers("begin", leaving.pid))
                unsaved -= set(log.numbers("saved", leaving.pid))
                may_run_again.update(unsaved)
                leaving.kill()
            else:
                leaving.signal(signal.SIGTERM)

        async with app:
            work = app.definition("work")
            messages = [message_of(app, work, (n, pick.choice(SECONDS)), {}) for n in range(tasks)]
            await app.submit_all(messages)
            workers = [worker(), worker()]
            for share in range(20, tasks, 40):
                await asyncio.to_thread(until, _reached(log, share), f"{share} finished tasks")
                await change(workers)
            async with asyncio.timeout(10 * PATIENCE):
                waits = [app.wait(message.uuid, None) for message in messages]
                records: list[Task] = list(await asyncio.gather(*waits))
    assert Counter(record.status for record in records) == {"success": tasks}
    begun = Counter(log.numbers("begin"))
    assert set(begun) == set(range(tasks))
    assert {number for number, times in begun.items() if times > 1} <= may_run_again


def _reached(log: Log, number: int) -> Callable[[], bool]:
    return lambda: len(set(log.numbers("end"))) >= number
