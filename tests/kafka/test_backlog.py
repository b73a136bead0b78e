"""A backlog larger than the driver's buffer, drained slowly: every task runs, and runs once."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import pytest

from qtasks.asyncio import QueueTasks
from qtasks_kafka import KafkaBroker
from qtasks_memory import MemoryStorage
from tests.services import Service


@pytest.mark.parametrize(
    ("partitions", "concurrency", "tasks", "seconds"),
    [
        # One partition's buffer lasts for longer than a fetch may go unanswered.
        (1, 4, 100, (0.25,)),
        pytest.param(8, 8, 72, (1.1, 0.05), marks=pytest.mark.full),
        pytest.param(2, 16, 120, (0.7, 5.5), marks=pytest.mark.full),
        pytest.param(8, 8, 640, (0.5,), marks=pytest.mark.full),
        pytest.param(2, 16, 1600, (0.2,), marks=pytest.mark.full),
        pytest.param(4, 4, 300, (0.05, 0.05, 7.0, 0.05, 0.5), marks=pytest.mark.full),
    ],
)
async def test_each_task_of_a_backlog_runs_once(
    kafka_server: Service,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
    partitions: int,
    concurrency: int,
    tasks: int,
    seconds: tuple[float, ...],
) -> None:
    caplog.set_level(logging.WARNING)
    runs: Counter[int] = Counter()
    app = QueueTasks(
        namespace,
        broker=KafkaBroker(kafka_server.url, partitions=partitions),
        storage=MemoryStorage(),
    )

    @app.task()
    async def work(number: int) -> None:
        runs[number] += 1
        await asyncio.sleep(seconds[number % len(seconds)])

    async with app:
        handles = await work.map([(number,) for number in range(tasks)])
        async with app.worker(concurrency=concurrency):
            for handle in handles:
                await handle.wait_result(timeout=600)
    assert runs == dict.fromkeys(range(tasks), 1)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("qtasks")] == []
