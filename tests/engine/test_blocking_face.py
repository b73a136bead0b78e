"""What users of the blocking face see."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from qtasks import Closed, QueueTasks, SyncResult, TaskTimeout
from qtasks.asyncio import QueueTasks as AsyncQueueTasks


@pytest.fixture
def app() -> QueueTasks:
    return QueueTasks(f"blocking-{threading.get_ident()}", "memory://")


def worker(app: QueueTasks) -> tuple[threading.Thread, threading.Event]:
    """Run a worker for the app in a thread with a loop of its own until the event is set."""
    import asyncio

    stop, started = threading.Event(), threading.Event()

    async def work() -> None:
        async with app.worker():
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert started.wait(10)
    return thread, stop


def test_enqueue_wait_and_look(app: QueueTasks) -> None:
    @app.task()
    def add(x: int, y: int) -> int:
        return x + y

    with app:
        with pytest.raises(TaskTimeout):
            add.add_task(1, 1, timeout=0.1)
        thread, stop = worker(app)
        try:
            assert add.add_task(1, 2, timeout=120).returning == 3
            task = add.add_task(3, 4)
            assert task.wait_result(120).returning == 7
            assert SyncResult(task.uuid, app=app).wait_result(120).returning == 7
            found = app.get_task(task.uuid)
            assert found is not None
            assert found.returning == 7
            mapped = add.map([(n, n) for n in range(100)])
            assert sum(t.wait_result(120).returning for t in mapped) == 9900
            (called,) = app.add_tasks([add.call(5, 6)])
            assert called.wait_result(120).returning == 11
            with ThreadPoolExecutor(8) as pool:
                sums = pool.map(lambda n: add.add_task(n, 1, timeout=120).returning, range(50))
                assert sum(sums) == sum(range(1, 51))
        finally:
            stop.set()
            thread.join()


def test_started_and_stopped_without_a_block(app: QueueTasks) -> None:
    @app.task()
    def one() -> int:
        return 1

    for _ in range(2):
        app.start()
        app.start(5.0)
        app.stop()
        assert one.add_task().status == "new"
        app.stop()
        with pytest.raises(Closed):
            one.add_task()


async def test_inside_a_running_loop_it_names_the_other_face(app: QueueTasks) -> None:
    @app.task()
    def one() -> int:
        return 1

    async with AsyncQueueTasks(app.name, "memory://"):
        for call in (one.add_task, app.start, app.stop):
            with pytest.raises(RuntimeError, match=r"qtasks\.asyncio"):
                call()
