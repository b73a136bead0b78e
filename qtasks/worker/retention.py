"""Deleting records whose retention has passed, by one worker at a time."""

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
    """Delete old records while no other worker does. Return if the storage cannot delete."""
    while True:
        # Shorter than the claim, and random, so that workers started together do not ask together.
        await asyncio.sleep(random.uniform(0.5, 0.9) * PERIOD)
        try:
            # The claim is never released: one worker does this until it stops.
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
