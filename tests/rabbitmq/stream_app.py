"""A process with a storage on RabbitMQ, for tests that stop it: `-m tests.rabbitmq.stream_app`.

`STREAM_DOES=rewrite`: it rewrites the log until it comes to the step `STREAM_STEP`, where it
freezes itself. If it is woken up, it goes on. `STREAM_DOES=write`: it writes all the time. It
prints what the storage has confirmed.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, TypeVar

from qtasks_core import Task
from qtasks_core.errors import Unavailable
from qtasks_log import rewriting
from qtasks_rabbitmq import RabbitMQLog, RabbitMQStorage
from qtasks_rabbitmq.generations import Generations

T = TypeVar("T")

STEPS: dict[str, tuple[type, str, bool]] = {
    "named": (RabbitMQLog, "prepare", False),
    "created": (Generations, "create", True),
    "copied in part": (RabbitMQLog, "_copy", True),
    "prepared": (RabbitMQLog, "prepare", True),
    "before the turn": (RabbitMQLog, "switch", False),
    "after the turn": (RabbitMQLog, "switch", True),
    "before the pointer": (Generations, "point", False),
    "after the pointer": (Generations, "point", True),
    "before a deletion": (Generations, "delete", False),
    "after a deletion": (Generations, "delete", True),
}
"""Before or after which call a process stops."""


def say(*words: object) -> None:
    print(*words, flush=True)


async def patient(call: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """Make a call until it is answered."""
    while True:
        try:
            return await call(*arguments)
        except Unavailable:
            await asyncio.sleep(0.05)


def freeze_at(step: str) -> None:
    """Freeze this process when it comes to a step."""
    owner, name, after = STEPS[step]
    inner = getattr(owner, name)

    async def outer(*arguments: Any) -> Any:
        if after:
            result = await inner(*arguments)
            freeze()
            return result
        freeze()
        return await inner(*arguments)

    def freeze() -> None:
        setattr(owner, name, inner)
        say("frozen at", step)
        os.kill(os.getpid(), signal.SIGSTOP)
        say("goes on")

    setattr(owner, name, outer)


async def rewrite(storage: RabbitMQStorage) -> None:
    freeze_at(os.environ["STREAM_STEP"])
    for _ in range(12):
        await patient(storage.expire)
    record = Task(uuid="of the frozen one", task_name="n", status="success")
    await patient(storage.save, [record])
    found = await patient(storage.get, ["kept", "while it was frozen"])
    say("found", [task is not None for task in found])
    say("well")


async def write(storage: RabbitMQStorage) -> None:
    """Count a value up, save a record, and append the number to a stream, one after the other."""
    name = str(os.getpid())
    say("begins")
    for number in count():
        uuid = f"{name}.{number}"
        record = Task(uuid=uuid, task_name="n", status="success")
        await patient(storage.save, [record])
        say("saved", uuid)
        try:
            await storage.append(name, [b"%d" % number])
        except Unavailable:
            continue  # it may be there or not
        say("appended", number)


async def main() -> None:
    rewriting.SMALL = int(os.environ.get("STREAM_SMALL", "0"))
    storage = RabbitMQStorage(os.environ["STREAM_URL"])
    await patient(storage.start, os.environ["STREAM_NAME"])
    try:
        await {"rewrite": rewrite, "write": write}[os.environ["STREAM_DOES"]](storage)
    finally:
        await storage.stop()


if __name__ == "__main__":
    asyncio.run(main())
