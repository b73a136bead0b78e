"""How long the kit waits, and the warning for a test that nearly waited too long."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class SlowPass(UserWarning):
    """A test passed, but one of its waits took more than a third of its patience.

    On a busier machine the test fails. Make it a failure here with
    `-W error::qtasks_conformance.SlowPass`.
    """


class Patience(float):
    """Seconds for what has no time of its own in the contracts; normally a fraction of it is used.

    What has a time of its own, such as a lease, is waited for with an ordinary number.
    """

    def __rmul__(self, times: float) -> Patience:
        return Patience(times * float(self))


PATIENCE = Patience(os.environ.get("QTASKS_CONFORMANCE_PATIENCE", "30"))
"""For what must happen at some time."""
SOON = Patience(min(10.0, PATIENCE))
"""For what must happen long before a long lease runs out, a rebalance included."""

SHARE = 1 / 3
"""The part of its patience that a wait may take without a warning."""


class _Waits:
    """What is known of the waits of the test that runs now."""

    def __init__(self) -> None:
        self.slow: list[str] = []
        """Those that took too much of their patience."""
        self.away = 0.0
        """Seconds in which the test itself kept the server away: no wait can end in them."""


_waits = _Waits()


@contextmanager
def timed(within: float, wait: str) -> Iterator[None]:
    """Note a wait that ends well and took too much of its patience; `wait` says what it was for."""
    began = time.monotonic() - _waits.away
    yield
    took = time.monotonic() - _waits.away - began
    if isinstance(within, Patience) and took > within * SHARE:
        _waits.slow.append(f"{wait} took {took:.1f} s of {within:.0f} s")


@contextmanager
def server_away() -> Iterator[None]:
    """Have the server killed or frozen inside: that time is not counted as waiting."""
    began = time.monotonic()
    try:
        yield
    finally:
        _waits.away += time.monotonic() - began


@asynccontextmanager
async def patient(within: float, wait: str) -> AsyncIterator[None]:
    """Raise TimeoutError when the body takes more than `within` seconds, and time it if not."""
    with timed(within, wait):
        async with asyncio.timeout(within):
            yield


def forget_slow_waits() -> None:
    """Begin a test: the waits of the one before are not its own."""
    _waits.slow.clear()


def tell_slow_waits(test: str) -> None:
    """End a test: warn of its slow waits."""
    if _waits.slow:
        warnings.warn(SlowPass(f"{test}: {'; '.join(_waits.slow)}"), stacklevel=2)
