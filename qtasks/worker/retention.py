"""Deleting old records, by one worker at a time."""

from __future__ import annotations

import asyncio
import logging
import random

from qtasks.client.registry import forget_silent
from qtasks_core import Storage
from qtasks_core.errors import NotSupported, Unavailable

logger = logging.getLogger("qtasks")

PERIOD = 300.0
"""Seconds from one deletion to the next, at most."""


async def expire(storage: Storage, worker: str) -> None:
    """Delete for all workers while none of the others does; return where a storage cannot."""
    while True:
        # Shorter than the claim, and not the same for workers that were started together.
        await asyncio.sleep(random.uniform(0.5, 0.9) * PERIOD)
        try:
            # Held, not released: who has it once does it until it dies.
            if await storage.claim("qtasks-expire", worker, PERIOD) is None:
                continue
            count = await storage.expire()
            await forget_silent(storage)
        except NotSupported:
            return
        except Unavailable as error:
            logger.warning("deleting old records: %s", error)
            continue
        if count:
            logger.info("%d records whose retention has passed were deleted", count)
