"""AsyncTester, with an app whose own broker is a server that does not exist."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from decimal import Decimal
from uuid import uuid4

import pytest

from qtasks import QueueTasks, TaskFailed, UnknownTask, control
from qtasks.testing import AsyncTester
from qtasks_core.errors import Closed, ConfigurationError
from qtasks_memory.connection import _memories
from tests.processes import until
from tests.testing import shop
from tests.testing.shop import (
    Order,
    again,
    app,
    child,
    flaky,
    parent,
    place,
    plain,
    rejected,
    send_mail,
    sent,
    wrong,
)


@pytest.fixture
def tester() -> Iterator[AsyncTester]:
    with AsyncTester(app) as tester:
        yield tester


async def test_nothing_runs_before_drain_and_then_all_does(tester: AsyncTester) -> None:
    order = Order("tea", Decimal("4.50"), [])
    task = await place.add_task(order)
    assert tester.enqueued(place, args=[order])
    assert not sent
    placed, mail = await tester.drain()
    assert placed.uuid == task.uuid
    assert placed.returning == Order("tea", Decimal("4.50"), ["placed"])
    assert order.notes == [], "the function gets a decoded copy"
    assert (mail.task_name, mail.returning) == (send_mail.name, len("tea"))
    assert sent == ["ann@example.com"]
    assert (await task.wait_result(timeout=120)).returning.notes == ["placed"]
    assert await tester.drain() == []


async def test_enqueued_narrows_by_each_option(tester: AsyncTester) -> None:
    await send_mail.add_task("ann", delay=3600)
    await send_mail.add_task(address="bob", text="hi", queue="other", priority=1)
    await send_mail.add_task("bob", key="order 7")
    await child.add_task(1)
    assert len(tester.enqueued()) == 4
    assert [call.args for call in tester.enqueued(send_mail)] == [("ann",), (), ("bob",)]
    assert [call.kwargs for call in tester.enqueued(queue="other")] == [
        {"address": "bob", "text": "hi"}
    ]
    ((ann),) = tester.enqueued(send_mail, delay=3600)
    assert (ann.args, ann.queue, ann.priority, ann.delay) == (("ann",), "mail", 7, 3600)
    assert len(tester.enqueued(send_mail, priority=1)) == 1
    assert len(tester.enqueued(send_mail, key="order 7")) == 1
    assert not tester.enqueued(send_mail, key="order 8")
    assert len(tester.enqueued(send_mail.name)) == 3
    assert not tester.enqueued("nothing")
    with pytest.raises(TypeError, match="key= needs the task"):
        tester.enqueued(key="order 7")


async def test_arguments_are_compared_as_the_function_receives_them(tester: AsyncTester) -> None:
    await send_mail.add_task(text="hello", address="ann")
    assert tester.enqueued(send_mail, args=["ann"]), "the default of text is hello"
    assert tester.enqueued(send_mail, args=("ann", "hello"))
    assert tester.enqueued(send_mail, kwargs={"address": "ann"})
    assert tester.enqueued(send_mail.name, args=["ann"])
    assert not tester.enqueued(send_mail, args=["ann", "bye"])
    with pytest.raises(TypeError, match="missing a required argument: 'address'"):
        tester.enqueued(send_mail, args=[])
    by = uuid4()
    await place.add_task(Order("tea", Decimal("1"), []), by=by)
    assert tester.enqueued(place, args=[Order("tea", Decimal("1"), [])], kwargs={"by": by})


async def test_a_failed_assertion_shows_what_was_enqueued(tester: AsyncTester) -> None:
    assert repr(tester.enqueued(send_mail)) == "[] (enqueued: nothing)"
    await send_mail.add_task("ann", text="hi")
    shown = f"{send_mail.name}('ann', text='hi') with queue='mail', priority=7, delay=0"
    assert repr(tester.enqueued(send_mail, args=["bob"])) == f"[] (enqueued: {shown})"
    assert repr(tester.enqueued(send_mail)) == f"[{shown}]"
    assert tester.enqueued(send_mail, args=["bob"]) == []


async def test_many_at_once_and_a_key(tester: AsyncTester) -> None:
    await child.map([(1,), (2,)])
    await app.add_tasks([child.call(3)])
    first = await child.add_task(4, key="four")
    second = await child.add_task(5, key="four")
    assert first.uuid == second.uuid
    assert [call.args for call in tester.enqueued(child)] == [(1,), (2,), (3,), (4,)]
    assert [task.returning for task in await tester.drain()] == [2, 3, 4, 5]


async def test_a_key_twice_in_one_batch(tester: AsyncTester) -> None:
    both = await asyncio.gather(*(child.add_task(at, key="once") for at in (1, 2)))
    assert both[0].uuid == both[1].uuid
    (call,) = tester.enqueued(child)
    (done,) = await tester.drain()
    assert done.returning == call.args[0] + 1


async def test_run_one_runs_one_the_higher_priority_first(tester: AsyncTester) -> None:
    low = await child.add_task(1, priority=0)
    high = await child.add_task(2, priority=9)
    ran = await tester.run_one()
    assert ran is not None
    assert (ran.uuid, ran.returning) == (high.uuid, 3)
    now = await app.get_task(low.uuid)
    assert now is not None
    assert now.status == "new"
    ran = await tester.run_one()
    assert ran is not None
    assert ran.uuid == low.uuid
    assert await tester.run_one() is None


async def test_run_one_skips_a_cancelled_task(tester: AsyncTester) -> None:
    cancelled = await child.add_task(1)
    await child.add_task(2)
    assert await app.cancel(cancelled.uuid)
    ran = await tester.run_one()
    assert ran is not None
    assert ran.returning == 3
    assert await tester.run_one() is None


async def test_queues_go_in_the_order_of_their_oldest_task(tester: AsyncTester) -> None:
    for at in range(6):
        await send_mail.add_task(f"{at}", queue="zebra" if at % 2 else "ant")
    await tester.drain()
    assert sent == ["0", "1", "2", "3", "4", "5"]


async def test_a_delay_passes_by_travel_only(tester: AsyncTester) -> None:
    await send_mail.add_task("ann", delay=3600)
    await send_mail.add_task("bob", delay=0.001)
    await asyncio.sleep(0.01)
    assert await tester.drain() == []
    tester.travel(0.001)
    await tester.drain()
    tester.travel(3598)
    assert await tester.run_one() is None
    assert sent == ["bob"]
    tester.travel(1.999)
    await tester.drain()
    assert sent == ["bob", "ann"]


async def test_steps_that_floats_cannot_add_still_arrive(tester: AsyncTester) -> None:
    await send_mail.add_task("ann", delay=0.3)
    tester.travel(0.1)
    tester.travel(0.2)
    await tester.drain()
    assert sent == ["ann"]


async def test_time_goes_ahead_only(tester: AsyncTester) -> None:
    for wrong_step in (-1, float("nan")):
        with pytest.raises(ValueError, match="only goes ahead"):
            tester.travel(wrong_step)


async def test_retries_come_by_travel(tester: AsyncTester) -> None:
    await again.add_task(60)
    (first,) = await tester.drain()
    assert (first.status, first.attempt) == ("retry", 1)
    tester.travel(59)
    assert await tester.drain() == []
    tester.travel(1)
    await tester.drain()
    tester.travel(60)
    (last,) = await tester.drain()
    assert (last.returning, last.attempt) == ("done", 3)
    assert len(tester.enqueued()) == 1, "a retry is not a new call"


async def test_retries_after_errors_with_backoff(tester: AsyncTester) -> None:
    task = await flaky.add_task(3)
    for _ in range(3):
        await tester.drain()
        tester.travel(3600)
    assert (await task.wait_result(timeout=120)).returning == "after 3"


async def test_errors_are_raised_with_their_tracebacks(tester: AsyncTester) -> None:
    await wrong.add_task("first")
    await child.add_task(1)
    await rejected.add_task()
    with pytest.raises(TaskFailed, match="ValueError: first") as failed:
        await tester.drain()
    assert "raise ValueError(text)" in str(failed.value)
    assert "no such order" in failed.value.__notes__[0]
    await wrong.add_task("second")
    with pytest.raises(TaskFailed, match="second"):
        await tester.run_one()


async def test_without_check_errors_are_in_the_answer(tester: AsyncTester) -> None:
    await wrong.add_task("first")
    await child.add_task(1)
    failed, done = await tester.drain(check=False)
    assert (failed.status, failed.error) == ("error", "ValueError: first")
    assert done.returning == 2
    await wrong.add_task("second")
    ran = await tester.run_one(check=False)
    assert ran is not None
    assert ran.error == "ValueError: second"


async def test_all_retries_fail(tester: AsyncTester) -> None:
    await flaky.add_task(100)
    for _ in range(3):
        await tester.drain()
        tester.travel(3600)
    with pytest.raises(TaskFailed, match="busy"):
        await tester.drain()
    assert len(sent) == 4


async def test_a_task_that_waits_for_another(tester: AsyncTester) -> None:
    await parent.add_task(1)
    inner, outer = await tester.drain(concurrency=2)
    assert (inner.returning, outer.returning) == (2, 20)


async def test_an_ordinary_worker_for_code_that_waits(tester: AsyncTester) -> None:
    async with app.worker():
        assert (await parent.add_task(1, timeout=120)).returning == 20
    assert await tester.drain() == []


async def test_code_that_waits_while_the_test_drains(tester: AsyncTester) -> None:
    waiting = asyncio.create_task(child.add_task(1, timeout=120))
    await asyncio.to_thread(until, lambda: bool(tester.enqueued(child)), "the call")
    await tester.drain()
    assert (await waiting).returning == 2


async def test_plain_functions_run_in_threads(tester: AsyncTester) -> None:
    await plain.add_task("a")
    (task,) = await tester.drain()
    assert task.returning == "A"
    assert shop.threads
    assert shop.threads[0] != threading.get_ident()


async def test_expires_and_retention_follow_the_same_clock(tester: AsyncTester) -> None:
    await send_mail.add_task("early", expires=60)
    await tester.drain()
    late = await send_mail.add_task("late", expires=60)
    tester.travel(60)
    with pytest.raises(TaskFailed, match="expired"):
        await tester.drain()
    assert sent == ["early"]
    assert await app.get_task(late.uuid) is not None
    tester.travel(3600 * 24 * 365 * 10)
    fresh = await child.add_task(1)
    await tester.drain()
    assert await app.get_task(late.uuid) is None
    assert (await fresh.wait_result(timeout=120)).returning == 2


async def test_a_task_of_another_program(tester: AsyncTester) -> None:
    other = QueueTasks("other", shop.NOWHERE)

    @other.task("elsewhere")
    def elsewhere() -> None: ...

    call = elsewhere.call()
    await app.submit_all([call.message(app)])
    await child.add_task(1)
    assert tester.enqueued("elsewhere")
    with pytest.raises(UnknownTask, match="knows no task elsewhere"):
        await tester.drain()
    (mine,) = tester.enqueued(child)
    done = await app.get_task(mine.uuid)
    assert done is not None
    assert done.returning == 2


async def test_a_queue_that_only_a_running_task_uses(tester: AsyncTester) -> None:
    @app.task("hop")
    async def hop(left: int) -> None:
        sent.append(f"hop {left}")
        if left:
            await hop.using(app).add_task(left - 1, queue=f"hop-{left}")

    try:
        await hop.add_task(3)
        await tester.drain()
    finally:
        del app.definitions["hop"]
    assert sent == ["hop 3", "hop 2", "hop 1", "hop 0"]


async def test_a_purged_queue_has_nothing_due(tester: AsyncTester) -> None:
    await child.add_task(1)
    assert await app.control(control.purge, "default") == 1
    assert await tester.drain() == []


async def test_drain_can_be_given_up(tester: AsyncTester) -> None:
    started = asyncio.Event()

    @app.task("endless")
    async def endless() -> None:
        started.set()
        await asyncio.Event().wait()

    try:
        await endless.add_task()
        draining = asyncio.create_task(tester.drain())
        await started.wait()
        draining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await draining
        await app.control(control.purge, "default")
        await child.add_task(1)
        (done,) = await tester.drain()
        assert done.returning == 2
    finally:
        del app.definitions["endless"]


def test_the_app_is_as_it_was() -> None:
    before = app.name, app.broker, app.storage, app.addresses()
    uuids = []
    for _ in range(2):
        with AsyncTester(app) as tester:
            assert app.name.startswith("shop-")
            assert app.addresses()[0] == "MemoryBroker"
            assert not tester.enqueued()
            record = app.submit(child.call(1).message(app), None).result()
            uuids.append(record.uuid)
            assert [app.get(uuid).result() is not None for uuid in uuids] == (
                [True] if len(uuids) == 1 else [False, True]
            )
        assert (app.name, app.broker, app.storage, app.addresses()) == before
    with pytest.raises(Closed, match="the app 'shop' is not started"):
        app.get(uuids[0]).result()


def test_a_test_that_forgets_to_stop_the_app_leaks_nothing() -> None:
    with AsyncTester(app):
        app.connect().result()
        app.connect().result()
    with AsyncTester(app) as tester:
        assert not tester.enqueued()


def test_the_memory_of_a_test_is_let_go() -> None:
    before = len(_memories)
    for _ in range(3):
        with AsyncTester(app):
            pass
    assert len(_memories) == before


async def test_a_started_app_cannot_be_isolated() -> None:
    with (
        AsyncTester(app),
        pytest.raises(ConfigurationError, match="is started"),
        AsyncTester(app),
    ):
        pass  # never entered
    with AsyncTester(app) as tester:
        await child.add_task(1)
        assert await tester.run_one()


async def test_two_apps_at_once() -> None:
    with AsyncTester(app) as shop_tester, AsyncTester(shop.blocking_app) as office:
        await child.add_task(1)
        assert len(shop_tester.enqueued()) == 1
        assert not office.enqueued()
        assert await office.drain() == []
        assert len(await shop_tester.drain()) == 1
