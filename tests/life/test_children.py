"""The child processes of a worker process: they live as long as it does, and no longer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import AsyncTask
from tests.engine.test_processes import gone, written
from tests.processes import ROOT, Process, until

SCRIPT = ROOT / "tests" / "life" / "crunching.py"


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[QueueTasks]:
    app = QueueTasks("crunching", f"sqlite:///{tmp_path}/tasks.db?lease=2")
    async with app:
        yield app


@pytest.fixture
def crunch(app: QueueTasks) -> AsyncTask[..., int, int]:
    @app.task("crunching.crunch")
    def crunch(file: str, seconds: float) -> int:
        raise AssertionError("the worker runs it")

    return crunch


def worker(tmp_path: Path) -> Process:
    return Process(str(SCRIPT), environment={"CRUNCHING": str(tmp_path)})


async def test_the_script_of_the_worker_is_imported_by_its_name(
    crunch: AsyncTask[..., int, int], tmp_path: Path
) -> None:
    with worker(tmp_path) as process:
        task = await crunch.add_task(str(tmp_path / "pid"), 0.0, timeout=120)
        child = task.returning
        assert child != process.pid
        process.wait_for("crunching in crunching\n")
        assert await asyncio.to_thread(process.terminate) == 0
    assert gone(child)


async def test_children_of_a_worker_that_is_killed_notice(
    crunch: AsyncTask[..., int, int], tmp_path: Path
) -> None:
    with worker(tmp_path) as process:
        # One will be busy for a minute, the other has nothing to do.
        await crunch.add_task(str(tmp_path / "busy"), 60.0)
        idle = (await crunch.add_task(str(tmp_path / "idle"), 0.0, timeout=120)).returning
        (busy,) = await asyncio.to_thread(written, tmp_path / "busy")
        process.kill()
        await asyncio.to_thread(until, lambda: gone(busy) and gone(idle), "their end")


async def test_what_they_started_for_a_worker_that_is_killed_ends_too(
    app: QueueTasks, tmp_path: Path
) -> None:
    @app.task("crunching.crunch_elsewhere")
    def crunch_elsewhere(file: str) -> None:
        raise AssertionError("the worker runs it")

    with worker(tmp_path) as process:
        await crunch_elsewhere.add_task(str(tmp_path / "pids"))
        pids = await asyncio.to_thread(written, tmp_path / "pids")
        process.kill()
        try:
            await asyncio.to_thread(until, lambda: all(map(gone, pids)), "their end")
        finally:
            for pid in filter(lambda pid: not gone(pid), pids):
                os.kill(pid, signal.SIGKILL)


async def test_an_idle_child_ends_though_a_thread_goes_on_in_it(
    app: QueueTasks, tmp_path: Path
) -> None:
    @app.task("crunching.leave_a_thread")
    def leave_a_thread() -> int:
        raise AssertionError("the worker runs it")

    with worker(tmp_path) as process:
        child = (await leave_a_thread.add_task(timeout=120)).returning
        process.kill()
        try:
            await asyncio.to_thread(until, lambda: gone(child), "its end")
        finally:
            if not gone(child):
                os.kill(child, signal.SIGKILL)


async def test_signals_to_all_processes_leave_running_functions_alone(
    crunch: AsyncTask[..., int, int], tmp_path: Path
) -> None:
    with worker(tmp_path) as process:
        task = await crunch.add_task(str(tmp_path / "pid"), 2.0)
        (child,) = await asyncio.to_thread(written, tmp_path / "pid")
        for pid in (child, process.pid):
            os.kill(pid, signal.SIGTERM)
        os.kill(child, signal.SIGINT)
        assert await asyncio.to_thread(process.wait) == 0
        assert (await task.wait_result(120)).returning == child
    assert gone(child)


async def test_a_script_that_forgets_who_imports_it_starts_no_worker_there(
    crunch: AsyncTask[..., int, int], tmp_path: Path
) -> None:
    guarded = SCRIPT.read_text()
    script = tmp_path / "crunching.py"
    script.write_text(guarded.replace('if __name__ == "__main__":', "if True:"))
    assert script.read_text() != guarded
    with Process(str(script), environment={"CRUNCHING": str(tmp_path)}) as process:
        task = await crunch.add_task(str(tmp_path / "pid"), 0.0, timeout=120)
        assert task.error is not None
        assert task.error.startswith("ConfigurationError: a worker would start in a child process")
        assert await asyncio.to_thread(process.terminate) == 0


STUCK = """
import asyncio, time
from qtasks.asyncio import QueueTasks

app = QueueTasks("stuck", "memory://")

@app.task(max_time=0.1)
def stuck() -> None:
    time.sleep(60)

async def main() -> None:
    async with app.worker():
        print((await stuck.add_task(timeout=10)).error)

asyncio.run(main())
"""


def test_a_function_that_never_returns_does_not_hold_up_its_hosts_exit() -> None:
    with Process("-c", STUCK, environment={}) as process:
        assert process.wait() == 0
        assert process.output().endswith(
            "\nTimeoutError: the run took longer than max_time=0.1 s\n"
        )
