"""The watchdog: it logs tasks that block their event loop. It runs on the I/O thread."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import traceback
from functools import partial

from qtasks.worker.job import Jobs
from qtasks.worker.runner import Runner
from qtasks_core.errors import Closed

logger = logging.getLogger("qtasks")

PATIENCE = 1.0
"""Seconds in which the loop that runs the tasks has to answer."""


async def watch(jobs: Jobs, runner: Runner) -> None:
    """Ask the loop of the tasks for an answer while there are jobs; log each blockage once.

    Raises `Closed` if that loop is closed.
    """
    call_back = asyncio.get_running_loop().call_soon_threadsafe
    while True:
        await jobs.present()
        answered = asyncio.Event()
        asked = time.monotonic()
        is_reported = False
        runner.call_soon(partial(call_back, answered.set))
        while not answered.is_set():
            try:
                async with asyncio.timeout(PATIENCE):
                    await answered.wait()
            except TimeoutError:
                if runner.gone:
                    raise Closed("the loop of the tasks was closed under its worker") from None
                if not is_reported:
                    _report(runner, time.monotonic() - asked)
                is_reported = True
        await asyncio.sleep(PATIENCE)


def _report(runner: Runner, seconds: float) -> None:
    job = runner.current()
    frame = sys._current_frames().get(runner.thread)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
    if job is not None:
        who = f"task {job.message.task_name} {job.message.uuid}"
    else:
        who = "code outside of the tasks' functions"
    logger.warning(
        "%s has blocked its event loop for %.1f s, and with it all tasks of this process; "
        "put code that blocks into a plain function\n%s",
        who, seconds, stack,
    )  # fmt: skip
