"""Where a test that hangs was waiting is shown down to the innermost call."""

from __future__ import annotations

import asyncio

from qtasks_conformance.contracts.base import awaits_of


async def test_all_calls_are_shown() -> None:
    never = asyncio.Event()

    async def inner() -> None:
        async with asyncio.timeout(60):
            await never.wait()

    async def outer() -> None:
        await inner()

    task = asyncio.create_task(outer())
    await asyncio.sleep(0)
    shown = [place.partition(" (")[0].rpartition(".")[2] for place in awaits_of(task)]
    assert shown == ["outer", "inner", "wait"]
    task.cancel()
    await asyncio.wait({task})
    assert awaits_of(task) == []
