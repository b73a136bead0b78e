"""A worker that dies again and again between a result and its acknowledgement.

`python -m tests.faults.dying LIVES`: each life is a forked child, which saves the result of one
task and kills itself where it would acknowledge it. After the last life, this process is an
ordinary worker. Besides the lines of `tests.e2e.crash_app`, it writes `killed N PID`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from qtasks_core import Completion, Outcome, Settlement, Subscription, TaskMessage
from qtasks_core.records import FINAL
from tests.e2e.crash_app import Counted, CountingApp, decode, note, router

PR_SET_PDEATHSIG = 1
LAST = "the last life begins"
"""What it prints before the ordinary worker."""


class Dying(Counted):
    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        if any(each.task is not None and each.task.status in FINAL for each in completions):
            subscription.settle = die  # type: ignore[method-assign]
        return await super().complete(subscription, completions)


async def die(settlements: Sequence[Settlement]) -> list[Outcome]:
    """End where the tasks are acknowledged whose results have just been saved."""
    for settlement in settlements:
        message = settlement.delivery.message
        assert isinstance(message, TaskMessage)
        note("killed", int(decode(message.args)[0]), os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives on")


class DyingApp(CountingApp):
    counted = Dying


def work(app: CountingApp) -> None:
    app.include_router(router)
    app.run_forever(concurrency=1)


def main(lives: int) -> None:
    libc = ctypes.CDLL(None)
    for life in range(lives):
        child = os.fork()
        if child == 0:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            work(DyingApp())
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            sys.exit(f"life {life} ended with status {status}")
    print(LAST, flush=True)
    work(CountingApp())


if __name__ == "__main__":
    main(int(sys.argv[1]))
