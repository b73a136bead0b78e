"""A worker that writes down what it does, for tests that kill it: `python -m tests.e2e.crash_app`.

One line an event, appended in one write: `begin N PID`, `end N PID`, and for each final record
that the storage answered for `saved N PID done|refused EXECUTION`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks
from qtasks.codec.serializers import MsgpackSerializer
from qtasks_core import (
    Completion,
    Composition,
    Delivery,
    Outcome,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.records import FINAL

LOG = os.environ.get("CRASH_LOG", "")
router = AsyncRouter()
decode = MsgpackSerializer().decoder(list[float])


def note(*words: object) -> None:
    """Append one line; a write to a file opened for appending is not torn."""
    descriptor = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


@router.task(name="work")
async def work(number: int, seconds: float) -> int:
    note("begin", number, os.getpid())
    await asyncio.sleep(seconds)
    note("end", number, os.getpid())
    return number


@router.task(name="block")
async def block(number: int, seconds: float) -> int:
    note("begin", number, os.getpid())
    time.sleep(seconds)  # noqa: ASYNC251  # the very thing under test
    note("end", number, os.getpid())
    return number


class Counted(Composition):
    def __init__(self, inner: Composition) -> None:
        self._inner = inner

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        return await self._inner.submit(messages, transaction)

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        return await self._inner.admit(deliveries)

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        outcomes = await self._inner.complete(subscription, completions)
        for completion, outcome in zip(completions, outcomes, strict=True):
            if completion.task is not None and completion.task.status in FINAL:
                number = int(decode(completion.task.args)[0])
                run = completion.task.execution
                note("saved", number, os.getpid(), outcome.status, run)
        return outcomes


class CountingApp(QueueTasks):
    """Its composition writes down what the storage said of each final record."""

    counted = Counted

    async def _start(self, timeout: float) -> None:
        await super()._start(timeout)
        client = self.client
        if not isinstance(client.composition, Counted):
            client.composition = self.counted(client.composition)


def main() -> None:
    app = CountingApp()
    app.include_router(router)
    app.run_forever(concurrency=int(os.environ.get("CRASH_CONCURRENCY", "20")))


if __name__ == "__main__":
    main()
