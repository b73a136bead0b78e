"""SyncTester, with a blocking app and with an async one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from qtasks import TaskFailed
from qtasks.testing import SyncTester
from tests.testing import shop
from tests.testing.shop import app, blocking_app, chain, child, on_a_loop, sent, stamp


@pytest.fixture
def tester() -> Iterator[SyncTester]:
    with SyncTester(blocking_app) as tester:
        yield tester


def test_plain_functions_run_in_the_thread_of_the_test(tester: SyncTester) -> None:
    task = stamp.add_task("a")
    assert tester.enqueued(stamp, args=["a"])
    (done,) = tester.drain()
    assert (done.uuid, done.returning) == (task.uuid, "a")
    assert task.wait_result(timeout=120).returning == "a"
    assert shop.threads == [threading.get_ident()]


def test_async_functions_run_on_a_loop(tester: SyncTester) -> None:
    on_a_loop.add_task("four")
    (done,) = tester.drain()
    assert done.returning == 4
    assert shop.threads != [threading.get_ident()]


def test_a_task_that_enqueues_more(tester: SyncTester) -> None:
    chain.add_task(3)
    assert len(tester.drain()) == 4
    assert sent == ["3", "2", "1", "0"]


def test_run_one_and_travel(tester: SyncTester) -> None:
    stamp.add_task("now")
    stamp.add_task("later", delay=60)
    assert tester.run_one() is not None
    assert tester.run_one() is None
    tester.travel(60)
    later = tester.run_one()
    assert later is not None
    assert later.returning == "later"


def test_errors_are_raised(tester: SyncTester) -> None:
    @blocking_app.task("breaks")
    def breaks() -> None:
        raise ValueError("broken")

    try:
        breaks.add_task()
        with pytest.raises(TaskFailed, match="ValueError: broken"):
            tester.drain()
        breaks.add_task()
        (failed,) = tester.drain(check=False)
        assert failed.error == "ValueError: broken"
    finally:
        del blocking_app.definitions["breaks"]


def test_ctrl_c_in_a_task_ends_the_test(tester: SyncTester) -> None:
    @blocking_app.task("interrupted")
    def interrupted() -> None:
        raise KeyboardInterrupt

    try:
        interrupted.add_task()
        with pytest.raises(KeyboardInterrupt):
            tester.drain()
    finally:
        del blocking_app.definitions["interrupted"]


def test_a_worker_for_code_that_waits(tester: SyncTester) -> None:
    with tester.worker():
        assert stamp.add_task("a", timeout=120).returning == "a"
    assert tester.drain() == []


def test_a_blocking_test_of_an_async_app() -> None:
    with SyncTester(app) as tester:
        asyncio.run(_enqueue())
        assert tester.enqueued(child, args=[1])
        (done,) = tester.drain()
        assert done.returning == 2


async def _enqueue() -> None:
    await child.add_task(1)


async def test_it_refuses_to_block_a_loop(tester: SyncTester) -> None:
    for run in (tester.drain, tester.run_one):
        with pytest.raises(RuntimeError, match="use AsyncTester"):
            run()
