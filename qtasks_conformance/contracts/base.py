"""The base of all contracts: it gives each test a rig that is built from the subject."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from qtasks_conformance.patience import PATIENCE, forget_slow_waits, tell_slow_waits
from qtasks_conformance.rig import Rig
from qtasks_conformance.subject import Part, Subject

LIMIT = 6 * PATIENCE
"""Seconds after which a test that hangs is cancelled. All deadlines in the tests are shorter."""


def needs(part: Part, *methods: str) -> None:
    """Skip the test if the broker or storage declares one of these methods unsupported.

    Call it before anything is started: a test that is skipped then costs nothing.
    """
    guarantees = part.build().guarantees
    missing = set(methods) & set(guarantees.unsupported)
    if missing:
        pytest.skip(f"{guarantees.part} does not support {', '.join(sorted(missing))}")


def awaits_of(task: asyncio.Task[Any]) -> list[str]:
    """Return where each coroutine of a task waits, the outermost first.

    `Task.print_stack` shows only the outermost one of a task that is suspended.
    """
    places: list[str] = []
    awaiting: Any = task.get_coro()
    while awaiting is not None:
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(awaiting, f"{kind}_frame")), "")
        if not kind or (frame := getattr(awaiting, f"{kind}_frame")) is None:
            break
        code = frame.f_code
        places.append(f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})")
        awaiting = getattr(awaiting, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
    return places


asynchronous = pytest.mark.asyncio(loop_scope="function")


class Contract:
    """The base of the contracts. pytest collects only your subclasses, which are named `Test…`."""

    pytestmark = asynchronous

    @pytest_asyncio.fixture(loop_scope="function")
    async def rig(self, subject: Subject, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
        """Give a rig with a new namespace; everything is stopped when the test ends."""
        mine = asyncio.all_tasks()
        loop = asyncio.get_running_loop()

        def cancel_the_test() -> None:
            for task in asyncio.all_tasks() - mine:
                print(f"{task.get_name()} waits:", *awaits_of(task), file=sys.stderr, sep="\n  ")
                task.cancel("the test hung")

        watch = loop.call_later(LIMIT, cancel_the_test)
        rig = Rig(subject)
        forget_slow_waits()
        yield rig
        watch.cancel()
        await rig.close()
        tell_slow_waits(request.node.nodeid)
