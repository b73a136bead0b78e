"""Telling who is cancelled from a part that takes itself for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_from_outside() -> Iterator[None]:
    """Raise `RuntimeError` for a `CancelledError` though nobody has cancelled this task.

    Drivers raise one when a connection is closed under them, and a task that ends by it is not
    missed: what it did for the others would never be done.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("a part was cancelled, and nobody had cancelled it") from error
