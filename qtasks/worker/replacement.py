"""Replaces a failed worker in a host's loop: the host keeps running, so nothing restarts it."""

from __future__ import annotations

import asyncio
import logging
import time

from qtasks.bridge.crossing import io_thread
from qtasks.client.retrying import Backoff
from qtasks.worker.hosted import App, HostedWorker, RunningWorker, WorkerOptions
from qtasks_core.errors import Closed, ConfigurationError, NotSupported

logger = logging.getLogger("qtasks")

_LEAST_PAUSE = 1.0
"""Seconds, at least, until a worker is replaced."""
REMIND_AFTER = 60.0
"""Seconds after which a failure is logged again.

If a worker fails after it has worked for this time, the pauses start again with the shortest.
"""


async def replace_failed(app: App, options: WorkerOptions, running: RunningWorker) -> None:
    """Start another worker whenever one has failed, until cancelled.

    Another worker does not fix an error of the configuration: that is logged again each minute.
    """
    thread, backoff = io_thread(), Backoff(first=1.0, most=30.0)
    while True:
        started = time.monotonic()
        await thread.run(running.engine.failed)
        error = running.engine.failure
        if error is None:
            return
        while isinstance(error, ConfigurationError | NotSupported | Closed):
            await asyncio.sleep(REMIND_AFTER)
            logger.error("nothing is received, since worker %s failed: %s", running.id, error)
        if time.monotonic() - started > REMIND_AFTER:
            backoff.reset()
        pause = _LEAST_PAUSE + backoff.next()
        logger.warning("another worker follows %s in %.1f s", running.id, pause)
        await asyncio.sleep(pause)
        await asyncio.wait(running.hosted.stop(options.grace))
        running.hosted.result()
        try:
            running.hosted = await HostedWorker.start(app, options)
        except Exception as error:  # logged, and the next attempt follows
            logger.error("no worker could follow: %s", error, exc_info=error)
