"""A worker for tests of its life: `python -m tests.life.app`, its options as JSON in `LIFE`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks

router = AsyncRouter()


@router.task(name="pid")
async def pid() -> int:
    return os.getpid()


@router.task(name="nap")
async def nap(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return os.getpid()


@router.task(name="doze")
def doze(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@router.task(name="block")
async def block(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251  # the very thing under test


@router.task(name="stuck")
async def stuck(mark: str, *, blocks: bool) -> int:
    """Never end, where nobody has done so before."""
    try:
        Path(mark).touch(exist_ok=False)  # noqa: ASYNC240  # a moment
    except FileExistsError:
        return os.getpid()
    while True:
        if blocks:
            time.sleep(60)  # noqa: ASYNC251  # the very thing under test
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


@router.task(name="grow")
def grow(mebibytes: int) -> int:
    kept.append(bytes(range(256)) * (4096 * mebibytes))
    return os.getpid()


kept: list[bytes] = []


@router.task(name="fail")
async def fail() -> None:
    raise ValueError("two\nlines")


@router.task(name="exit")
async def leave() -> None:
    os._exit(3)


@router.task(name="kill")
async def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    app = QueueTasks()
    app.include_router(router)
    app.run_forever(**json.loads(os.environ.get("LIFE", "{}")))


if __name__ == "__main__":
    main()
