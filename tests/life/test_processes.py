"""Worker processes: signals, limits, supervision, probes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
import urllib.error
import urllib.request

from tests.life.app import block, doze, grow, nap, pid
from tests.life.setting import Setting, alive, children, kill
from tests.processes import Process, until


async def test_a_signal_lets_tasks_finish(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=10) as worker:
            task = await nap.using(app).add_task(1.0)
            await setting.begun(app, task)
            assert await asyncio.to_thread(worker.terminate) == 0
            assert "stops (SIGTERM); running tasks have 10 s" in worker.output()
        assert (await task.wait_result(1)).status == "success"


async def test_past_the_grace_period_tasks_are_given_back(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=0.2) as worker:
            task = await nap.using(app).add_task(1.5)
            await setting.begun(app, task)
            assert await asyncio.to_thread(worker.terminate) == 0
        with setting.worker() as other:
            # Sooner than the lease, which is 4 s, would have run out.
            assert (await task.wait_result(3.5)).returning == other.pid


async def test_a_second_signal_gives_tasks_back_at_once(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=60) as worker:
            task = await nap.using(app).add_task(30.0)
            await setting.begun(app, task)
            began = time.monotonic()
            worker.signal(signal.SIGINT)
            await asyncio.to_thread(worker.wait_for, "stops (SIGINT)")
            worker.signal(signal.SIGINT)
            assert await asyncio.to_thread(worker.terminate) == 0
            assert time.monotonic() - began < 10


async def test_a_function_in_a_thread_does_not_hold_up_the_end(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(grace=0.2) as worker:
            task = await doze.using(app).add_task(30.0)
            await setting.begun(app, task)
            began = time.monotonic()
            assert await asyncio.to_thread(worker.terminate) == 0
            assert time.monotonic() - began < 10
            assert "1 functions still run in threads" in worker.output()


async def test_what_dies_is_started_again(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=2) as supervisor:
            first = (await pid.using(app).add_task(timeout=20)).returning
            await asyncio.to_thread(until, lambda: len(children(supervisor.pid)) == 2, 10, "two")
            assert first in children(supervisor.pid)
            kill(first)
            await asyncio.to_thread(supervisor.wait_for, "by SIGKILL); another in")
            await asyncio.to_thread(
                until, lambda: len(children(supervisor.pid) - {first}) == 2, 10, "another"
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
                until, lambda: not any(alive(worker) for worker in workers), 20, "their end"
            )
            assert "its supervisor is gone" in supervisor.output()
        assert (await task.wait_result(1)).status == "success"


async def test_two_signals_to_the_supervisor_give_back_at_once(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=1, grace=60) as supervisor:
            task = await nap.using(app).add_task(30.0)
            await setting.begun(app, task)
            began = time.monotonic()
            supervisor.signal(signal.SIGINT)
            await asyncio.to_thread(supervisor.wait_for, "stops (SIGTERM)")
            assert await asyncio.to_thread(supervisor.terminate) == 0
            assert time.monotonic() - began < 10
        found = await app.get_task(task.uuid)
        assert found is not None
        assert found.status == "process", "released, not ended"


async def test_a_worker_is_replaced_after_so_many_tasks(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=1, max_tasks=10, concurrency=5) as supervisor:
            tasks = await pid.using(app).map([()] * 40)
            done = await asyncio.gather(*(task.wait_result(40) for task in tasks))
            pids = {task.returning for task in done}
            assert len(pids) >= 3
            assert "tasks are enough" in supervisor.output()


async def test_a_worker_is_replaced_at_a_size(setting: Setting) -> None:
    async with setting.app() as app:
        with setting.worker(processes=1, max_memory=300 * 2**20) as supervisor:
            small = (await pid.using(app).add_task(timeout=20)).returning
            assert (await grow.using(app).add_task(10, timeout=20)).returning == small
            assert (await grow.using(app).add_task(400, timeout=20)).returning == small
            await asyncio.to_thread(supervisor.wait_for, "MiB of memory")
            assert (await pid.using(app).add_task(timeout=20)).returning != small


async def test_a_wrong_set_up_ends_the_supervisor(setting: Setting) -> None:
    with setting.worker(processes=2, concurrency="many") as supervisor:
        until(lambda: not alive(supervisor.pid), 30, "its end")
        assert "before any worker was up" in supervisor.output()


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
    until(lambda: status(port, "/ready") == 200, 20, "ready")
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
            await task.wait_result(10)


async def test_probes_of_several_processes(setting: Setting) -> None:
    port = free_port()
    with setting.worker(health_port=port, processes=2) as supervisor:
        await asyncio.to_thread(probes, supervisor, port)
        one, _ = children(supervisor.pid)
        os.kill(one, signal.SIGSTOP)
        await asyncio.to_thread(until, lambda: status(port, "/ready") == 503, 5, "not ready")
        os.kill(one, signal.SIGCONT)
        await asyncio.to_thread(probes, supervisor, port)


async def test_not_ready_while_the_servers_are_away(setting: Setting) -> None:
    port = free_port()
    setting.pair = setting.pair._replace(
        broker="redis://127.0.0.1:1/0", storage="redis://127.0.0.1:1/0"
    )
    with setting.worker(health_port=port) as worker:
        await asyncio.to_thread(until, lambda: status(port, "/live") == 200, 20, "live")
        assert status(port, "/ready") == 503
        assert await asyncio.to_thread(worker.terminate) == 0
