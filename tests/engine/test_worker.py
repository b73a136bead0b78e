"""A worker's life: stopping, giving back, losing leases, meeting what it does not know."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from msgspec.structs import replace

from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import message_of
from qtasks.worker import consumer
from qtasks_core import Delivery, Raw, TaskMessage, TaskQuery
from qtasks_core.errors import Unavailable
from qtasks_memory import MemoryBroker, MemoryStorage


async def test_stopping_lets_running_tasks_finish(app: QueueTasks) -> None:
    begun = asyncio.Event()

    @app.task()
    async def slow() -> str:
        begun.set()
        await asyncio.sleep(0.3)
        return "finished"

    async with app:
        async with app.worker():
            task = await slow.add_task()
            await begun.wait()
        found = await app.get_task(task.uuid)
        assert found is not None
        assert found.returning == "finished"


async def test_past_the_grace_period_tasks_go_back_and_run_elsewhere(app: QueueTasks) -> None:
    begun = asyncio.Event()
    runs: list[str] = []

    @app.task()
    async def slow() -> str:
        runs.append("run")
        begun.set()
        if len(runs) == 1:
            await asyncio.sleep(60)
        return "second run"

    async with app:
        async with app.worker(grace=0.05):
            task = await slow.add_task()
            await begun.wait()
        async with app.worker():
            # Well before the lease, which is 1 s: it was released, not left to run out.
            done = await task.wait_result(0.7)
        assert (done.returning, done.attempt) == ("second run", 1)


async def test_a_full_worker_takes_no_more_than_it_can_run(app: QueueTasks) -> None:
    running, most = 0, 0

    @app.task()
    async def busy() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    async with app.worker(concurrency=5):
        tasks = await busy.map([()] * 60)
        await asyncio.gather(*(task.wait_result(120) for task in tasks))
    assert most == 5


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/tasks.db"])
@pytest.mark.parametrize("concurrency", [1, 10])
async def test_no_queue_waits_for_the_backlog_of_another(
    tmp_path: Path, url: str, concurrency: int
) -> None:
    app = QueueTasks(f"queues-{uuid4().hex[:8]}", url.format(tmp_path))
    order: list[str] = []

    @app.task()
    async def note(queue: str) -> None:
        order.append(queue)

    async with app:
        backlog = [queue for queue in ("a", "b", "c") for _ in range(100)]
        await app.submit_all([note.call(queue).message(app, queue=queue) for queue in backlog])
        async with app.worker(queues=["a", "b", "c"], concurrency=concurrency):
            async with asyncio.timeout(120):
                while len(order) < 300:  # noqa: ASYNC110  # the tasks run in this loop
                    await asyncio.sleep(0.01)
    first = Counter(order[:60])
    assert set(first) == {"a", "b", "c"}
    assert min(first.values()) >= 10


async def test_a_long_task_keeps_its_lease(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task()
    async def long() -> str:
        runs.append(1)
        await asyncio.sleep(2.5)
        return "once"

    async with app.worker(), app.worker():
        assert (await long.add_task(timeout=120)).returning == "once"
    assert len(runs) == 1


async def test_an_unknown_task_is_put_back_and_at_last_dead(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(consumer, "UNKNOWN_DELAY", 0.01)
    monkeypatch.setattr(consumer, "UNKNOWN_TRIES", 3)

    @app.task()
    async def known() -> str:
        return "known"

    async with app:
        await app.submit(TaskMessage(uuid="u", task_name="nobody.knows"), None)
        rest = await known.map([()] * 20)
        async with app.worker(concurrency=1):
            record = await app.wait("u", 5)
            assert [(await task.wait_result(120)).returning for task in rest] == ["known"] * 20
    assert (record.status, record.dead) == ("error", "unknown task")
    assert record.error == "no worker knows 'nobody.knows'"
    assert caplog.messages == [
        # Once, not each time.
        "unknown task nobody.knows u; put back: another program may use the name "
        f'"{app.name}", or a deployment is under way',
        "task nobody.knows u is dead: no worker knows 'nobody.knows' (unknown task)",
    ]


async def test_an_unknown_task_runs_once_a_worker_knows_it(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "UNKNOWN_DELAY", 0.05)
    newer = QueueTasks(app.name, "memory://?lease=1")

    @newer.task(name="later")
    async def later() -> str:
        return "known now"

    async with newer:
        async with app.worker():
            task = await later.add_task()
            await asyncio.sleep(0.1)
        async with newer.worker():
            assert (await task.wait_result(120)).returning == "known now"


async def test_an_expired_task_does_not_start(
    app: QueueTasks, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []

    @app.task()
    async def late() -> None:
        runs.append(1)

    async with app:
        message = message_of(app, app.definition(late.name), (), {})
        await app.submit(replace(message, expires_at=message.created_at - 1), None)
        async with app.worker():
            record = await app.wait(message.uuid, 5)
    assert (record.status, record.dead, runs) == ("error", "expired", [])
    assert f"task {late.name} {message.uuid} is dead: expired" in caplog.text


class Garbled(MemoryBroker):
    """Delivers one message as bytes that nobody can read."""

    async def subscribe(self, queues):  # type: ignore[no-untyped-def]
        subscription = await super().subscribe(queues)
        receive = subscription.receive

        async def garble(wanted, limit):  # type: ignore[no-untyped-def]
            deliveries: Sequence[Delivery] = await receive(wanted, limit)
            return [
                Delivery(Raw(b"\xff\x00", "no message"), d.queue, d.fence, d.count)
                if isinstance(d.message, TaskMessage) and d.message.uuid == "garbled"
                else d
                for d in deliveries
            ]

        subscription.receive = garble  # type: ignore[method-assign]
        return subscription


async def test_what_cannot_be_decoded_is_kept_and_the_rest_goes_on() -> None:
    storage = MemoryStorage("garbled")
    app = QueueTasks("garbled", Garbled("garbled"), storage)

    @app.task()
    async def fine() -> str:
        return "fine"

    async with app.worker():
        await app.submit(TaskMessage(uuid="garbled", task_name="x"), None)
        assert (await fine.add_task(timeout=120)).returning == "fine"
        kept = (await storage.query(TaskQuery(dead=True))).tasks
    assert [(r.args, r.error, r.dead) for r in kept] == [(b"\xff\x00", "no message", "undecodable")]


class Flaky(MemoryStorage):
    """Fails each method twice before it works.

    Counted apart: a submit that is tried again wakes the worker, whose reads would otherwise bring
    the count back to where the submit fails again, each time.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._calls: Counter[str] = Counter()

    def _fail(self, method: str) -> None:
        self._calls[method] += 1
        if self._calls[method] % 3:
            raise Unavailable("the storage is out of reach")

    async def save(self, tasks, transaction=None):  # type: ignore[no-untyped-def]
        self._fail("save")
        return await super().save(tasks)

    async def get(self, uuids):  # type: ignore[no-untyped-def]
        self._fail("get")
        return await super().get(uuids)


async def test_a_server_that_comes_and_goes_loses_nothing() -> None:
    app = QueueTasks("flaky", MemoryBroker("flaky"), Flaky("flaky"))

    @app.task()
    async def add(x: int) -> int:
        return x + 1

    async with app.worker():
        tasks = await add.map([(n,) for n in range(20)])
        done = await asyncio.gather(*(task.wait_result(120) for task in tasks))
    assert [task.returning for task in done] == list(range(1, 21))


async def test_a_function_that_exits_or_cancels_itself_only_fails_its_task(
    app: QueueTasks,
) -> None:
    @app.task()
    async def leave() -> None:
        raise SystemExit(3)

    @app.task()
    async def cancel() -> None:
        raise asyncio.CancelledError

    @app.task()
    def leave_thread() -> None:
        raise SystemExit(4)

    async with app.worker():
        for task in (leave, cancel, leave_thread):
            assert (await task.add_task(timeout=120)).status == "error"


async def test_a_function_that_is_cancelled_with_its_loop_runs_again_elsewhere(
    app: QueueTasks,
) -> None:
    """As an interrupted host's loop is closed, all its tasks are cancelled: no end of theirs."""
    begun = asyncio.Event()
    runs: list[int] = []

    @app.task()
    async def slow() -> int:
        runs.append(1)
        begun.set()
        if len(runs) == 1:
            await asyncio.sleep(60)
        return len(runs)

    async with app.worker():
        task = await slow.add_task()
        await begun.wait()
        for one in asyncio.all_tasks():
            if "Runner._run" in repr(one):
                one.cancel()
        done = await task.wait_result(120)
    assert (done.status, done.returning, done.attempt) == ("success", 2, 1)


async def test_a_task_that_is_declared_while_the_worker_runs(app: QueueTasks) -> None:
    async with app.worker():

        @app.task()
        async def late() -> str:
            return "in time"

        assert (await late.add_task(timeout=120)).returning == "in time"


async def test_a_plain_function_that_raises_stop_iteration_fails(app: QueueTasks) -> None:
    """Which no future can hold: it would never end."""

    @app.task()
    def first(items: list[int]) -> int:
        return next(iter(items))

    async with app.worker():
        task = await first.add_task([], timeout=120)
    assert task.error is not None
    assert "StopIteration" in task.error


@pytest.mark.parametrize("cancels", [1, 2])
async def test_cancelling_a_stop_gives_back_at_once(cancels: int) -> None:
    """The first cancel begins the stop, or comes while the block stops by itself."""
    app = QueueTasks(f"engine-{uuid4().hex[:8]}", "memory://?lease=600")
    begun, runs = asyncio.Event(), 0

    @app.task()
    async def slow() -> int:
        nonlocal runs
        runs += 1
        if runs == 1:
            begun.set()
            await asyncio.sleep(60)
        return runs

    async def work() -> None:
        async with app.worker(grace=None):
            await begun.wait()
            if cancels > 1:
                await asyncio.sleep(60)

    async with app:
        task = await slow.add_task()
        working = asyncio.create_task(work())
        await begun.wait()
        for _ in range(cancels):
            await asyncio.sleep(0.05)
            assert not working.done()
            working.cancel()
        await asyncio.sleep(0)
        working.cancel()  # one too many changes nothing
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(working, 60)
        async with app.worker():
            # Long before the lease is over: it was released.
            assert (await task.wait_result(60)).returning == 2


async def test_a_worker_without_tasks_says_what_was_forgotten(
    app: QueueTasks, caplog: pytest.LogCaptureFixture
) -> None:
    async with app.worker():
        pass
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "has no tasks" in warning
    assert "include_router" in warning
