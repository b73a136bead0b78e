"""`ProcessExecutor`: functions in child processes, which can be killed and may die."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from qtasks import ConfigurationError
from qtasks.asyncio import QueueTasks
from qtasks.executors import LoopExecutor, ProcessExecutor, ThreadExecutor
from tests.engine import processes
from tests.processes import until


@pytest.fixture
def app(app: QueueTasks) -> QueueTasks:
    app.include_router(processes.router)
    return app


def gone(pid: int) -> bool:
    """Say whether a process is no more; a zombie of a dead parent's is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def written(file: Path) -> list[int]:
    until(file.exists, f"{file.name} to be written")
    return [int(pid) for pid in file.read_text().split()]


async def ended(pids: list[int]) -> None:
    await asyncio.to_thread(until, lambda: all(map(gone, pids)), "the end of the processes")


async def test_arguments_and_results_are_typed_there(app: QueueTasks) -> None:
    box = processes.Box(2, Decimal("1.50"))
    async with app.worker():
        wider = await processes.widen.using(app).add_task(box, by=3, timeout=120)
        assert wider.returning == processes.Box(5, Decimal("1.50"))
        untyped = {"a": (1, {2}, Decimal("0.1")), "b": None}
        assert (await processes.echo.using(app).add_task(untyped, timeout=120)).returning == untyped
        assert (await processes.odds.using(app).add_task(6, timeout=120)).returning == [1, 3, 5]
        assert (await processes.doubled.using(app).add_task(3, timeout=120)).returning == [0, 2, 4]
        assert (await processes.shout.using(app).add_task("hi", timeout=120)).returning == "HI"
        assert (await processes.nested.using(app).add_task(timeout=120)).returning == "inner"


async def test_children_are_used_again_and_end_with_the_worker(app: QueueTasks) -> None:
    pid = processes.pid.using(app)
    async with app.worker():
        tasks = [await task.wait_result(120) for task in await pid.map([()] * 40)]
        used = {task.returning for task in tasks}
        assert os.getpid() not in used
        assert 1 <= len(used) <= 2
    assert all(map(gone, used))


async def test_what_the_function_raises_ends_its_task_alike(
    app: QueueTasks, tmp_path: Path
) -> None:
    async with app.worker():
        refused = await processes.refuse.using(app).add_task(timeout=120)
        assert (refused.status, refused.error) == ("error", "Refusal: not today")
        assert refused.traceback is not None
        assert refused.traceback.startswith("Traceback (most recent call last):\n  File")
        assert "in refuse" in refused.traceback
        assert "qtasks/executors" not in refused.traceback
        again = await processes.ask_again.using(app).add_task(str(tmp_path / "f"), timeout=120)
        assert (again.returning, again.attempt) == ("second", 2)
        rejected = await processes.reject.using(app).add_task(timeout=120)
        assert (rejected.attempt, rejected.dead) == (1, "no use")
        wrong = await app_sends_wrong_arguments(app)
        assert (wrong.attempt, wrong.dead) == (1, "bad arguments")
        assert "argument 'by': Expected `int`, got `str`" in (wrong.error or "")


async def app_sends_wrong_arguments(app: QueueTasks) -> Any:
    sender = QueueTasks(app.name, "memory://")

    @sender.task(processes.widen.name)
    async def as_the_sender_knows_it(*args): ...  # type: ignore[no-untyped-def]

    async with sender:
        arguments = {"width": 1, "price": "1"}, "one"
        return await as_the_sender_knows_it.add_task(*arguments, timeout=120)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exit", "ProcessDied: its process died (exit status 3)"),
        ("kill", "ProcessDied: its process died (signal 9: killed, out of memory?)"),
        ("segfault", "ProcessDied: its process died (signal 11: segmentation fault)"),
        ("close everything", "ProcessDied: its process died ("),
        ("sys.exit", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt: "),
        ("memory", "MemoryError: "),
        ("recursion", "RecursionError: maximum recursion depth"),
        ("object", "the result cannot be stored: SerializationError: a builtins.object would not"),
        ("generator", "the result cannot be stored: nobody has run the generator that it is"),
        ("large", "bytes, the limit is 1048576"),
        (
            "huge",
            "the result cannot be stored: it takes 67108870 bytes, and 67108864 are the most that",
        ),
        ("endless", "ProcessDied: its process sent something that is no answer"),
        ("odd retry_after", "Busy: "),
    ],
)
async def test_only_the_task_that_misbehaves_fails(app: QueueTasks, how: str, says: str) -> None:
    async with app.worker():
        neighbours = await processes.echo.using(app).map([(n,) for n in range(20)])
        task = await processes.misbehave.using(app).add_task(how, timeout=120)
        assert (task.status, task.attempt) == ("error", 1)
        assert says in (task.error or "")
        after = await processes.misbehave.using(app).add_task("not", timeout=120)
        assert after.returning == "well"
        done = [await neighbour.wait_result(120) for neighbour in neighbours]
        assert [neighbour.returning for neighbour in done] == list(range(20))


async def test_forks_and_a_closed_stdout(app: QueueTasks) -> None:
    async with app.worker():
        assert (await processes.fork.using(app).add_task(timeout=120)).returning == "parent"
        died = await processes.fork_and_die.using(app).add_task(timeout=120)
        assert died.error == "ProcessDied: its process died (exit status 3)"
        assert (await processes.close_stdout.using(app).add_task(timeout=120)).status == "success"
        assert (await processes.pid.using(app).add_task(timeout=120)).status == "success"


async def test_one_that_cannot_hear_any_more_is_dead(app: QueueTasks) -> None:
    app = QueueTasks(app.name, "memory://", max_payload=1 << 27)
    app.include_router(processes.router)
    async with app.worker(concurrency=1):
        child = (await processes.deafen.using(app).add_task(timeout=120)).returning
        task = await processes.echo.using(app).add_task(bytes(1 << 26), timeout=120)
        assert (task.error or "").startswith("ProcessDied: its process died (")
        assert (await processes.pid.using(app).add_task(timeout=120)).returning != child


async def test_arguments_and_results_that_no_socket_holds_at_once(app: QueueTasks) -> None:
    app = QueueTasks(app.name, "memory://", max_payload=1 << 25)
    app.include_router(processes.router)
    async with app.worker():
        tasks = await processes.echo.using(app).map([(bytes([n]) * 10_000_000,) for n in range(3)])
        for n, task in enumerate(tasks):
            assert (await task.wait_result(120)).returning == bytes([n]) * 10_000_000


async def test_its_death_is_noticed_beside_what_it_started(app: QueueTasks, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    died = processes.die_beside_what_it_started.using(app)
    try:
        async with app.worker():
            task = await died.add_task(str(file), timeout=120)
            assert task.error == "ProcessDied: its process died (exit status 3)"
    finally:
        for pid in written(file):
            os.kill(pid, signal.SIGKILL)


async def test_one_that_does_not_answer_to_the_point_is_killed_and_leaves_nothing(
    app: QueueTasks,
) -> None:
    def held() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.disable()
    try:
        async with app.worker(concurrency=1):
            babble = processes.babble.using(app)
            await babble.add_task(timeout=120)
            before = held()
            for _ in range(3):
                task = await babble.add_task(timeout=120)
                assert task.error == "ProcessDied: its process sent something that is no answer"
            assert held() <= before
            assert (await processes.pid.using(app).add_task(timeout=120)).status == "success"
    finally:
        gc.enable()


async def test_past_its_time_it_is_killed_with_what_it_started(
    app: QueueTasks, tmp_path: Path
) -> None:
    async with app.worker():
        task = await processes.stuck.using(app).add_task(str(tmp_path / "pids"), timeout=120)
        assert task.error == "TimeoutError: the run took longer than max_time=0.3 s"
        await ended(await asyncio.to_thread(written, tmp_path / "pids"))


async def test_waiting_for_a_free_process_is_no_time_of_the_run(app: QueueTasks) -> None:
    async with app.worker():
        tasks = await processes.brief.using(app).map([()] * 8)
        assert {(await task.wait_result(120)).status for task in tasks} == {"success"}


async def test_cancelled_it_is_killed(app: QueueTasks, tmp_path: Path) -> None:
    async with app.worker():
        task = await processes.sleep.using(app).add_task(str(tmp_path / "pid"))
        pids = await asyncio.to_thread(written, tmp_path / "pid")
        assert await task.cancel()
        await ended(pids)
        assert (await task.wait_result(120)).status == "cancel"
        assert (await processes.pid.using(app).add_task(timeout=120)).status == "success"


async def test_past_the_grace_it_is_killed_and_given_back(app: QueueTasks, tmp_path: Path) -> None:
    async with app:
        async with app.worker(grace=0.1):
            task = await processes.sleep.using(app).add_task(str(tmp_path / "pid"), 3.0)
            pids = await asyncio.to_thread(written, tmp_path / "pid")
        await ended(pids)
        async with app.worker():
            assert (await task.wait_result(120)).status == "success"


async def test_death_is_retried_as_an_exception_is(app: QueueTasks, tmp_path: Path) -> None:
    async with app.worker():
        task = await processes.die_once.using(app).add_task(str(tmp_path / "f"), timeout=120)
    assert (task.returning, task.attempt) == ("alive", 2)


async def test_plugins_tell_exceptions_apart(app: QueueTasks) -> None:
    async with app.worker():
        for how, attempts in (("refuse", 2), ("die", 2), ("other", 1)):
            task = await processes.fail.using(app).add_task(how, timeout=120)
            assert (task.status, task.attempt) == ("error", attempts)


def test_what_cannot_run_there_is_refused_at_registration(app: QueueTasks) -> None:
    async def coroutine() -> None: ...

    def local() -> None: ...

    with pytest.raises(ConfigurationError, match="coroutine function runs on the loop"):
        app.task(executor=ThreadExecutor())(coroutine)
    with pytest.raises(ConfigurationError, match="coroutine function runs on the loop"):
        app.task(executor=ProcessExecutor())(coroutine)
    with pytest.raises(ConfigurationError, match="plain function would block the loop"):
        app.task(executor=LoopExecutor())(local)
    with pytest.raises(ConfigurationError, match="stands at the top of a module"):
        app.task(executor=ProcessExecutor())(local)
    with pytest.raises(ConfigurationError, match="stands at the top of a module"):
        app.task("lambda", executor=ProcessExecutor())(lambda: None)
    with pytest.raises(ConfigurationError, match="below 1"):
        ProcessExecutor(0)


async def test_a_name_that_leads_elsewhere_is_refused_at_the_start(app: QueueTasks) -> None:
    def hidden() -> None: ...

    hidden.__qualname__ = "bare"
    hidden.__module__ = processes.__name__
    app.task("hidden", executor=ProcessExecutor())(hidden)
    with pytest.raises(ConfigurationError, match="stands at the top of a module"):
        async with app.worker():
            pytest.fail("it started")
