"""Records whose time has passed are deleted, by one worker at a time and rarely."""

from __future__ import annotations

import asyncio
import logging
import random

from qtasks_core import Storage
from qtasks_core.errors import NotSupported, Unavailable

logger = logging.getLogger("qtasks")

PERIOD = 300.0
"""Seconds from one deletion to the next, by whichever worker."""


async def expire(storage: Storage, worker: str) -> None:
    """Delete in turn with all other workers, for ever; return where a storage has no such thing."""
    while True:
        # Workers that were started together do not ask together.
        await asyncio.sleep(random.uniform(0.5, 1.0) * PERIOD)
        try:
            # Held, not released: nobody has to do it again before the period is over.
            if await storage.claim("qtasks-expire", worker, PERIOD) is None:
                continue
            count = await storage.expire()
        except NotSupported:
            return
        except Unavailable as error:
            logger.warning("deleting old records: %s", error)
            continue
        if count:
            logger.info("%d records whose retention has passed were deleted", count)
