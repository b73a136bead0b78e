"""How long the kit waits, and the warning for a test that waited almost too long."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class SlowPass(UserWarning):
    """A test passed, but one of its waits took more than a third of the time that it may take.

    On a busier machine that test may fail. Look for what is slow: often a timer where the server
    could notify. To make this warning a failure, run pytest with
    `-W error::qtasks_conformance.SlowPass`.
    """


class Patience(float):
    """Seconds for an event that has no time limit in the contracts; usually it is much faster.

    An event with a limit of its own, such as the end of a lease, gets an ordinary number: its waits
    are not checked for `SlowPass`.
    """

    def __rmul__(self, times: float) -> Patience:
        return Patience(times * float(self))


PATIENCE = Patience(os.environ.get("QTASKS_CONFORMANCE_PATIENCE", "30"))
"""Seconds for what must happen at some time."""
SOON = Patience(max(min(10.0, PATIENCE), PATIENCE / 3))
"""Seconds for what must happen long before a long lease ends, even with a rebalance."""

TICK = 0.05
"""Seconds between two looks at how far this machine is behind."""

SHARE = 1 / 3
"""The fraction of its patience that a wait may take without a warning."""


class _Waits:
    """The waits of the running test."""

    def __init__(self) -> None:
        self.slow: list[str] = []
        """Descriptions of the waits that took too long."""
        self.away = 0.0
        """Seconds during which the test itself had stopped the server. They do not count."""
        self.behind = 0.0
        """Seconds by which short sleeps took longer than they should, all together."""


_waits = _Waits()


@contextmanager
def timed(within: float, wait: str) -> Iterator[None]:
    """Note a wait that succeeds but takes too long; `wait` describes it for the warning."""
    began = time.monotonic() - _waits.away
    yield
    took = time.monotonic() - _waits.away - began
    if isinstance(within, Patience) and took > within * SHARE:
        _waits.slow.append(f"{wait} took {took:.1f} s of {within:.0f} s")


@contextmanager
def server_away() -> Iterator[None]:
    """Do not count the time of the block: the test has killed or frozen the server in it."""
    began = time.monotonic()
    try:
        yield
    finally:
        _waits.away += time.monotonic() - began


async def measure_lag() -> None:
    """Measure how far this machine is behind, until cancelled: on an idle one it never is."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        await asyncio.sleep(TICK)
        _waits.behind += loop.time() - began - TICK


def lag() -> float:
    """Return by how many seconds all sleeps of `measure_lag` took too long until now."""
    return _waits.behind


@asynccontextmanager
async def patient(within: float, wait: str) -> AsyncIterator[None]:
    """Raise `TimeoutError` if the block takes longer than `within` seconds; note a slow pass."""
    with timed(within, wait):
        async with asyncio.timeout(within):
            yield


def forget_slow_waits() -> None:
    """Forget the waits of the previous test."""
    _waits.slow.clear()


def tell_slow_waits(test: str) -> None:
    """Warn about the slow waits of a test that has finished."""
    if _waits.slow:
        warnings.warn(SlowPass(f"{test}: {'; '.join(_waits.slow)}"), stacklevel=2)
