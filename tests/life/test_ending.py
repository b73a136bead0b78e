"""How worker processes end: replaced whatever holds them up, in order whatever is asked twice."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.life.app import hold_up, holds, pid, terminate, terminate_in_process
from tests.life.setting import Setting, alive, children
from tests.processes import ROOT, Process


@pytest.mark.parametrize("how", holds)
async def test_a_process_that_is_held_up_is_replaced(
    setting: Setting, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATIENCE", "1")
    async with setting.app() as app:
        with setting.worker(processes=1, max_tasks=1) as supervisor:
            held = (await hold_up.using(app).add_task(how, timeout=120)).returning
            assert (await pid.using(app).add_task(timeout=120)).returning != held
            said = supervisor.output()
            assert "the process is held up" in said or "Timeout (0:00:02)!" in said
            assert not alive(held)


async def test_one_process_that_is_held_up_ends(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATIENCE", "1")
    async with setting.app() as app:
        with setting.worker() as worker:
            await hold_up.using(app).add_task("a thread", timeout=120)
            assert await asyncio.to_thread(worker.terminate) == 0
            assert "ends without what does not end (threads: Thread-" in worker.output()


@pytest.mark.full
async def test_a_process_that_is_held_up_is_replaced_within_its_usual_time(
    setting: Setting,
) -> None:
    async with setting.app() as app:
        with setting.worker(processes=1, max_tasks=1) as supervisor:
            for how in ("a thread", "a finalizer"):
                held = (await hold_up.using(app).add_task(how, timeout=60)).returning
                assert held in children(supervisor.pid)
            assert (await pid.using(app).add_task(timeout=60)).returning != held


async def test_a_stopped_process_whose_worker_was_over_is_killed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the interpreter can end it then."""
    monkeypatch.setenv("PATIENCE", "1")
    async with setting.app() as app:
        with setting.worker(processes=1, max_tasks=1) as supervisor:
            held = (await hold_up.using(app).add_task("a thread", timeout=120)).returning
            await asyncio.to_thread(supervisor.wait_for, "has stopped")
            os.kill(held, signal.SIGSTOP)
            assert (await pid.using(app).add_task(timeout=60)).returning != held
            assert "is held up at its end, and is killed" in supervisor.output()


AFTERWARDS = """
import os, sys, time
from tests.life import app

app.main()
print("goes on", flush=True)
until = time.monotonic() + 4
while time.monotonic() < until:
    time.sleep(0.1)
print("done", flush=True)
"""


def test_a_program_goes_on_after_its_worker(setting: Setting, tmp_path: Path) -> None:
    """The guard is for what does not end, and not for what comes next."""
    (tmp_path / "program.py").write_text(AFTERWARDS)
    environment = {
        **setting.pair.environment,
        "QTASKS_NAME": setting.name,
        "PATIENCE": "1",
        "PYTHONPATH": str(ROOT),
    }
    with Process(str(tmp_path / "program.py"), environment=environment) as program:
        program.wait_for("knows block")
        assert program.terminate() == 0
        assert program.output().splitlines()[-2:] == ["goes on", "done"]


@pytest.mark.parametrize("processes", [None, 2])
async def test_signals_that_follow_each_other_end_it_in_order(
    setting: Setting, processes: int | None
) -> None:
    with setting.worker(processes=processes) as worker:
        await asyncio.to_thread(worker.wait_for, "knows block")
        while alive(worker.pid):
            worker.signal(signal.SIGTERM)
            await asyncio.sleep(0.001)
        assert worker.wait() == 0, worker.output()
        assert "has stopped" in worker.output()


@pytest.mark.parametrize("task", [terminate, terminate_in_process], ids=["thread", "process"])
async def test_children_of_tasks_have_default_signal_handlers(
    setting: Setting, task: object
) -> None:
    async with setting.app() as app:
        with setting.worker():
            for method in ("fork", "os.fork", "subprocess", "spawn", "forkserver"):
                ended = await task.using(app).add_task(method, timeout=120)  # type: ignore[attr-defined]
                assert ended.returning == signal.SIGTERM, method
