"""Timing, in the same way for all drivers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable

from benchmarks.bare import ROUND_TRIPS


async def round_trips(once: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Await `once` 1,000 times; return the median and the 99th percentile in milliseconds."""
    took = []
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter()
        await once()
        took.append((time.perf_counter() - begin) * 1000)
    return {"p50": statistics.median(took), "p99": sorted(took)[int(ROUND_TRIPS * 0.99) - 1]}


class Rate:
    """Measures the operations per second of a block."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.value = 0.0

    def __enter__(self) -> Rate:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.value = self._count / (time.perf_counter() - self._begin)
