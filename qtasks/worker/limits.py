"""The limits after which a worker stops: a number of tasks, or bytes of memory."""

from __future__ import annotations

import asyncio
import os
import sys


class Limits:
    """The limits of one worker. They are checked when jobs are completed, so they cost little."""

    def __init__(self, max_tasks: int | None, max_memory: int | None) -> None:
        self.are_set = max_tasks is not None or max_memory is not None
        """Whether there is anything to check."""
        self._max_tasks = max_tasks
        self._max_memory = max_memory
        self._reached = asyncio.Event()
        self._reason = ""

    def check(self, finished: int) -> None:
        """Check the limits. `finished` is the number of tasks that have finished so far."""
        if self._max_tasks is not None and finished >= self._max_tasks:
            self._reach(f"{finished} tasks are enough")
        elif self._max_memory is not None and (size := memory()) >= self._max_memory:
            self._reach(f"it takes {size / 2**20:.0f} MiB of memory")

    def _reach(self, reason: str) -> None:
        if not self._reached.is_set():
            self._reason = reason
            self._reached.set()

    def close(self) -> None:
        """End the wait for a limit: the worker stops for another reason."""
        self._reach("")

    async def reached(self) -> str:
        """Wait for the first limit that is reached; return which."""
        await self._reached.wait()
        return self._reason


def memory() -> int:
    """Return the bytes of memory that this process uses; on some systems the peak of that."""
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # not every system has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
