"""A backlog larger than every buffer, drained slowly: every task runs, and runs once."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path

import pytest
from uuid_utils import uuid4

from qtasks.asyncio import QueueTasks
from tests.pairs import url_of, with_lease

CONCURRENCY = 4
# Kafka has its own, by partitions and the driver's buffer: tests/kafka/test_backlog.py.
LEASES = {"sqlite": 2.0, "redis": 2.0, "postgres": 2.0, "rabbitmq": 3.0}
"""Seconds: short, so that slots can be full for longer."""
OVERLOADED = "INTERNAL_ERROR"
"""With this word, RabbitMQ ends a connection after an error of its own: seen on busy machines."""


@pytest.mark.parametrize("backend", LEASES)
@pytest.mark.parametrize(
    ("tasks", "seconds"),
    [
        pytest.param(120, (0.0, 0.05), id="short"),
        pytest.param(400, (0.05, 0.05, 7.0, 0.05, 0.5), id="long", marks=pytest.mark.full),
        pytest.param(3000, (0.05,), id="even", marks=pytest.mark.full),
    ],
)
async def test_each_task_of_a_backlog_runs_once(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    tasks: int,
    seconds: tuple[float, ...],
) -> None:
    """The first tasks fill the slots for longer than a lease; the others are fetched, or wait."""
    caplog.set_level(logging.WARNING)
    lease, url = LEASES[backend], url_of(request, backend, tmp_path)
    runs: Counter[int] = Counter()
    app = QueueTasks(f"t{uuid4().hex[:12]}", with_lease(url, lease), url)

    @app.task()
    async def work(number: int) -> None:
        runs[number] += 1
        first = number < CONCURRENCY
        await asyncio.sleep(1.3 * lease if first else seconds[number % len(seconds)])

    async with app:
        handles = await work.map([(number,) for number in range(tasks)])
        async with app.worker(concurrency=CONCURRENCY):
            for handle in handles:
                await handle.wait_result(timeout=600)
    assert runs == dict.fromkeys(range(tasks), 1)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("qtasks")]
    if any(OVERLOADED in line for line in said):
        said = [line for line in said if OVERLOADED not in line and "answers again" not in line]
    assert said == []
