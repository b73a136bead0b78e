"""Four clients that publish and wait, two workers that work, and what must hold in the end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count, islice

from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import message_of
from qtasks_core import Task
from qtasks_core.errors import Unavailable
from tests.e2e.crash import Setting
from tests.processes import Process, until

CLIENTS = 4
WORKERS = 2
BATCH = 5
SECONDS = 0.02
"""How long the function of each task takes."""
PUBLISH_WITHIN = 3.0
"""Seconds after which a client is told that a write is not confirmed. It tries again, and gives
twice as long: a busy machine may need longer."""
AT_ONCE = 500
"""How many tasks of a backlog are enqueued in one call."""
GOES_ON_WITHIN = 240.0
"""Seconds; on an idle machine it takes some after a freeze, and one after most other faults."""


class Load:
    """The clients publish until the block ends. Then all tasks must have finished, once each."""

    def __init__(self, setting: Setting, group: asyncio.TaskGroup) -> None:
        self.setting = setting
        self.workers: list[Process] = []
        self.published: dict[int, str] = {}
        """The numbers of the tasks whose publishing was confirmed, and their uuids."""
        self.refusals: Counter[str] = Counter()
        """The errors that publishing raised, and how often. It was tried again each time."""
        self.repeated: set[int] = set()
        """The numbers of the tasks that were published again: they may have two messages."""
        self._apps: list[QueueTasks] = []
        self._numbers = count()
        self._group = group
        self._publishing: list[asyncio.Task[None]] = []
        self._going = True

    def begin(self) -> None:
        """Let the clients publish."""
        self._going = True
        self._publishing = [self._group.create_task(self._publish(app)) for app in self._apps]

    async def rest(self) -> list[Task]:
        """Let the clients publish no more; return the final records of all tasks."""
        self._going = False
        await asyncio.wait(self._publishing)
        return await self.finished()

    async def _publish(self, app: QueueTasks) -> None:
        while self._going:
            await self._enqueue(app, BATCH)
            await asyncio.sleep(SECONDS)

    async def _enqueue(self, app: QueueTasks, count: int) -> list[str]:
        """Enqueue tasks, however often that is refused; return their uuids."""
        numbers = list(islice(self._numbers, count))
        messages = [message_of(app, app.definition("work"), (n, SECONDS), {}) for n in numbers]
        thread, client = await app.ready()
        within = PUBLISH_WITHIN
        while True:
            try:
                await thread.ask(client.submit_all, messages, time.monotonic() + within)
                break
            except Unavailable as error:
                within *= 2
                self.refusals[str(error)] += 1
                self.repeated.update(numbers)
        uuids = [message.uuid for message in messages]
        self.published |= dict(zip(numbers, uuids, strict=True))
        return uuids

    async def backlog(self, count: int) -> None:
        """Enqueue many tasks."""
        for begin in range(0, count, AT_ONCE):
            await self._enqueue(self._apps[0], min(AT_ONCE, count - begin))

    async def goes_on(self) -> None:
        """Wait until each client has enqueued a new task and has got its result."""
        async with asyncio.timeout(GOES_ON_WITHIN), asyncio.TaskGroup() as group:
            for app in self._apps:
                group.create_task(self._one_more(app))

    async def _one_more(self, app: QueueTasks) -> None:
        (uuid,) = await self._enqueue(app, 1)
        await app.wait(uuid, None)

    async def finished(self) -> list[Task]:
        """Return the final records of all published tasks, as their clients hear of them."""
        uuids = list(self.published.values())
        async with asyncio.timeout(GOES_ON_WITHIN):
            return list(
                await asyncio.gather(
                    *(self._apps[at % CLIENTS].wait(uuid, None) for at, uuid in enumerate(uuids))
                )
            )

    def check(self, records: list[Task], *, runs: int | None = None) -> None:
        """Fail if a task is lost or recorded twice, or was published once and ran more often."""
        log = self.setting.log
        assert Counter(record.status for record in records) == {"success": len(self.published)}
        begun = Counter(log.numbers("begin"))
        assert begun.keys() >= self.published.keys(), "a task is recorded that never ran"
        accepted = log.accepted()
        twice = {number for number, executions in accepted.items() if len(executions) > 1}
        assert not twice, f"the results of two runs were recorded of {sorted(twice)}"
        for number, record in zip(self.published, records, strict=True):
            # A worker may have got no answer to its save.
            assert accepted.get(number, {record.execution}) == {record.execution}
        if runs is not None:
            once = {n: times for n, times in begun.items() if n not in self.repeated}
            often = {n: times for n, times in once.items() if times > runs}
            assert not often, f"tasks ran more often than {runs} times: {often}"
        again = sum(begun.values()) - len(begun)
        print(f"{len(records)} tasks, {again} more runs, refused: {dict(self.refusals)}")


@asynccontextmanager
async def loaded(setting: Setting, *, runs: int | None = None) -> AsyncIterator[Load]:
    """Run a load around the block; check at its end that nothing is lost or recorded twice.

    `runs`: how often the function of a task may run that was published once; None: as often as it
    likes.
    """
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        load = Load(setting, group)
        for _ in range(CLIENTS):
            load._apps.append(await stack.enter_async_context(setting.app()))
        for _ in range(WORKERS):
            load.workers.append(stack.enter_context(setting.worker()))
        for worker in load.workers:
            await asyncio.to_thread(worker.wait_for, "worker ")
        load.begin()
        await asyncio.to_thread(
            until, lambda: len(setting.log.numbers("saved")) >= 20, "finished tasks"
        )
        yield load
        await load.goes_on()
        records = await load.rest()
        for worker in load.workers:
            assert await asyncio.to_thread(worker.terminate) == 0
    load.check(records, runs=runs)
