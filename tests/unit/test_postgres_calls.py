"""Statements that outlive who asked for them."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from qtasks_core.errors import Unavailable
from qtasks_postgres.connection import Calls


async def test_a_call_that_fails_after_its_caller_left_is_no_complaint_of_the_loop() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    calls, release = Calls(), asyncio.Event()

    async def fail() -> None:
        await release.wait()
        raise Unavailable("no answer")

    caller = asyncio.create_task(calls.run(fail()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait({caller})
    release.set()
    await calls.ended()
    del caller
    gc.collect()
    assert complaints == []
