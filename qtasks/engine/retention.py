"""How long records are kept; one worker at a time deletes them then, and what killed ones left.

A final record is also what stops its message, should that be delivered again. So some are kept
longer than was asked for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

from qtasks.engine.registry import forget_silent
from qtasks_core import Storage, Task
from qtasks_core.errors import NotSupported, Unavailable

logger = logging.getLogger("qtasks")

PERIOD = 300.0
"""Seconds from one deletion to the next, at most."""
LEASES = 2.0
"""A message whose end was not settled comes back within one lease, and soon finds a worker."""
_CANCELLED = 86_400.0
"""Seconds from when it is due that a cancelled task's message may have to wait in its queue."""


def kept_for(asked: float | None, default: float | None, least: float) -> float | None:
    """Return the retention to record, in seconds: what was asked for, `least` where that is less.

    `default` is the storage's, which counts where nothing was asked for.
    """
    keep = default if asked is None else asked
    return asked if keep is None or keep >= least else least


def cancelled_kept_for(record: Task, default: float | None) -> float | None:
    """Return the retention of a task that is cancelled now: its message is still in the queue."""
    wait = max(0.0, record.due_at - time.time()) if record.due_at is not None else 0.0
    return kept_for(record.retention, default, wait + _CANCELLED)


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
