"""Worker processes: signals, limits, supervision, probes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.life.app import block, doze, fail, grow, nap, pid, stuck
from tests.life.setting import Setting, alive, children, kill
from tests.pairs import with_lease
from tests.processes import ROOT, Process, until


async def test_a_signal_lets_tasks_finish(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=10) as worker:
            task = await nap.using(app).add_task(1.0)
            await setting.begun(app, task)
            assert await asyncio.to_thread(worker.terminate) == 0
            assert "stops (SIGTERM); running tasks have 10 s" in worker.output()
        assert (await task.wait_result(120)).status == "success"


async def test_past_the_grace_period_tasks_are_given_back(setting: Setting) -> None:
    setting.pair = setting.pair._replace(broker=with_lease(setting.pair.storage, 60.0))
    async with setting.app() as app:
        with setting.worker(grace=0.2) as worker:
            task = await nap.using(app).add_task(1.5)
            await setting.begun(app, task)
            assert await asyncio.to_thread(worker.terminate) == 0
        with setting.worker() as other:
            # Sooner than the lease would have run out.
            assert (await task.wait_result(120)).returning == other.pid


async def test_a_second_signal_gives_tasks_back_at_once(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=60) as worker:
            task = await nap.using(app).add_task(100.0)
            await setting.begun(app, task)
            began = time.monotonic()
            worker.signal(signal.SIGINT)
            await asyncio.to_thread(worker.wait_for, "stops (SIGINT)")
            worker.signal(signal.SIGINT)
            assert await asyncio.to_thread(worker.terminate) == 0
            assert time.monotonic() - began < 60


async def test_what_is_logged_without_being_asked_for(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker() as worker:
            await pid.using(app).add_task(timeout=120)
            failed = await fail.using(app).add_task(timeout=120)
            await pid.using(app).add_task(timeout=120)
            assert await asyncio.to_thread(worker.terminate) == 0
            lines = [line.partition(" qtasks: ")[2] for line in worker.output().splitlines()]
    broker, storage, begin, failure, stops, stopped = lines
    assert broker.startswith("SqliteBroker on SQLite 3.")
    assert storage.startswith("SqliteStorage on SQLite 3.")
    assert "survives server crash (WAL, synchronous=NORMAL" in broker
    assert "queues default, 100 tasks at once, knows block, " in begin
    assert failure == f"task fail {failed.uuid} failed: ValueError: two lines"
    assert stops.endswith("stops (SIGTERM); running tasks have 30 s")
    assert stopped.endswith("has stopped")


@pytest.mark.parametrize(
    ("blocks", "again"),
    [(True, True), (False, False)],
    ids=["blocks, a second signal", "swallows its cancellation, past the grace"],
)
async def test_a_coroutine_that_never_ends_does_not_hold_up_the_end(
    setting: Setting, tmp_path: Path, blocks: bool, again: bool
) -> None:
    setting.pair = setting.pair._replace(broker=with_lease(setting.pair.storage, 60.0))
    mark = tmp_path / "begun"
    async with setting.app() as app:
        with setting.worker(grace=60 if again else 0.2) as worker:
            task = await stuck.using(app).add_task(str(mark), blocks=blocks)
            await asyncio.to_thread(until, mark.exists, "its begin")
            if again:
                worker.signal(signal.SIGTERM)
                await asyncio.to_thread(worker.wait_for, "stops (SIGTERM)")
            assert await asyncio.to_thread(worker.terminate) == 0
            assert f"task stuck {task.uuid} still runs although" in worker.output()
        with setting.worker() as other:
            # Sooner than the lease would have run out.
            assert (await task.wait_result(120)).returning == other.pid


async def test_a_hang_up_is_a_signal_too(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=10) as worker:
            task = await nap.using(app).add_task(1.0)
            await setting.begun(app, task)
            worker.signal(signal.SIGHUP)
            assert await asyncio.to_thread(worker.wait) == 0
            assert "stops (SIGHUP)" in worker.output()
        assert (await task.wait_result(120)).status == "success"


async def test_a_function_in_a_thread_does_not_hold_up_the_end(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=0.2) as worker:
            task = await doze.using(app).add_task(100.0)
            await setting.begun(app, task)
            began = time.monotonic()
            assert await asyncio.to_thread(worker.terminate) == 0
            assert time.monotonic() - began < 60
            assert "1 functions still run in threads" in worker.output()


async def test_what_dies_is_started_again(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=2) as supervisor:
            first = (await pid.using(app).add_task(timeout=120)).returning
            await asyncio.to_thread(until, lambda: len(children(supervisor.pid)) == 2, "two")
            assert first in children(supervisor.pid)
            kill(first)
            await asyncio.to_thread(supervisor.wait_for, "by SIGKILL); another in")
            await asyncio.to_thread(
                until, lambda: len(children(supervisor.pid) - {first}) == 2, "another"
            )
            workers = children(supervisor.pid)
            assert await asyncio.to_thread(supervisor.terminate) == 0
            assert not any(alive(worker) for worker in workers)


async def test_a_worker_ends_when_its_supervisor_is_killed(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=2) as supervisor:
            task = await nap.using(app).add_task(1.0)
            await setting.begun(app, task)
            workers = children(supervisor.pid)
            supervisor.kill()
            await asyncio.to_thread(
                until, lambda: not any(alive(worker) for worker in workers), "their end"
            )
            assert "its supervisor is gone" in supervisor.output()
        assert (await task.wait_result(120)).status == "success"


async def test_a_worker_whose_loop_is_blocked_ends_with_its_supervisor(
    setting: Setting, tmp_path: Path
) -> None:
    mark = tmp_path / "begun"
    async with setting.app() as app:
        with setting.worker(processes=1, grace=0.2) as supervisor:
            await stuck.using(app).add_task(str(mark), blocks=True)
            await asyncio.to_thread(until, mark.exists, "its begin")
            (worker,) = children(supervisor.pid)
            supervisor.kill()
            await asyncio.to_thread(until, lambda: not alive(worker), "its end")


async def test_two_signals_to_the_supervisor_give_back_at_once(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=1, grace=60) as supervisor:
            task = await nap.using(app).add_task(100.0)
            await setting.begun(app, task)
            began = time.monotonic()
            supervisor.signal(signal.SIGINT)
            await asyncio.to_thread(supervisor.wait_for, "stops (SIGTERM)")
            assert await asyncio.to_thread(supervisor.terminate) == 0
            assert time.monotonic() - began < 60
        found = await app.get_task(task.uuid)
        assert found is not None
        assert found.status == "process", "released, not ended"


async def test_a_signal_to_all_processes_is_one_signal(setting: Setting) -> None:
    """A service manager sends it to each process of a service, and the supervisor passes it on."""
    async with setting.app() as app:
        with setting.worker(processes=1, grace=10) as supervisor:
            task = await nap.using(app).add_task(1.5)
            await setting.begun(app, task)
            (worker,) = children(supervisor.pid)
            os.kill(worker, signal.SIGTERM)
            await asyncio.to_thread(supervisor.wait_for, "stops (SIGTERM)")
            assert await asyncio.to_thread(supervisor.terminate) == 0
        assert (await task.wait_result(120)).status == "success"


@pytest.mark.full
async def test_a_worker_that_does_not_end_is_killed(setting: Setting) -> None:
    with setting.worker(processes=2, grace=0) as supervisor:
        await asyncio.to_thread(until, lambda: len(children(supervisor.pid)) == 2, "two")
        await asyncio.to_thread(supervisor.wait_for, "knows block")
        workers = children(supervisor.pid)
        os.kill(min(workers), signal.SIGSTOP)
        assert await asyncio.to_thread(supervisor.terminate) == 0
        assert f"(pid {min(workers)}) did not end and was killed" in supervisor.output()
        assert not any(alive(worker) for worker in workers)


async def test_a_worker_is_replaced_after_so_many_tasks(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=1, max_tasks=10, concurrency=5) as supervisor:
            tasks = await pid.using(app).map([()] * 40)
            done = await asyncio.gather(*(task.wait_result(120) for task in tasks))
            pids = {task.returning for task in done}
            assert len(pids) >= 3
            assert "tasks are enough" in supervisor.output()


async def test_a_worker_is_replaced_at_a_size(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=1, max_memory=300 * 2**20) as supervisor:
            small = (await pid.using(app).add_task(timeout=120)).returning
            assert (await grow.using(app).add_task(10, timeout=120)).returning == small
            assert (await grow.using(app).add_task(400, timeout=120)).returning == small
            await asyncio.to_thread(supervisor.wait_for, "MiB of memory")
            assert (await pid.using(app).add_task(timeout=120)).returning != small


async def test_a_wrong_set_up_ends_the_supervisor(setting: Setting) -> None:
    with setting.worker(processes=2, concurrency="many") as supervisor:
        until(lambda: not alive(supervisor.pid), "its end")
        assert "before any worker was up" in supervisor.output()


async def test_what_cannot_be_started_is_tried_again(setting: Setting, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    async with setting.app() as app:
        with setting.worker(python=str(python), path=path, processes=2) as supervisor:
            tasks = await pid.using(app).map([()] * 20)
            pids = {(await task.wait_result(120)).returning for task in tasks}
            python.unlink()
            kill(pids.pop())
            await asyncio.to_thread(supervisor.wait_for, "could not be started ([Errno 2]")
            await nap.using(app).add_task(0.0, timeout=120)
            python.symlink_to(sys.executable)
            await asyncio.to_thread(
                until, lambda: len(children(supervisor.pid)) == 2, "both of them"
            )
            assert await asyncio.to_thread(supervisor.terminate) == 0


def status(port: int, path: str) -> int:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).status  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def probes(worker: Process, port: int) -> None:
    until(lambda: status(port, "/ready") == 200, "ready")
    assert status(port, "/live") == 200
    assert status(port, "/else") == 404


async def test_probes_of_one_process(setting: Setting) -> None:
    port = free_port()
    with setting.worker(health_port=port) as worker:
        await asyncio.to_thread(probes, worker, port)
        async with setting.app() as app:
            # Blocking the tasks' loop does not block the answers.
            task = await block.using(app).add_task(1.5)
            assert status(port, "/live") == 200
            await task.wait_result(120)


async def test_probes_of_several_processes(setting: Setting) -> None:
    port = free_port()
    with setting.worker(health_port=port, processes=2) as supervisor:
        await asyncio.to_thread(probes, supervisor, port)
        async with setting.app() as app:
            # A loop that is blocked in one of them is no reason either.
            task = await block.using(app).add_task(2.0)
            await setting.begun(app, task)
            assert status(port, "/ready") == 200
            await task.wait_result(120)
        one, _ = children(supervisor.pid)
        os.kill(one, signal.SIGSTOP)
        await asyncio.to_thread(until, lambda: status(port, "/ready") == 503, "not ready")
        os.kill(one, signal.SIGCONT)
        await asyncio.to_thread(probes, supervisor, port)


@pytest.mark.parametrize("processes", [None, 2])
def test_a_port_that_cannot_be_had_is_said(setting: Setting, processes: int | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 70_000):
            with setting.worker(health_port=port, processes=processes) as worker:
                assert worker.wait() == 1
                assert "ConfigurationError: the health probe cannot listen:" in worker.output()


async def test_not_ready_while_the_servers_are_away(setting: Setting) -> None:
    port = free_port()
    setting.pair = setting.pair._replace(
        broker="redis://127.0.0.1:1/0", storage="redis://127.0.0.1:1/0"
    )
    with setting.worker(health_port=port) as worker:
        await asyncio.to_thread(until, lambda: status(port, "/live") == 200, "live")
        assert status(port, "/ready") == 503
        assert await asyncio.to_thread(worker.terminate) == 0
