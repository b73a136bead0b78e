"""Writes tombstones for entries that no reader needs, behind the calls that made them needless."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from itertools import islice

from qtasks_core.errors import Unavailable
from qtasks_log.log import Entry, Log

logger = logging.getLogger("qtasks.log")

LINGER = 0.05
"""Seconds to collect tombstones, so that they share an append and saves go first."""
_AT_ONCE = 1000
"""Tombstones in one append."""
LAST_SWEEP = 2.0
"""Seconds that `stop` allows for writing the remaining tombstones."""


class Sweeper:
    """The tombstones that are not written yet, and the task that writes them in order."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.needless: dict[str, Entry] = {}
        self.task: asyncio.Task[None] | None = None

    def discard(self, partition_key: str, keys: Iterable[str]) -> None:
        """Write tombstones soon. Those of one partition key keep their order."""
        for key in keys:
            self.needless.setdefault(key, Entry(partition_key, key, None))
        if self.needless and (self.task is None or self.task.done()):
            self.task = asyncio.create_task(self._sweep())
            self.task.add_done_callback(_log_failure)

    async def _sweep(self) -> None:
        """Write the tombstones. Those that fail are tried again with the next ones."""
        while self.needless:
            if len(self.needless) < _AT_ONCE:
                await asyncio.sleep(LINGER)
            batch = list(islice(self.needless.values(), _AT_ONCE))
            try:
                await self._log.append(batch)
            except Unavailable as error:
                logger.info("%d tombstones have to wait: %s", len(self.needless), error)
                return
            for entry in batch:
                del self.needless[entry.key]

    async def stop(self) -> None:
        """Write the remaining tombstones. A failure loses nothing: tombstones only save space."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
        if self.needless:
            try:
                async with asyncio.timeout(LAST_SWEEP):
                    await self._log.append(list(self.needless.values()))
            except (Unavailable, TimeoutError) as error:
                logger.info("%d tombstones were not written: %s", len(self.needless), error)


def _log_failure(sweeper: asyncio.Task[None]) -> None:
    if not sweeper.cancelled() and (error := sweeper.exception()) is not None:
        logger.error("writing tombstones failed", exc_info=error)
