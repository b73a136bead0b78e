"""A task that kills its worker each time, among innocent ones: it ends dead, they all succeed."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from qtasks import AsyncTask
from tests.life.app import kill, leave, nap
from tests.life.setting import Setting

BACKENDS = ("sqlite", "redis", "postgres", "rabbitmq", "kafka")
CASES = [("sqlite", leave), *((backend, kill) for backend in BACKENDS)]


@pytest.mark.parametrize(
    ("setting", "poison"),
    CASES,
    ids=[f"{backend}-{poison.name}" for backend, poison in CASES],
    indirect=["setting"],
)
async def test_poison_among_the_innocent(
    setting: Setting, poison: AsyncTask[[], None, object]
) -> None:
    async with setting.app() as app:
        before = await nap.using(app).map([(0.05,)] * 100)
        culprit = await poison.using(app).add_task()
        after = await nap.using(app).map([(0.05,)] * 100)
        with setting.worker(processes=2, concurrency=20) as supervisor:
            async with asyncio.timeout(100):
                ends = await asyncio.gather(
                    *(app.wait(task.uuid, None) for task in [*before, *after])
                )
                dead = await app.wait(culprit.uuid, None)
            assert Counter(record.status for record in ends) == {"success": 200}
            assert dead.status == "error"
            assert dead.dead is not None
            assert dead.dead.startswith("poison: ")
            # Once or twice among others, then alone; not once more. Kafka's count misses some.
            log = supervisor.output()
            deaths = log.count("by SIGKILL") + log.count("exit status 3")
            assert 3 <= deaths <= (12 if "Kafka" in log else 6)
            assert await asyncio.to_thread(supervisor.terminate) == 0
