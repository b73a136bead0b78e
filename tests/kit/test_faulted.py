"""An injected error comes only where a connection can break."""

from __future__ import annotations

import asyncio
from itertools import product

import pytest

from qtasks_conformance.contracts.faults import MOMENTS, Fault, Faulted, Moment


@pytest.mark.parametrize(("at", "moment"), list(product((1, 2), MOMENTS)))
async def test_no_error_comes_where_a_call_waits_for_a_lock(at: int, moment: Moment) -> None:
    """Such an error would leave the lock without an owner, and all who wait for it for ever."""
    lock = asyncio.Lock()

    async def call() -> None:
        async with lock:
            await asyncio.sleep(0.001)

    async def failing() -> None:
        await Faulted(call(), fault)

    fault = Fault("error", moment, at)
    await lock.acquire()
    first, second = asyncio.create_task(failing()), asyncio.create_task(call())
    await asyncio.sleep(0)  # both wait
    lock.release()
    await asyncio.wait({first, second}, timeout=10)
    assert first.done()
    assert second.done(), "it waits for a lock that nobody has"
    await second
    if at == 1:  # the one await besides that of the lock
        assert isinstance(first.exception(), ConnectionResetError)
    else:
        assert first.exception() is None
        assert not fault.reached
