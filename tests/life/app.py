"""A worker for tests of its life: `python -m tests.life.app`, its options as JSON in `LIFE`."""

from __future__ import annotations

import asyncio
import atexit
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks
from qtasks.executors import ProcessExecutor
from qtasks.worker import leaving

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


@router.task(name="hold_up")
async def hold_up(how: str) -> int:
    """Leave something behind that does not let the process end."""
    holds[how]()
    return os.getpid()


def for_long() -> None:
    """Sleep. A process that does so ends soon after the one that has started it."""
    parent, until = os.getppid(), time.monotonic() + 300
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.2)


class Reluctant:
    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(300)


holds: dict[str, Callable[[], object]] = {
    "a thread": lambda: threading.Thread(target=for_long).start(),
    "an executor": lambda: ThreadPoolExecutor().submit(for_long),
    "an exit handler": lambda: atexit.register(time.sleep, 300),
    # A regular expression is matched in one go, and no other thread runs meanwhile.
    "the interpreter's lock": lambda: atexit.register(re.match, "(a+)+$", "a" * 64 + "b"),
    "a finalizer": lambda: setattr(sys, "left", Reluctant()),
    "a process": lambda: multiprocessing.get_context("spawn").Process(target=for_long).start(),
}


@router.task(name="terminate")
def terminate(method: str) -> int | None:
    """End a child of a task's own; return how it came to its end."""
    if method == "os.fork":
        if (child := os.fork()) == 0:
            for_long()
        os.kill(child, signal.SIGTERM)
        return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if method == "subprocess":
        with subprocess.Popen(["sleep", "300"]) as process:
            process.terminate()
        return -process.returncode
    context: Any = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]
    one = context.Process(target=for_long)
    one.start()
    one.terminate()
    one.join()
    return -(one.exitcode or 0)


@router.task(name="terminate_in_process", executor=ProcessExecutor(1))
def terminate_in_process(method: str) -> int | None:
    return terminate(method)


def main() -> None:
    if patience := os.environ.get("PATIENCE"):
        leaving.PATIENCE = leaving.LAST_RESORT = float(patience)
    app = QueueTasks()
    app.include_router(router)
    app.run_forever(**json.loads(os.environ.get("LIFE", "{}")))


if __name__ == "__main__":
    main()
