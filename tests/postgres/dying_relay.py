"""A process that dies while it carries a message on: `python -m tests.postgres.dying_relay WHEN`.

WHEN is `before` or `after` the message is published at the other broker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from qtasks_core import Outcome, TaskMessage
from qtasks_core.lookup import resolve_broker
from qtasks_postgres import OutboxBroker


async def main(when: str) -> None:
    inner = resolve_broker(os.environ["INNER"])
    publish = inner.publish

    async def dying(
        messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if when == "after":
            await publish(messages)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it lives on")

    inner.publish = dying  # type: ignore[method-assign]
    broker = OutboxBroker(os.environ["OUTBOX"], inner)
    await broker.start(os.environ["NAMESPACE"])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
