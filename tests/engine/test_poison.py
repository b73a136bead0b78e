"""Messages that were delivered often: they run alone, are counted, and are dead at last."""

from __future__ import annotations

import asyncio
from threading import Event

import pytest
from msgspec.structs import replace

from qtasks.asyncio import QueueTasks
from qtasks.worker import poison
from qtasks.worker.job import isolated_runs
from qtasks_core import Delivery
from qtasks_memory import MemoryBroker, MemoryStorage


class Counting(MemoryBroker):
    """Says of every message whose task is called `candidate…` that it was delivered often."""

    async def subscribe(self, queues):  # type: ignore[no-untyped-def]
        subscription = await super().subscribe(queues)
        receive = subscription.receive

        async def counted(wanted, limit):  # type: ignore[no-untyped-def]
            return [_often(delivery) for delivery in await receive(wanted, limit)]

        subscription.receive = counted  # type: ignore[method-assign]
        return subscription


def _often(delivery: Delivery) -> Delivery:
    candidate = getattr(delivery.message, "task_name", "").startswith("candidate")
    return Delivery(delivery.message, delivery.queue, delivery.fence, 3 if candidate else 1)


@pytest.fixture
def app() -> QueueTasks:
    return QueueTasks("candidates", Counting("candidates", lease=1), MemoryStorage("candidates"))


async def test_a_candidate_runs_alone_with_its_count_made_durable(app: QueueTasks) -> None:
    running: set[str] = set()
    company: dict[str, set[str]] = {}
    counts: list[int] = []

    async def run(name: str) -> None:
        company[name] = set(running)
        running.add(name)
        await asyncio.sleep(0.05)
        for other in running - {name}:
            company.setdefault(other, set()).add(name)
        running.remove(name)

    @app.task(name="neighbour")
    async def neighbour(number: int) -> None:
        await run(f"neighbour {number}")

    @app.task(name="candidate")
    async def candidate(number: int) -> None:
        record = (await app.client.storage.get([uuids[number]]))[0]
        counts.append(isolated_runs(record))
        await run(f"candidate {number}")

    async with app:
        before = await neighbour.map([(n,) for n in range(10)])
        candidates = await candidate.map([(n,) for n in range(3)])
        uuids = [task.uuid for task in candidates]
        after = await neighbour.map([(n,) for n in range(10, 20)])
        async with app.worker(concurrency=20):
            for task in [*before, *candidates, *after]:
                assert (await task.wait_result(120)).status == "success"
    assert counts == [1, 1, 1]
    assert all(not company[f"candidate {n}"] for n in range(3))
    assert any(company[f"neighbour {n}"] for n in range(20)), "neighbours run beside each other"


async def test_after_the_bound_it_is_dead(app: QueueTasks) -> None:
    runs: list[int] = []

    @app.task(name="candidate")
    async def candidate() -> None:
        runs.append(1)

    async with app:
        task = await candidate.add_task()
        storage = app.client.storage
        record = (await storage.get([task.uuid]))[0]
        assert record is not None
        await storage.save(
            [replace(record, status="process", execution="x", headers={"qtasks-lone-runs": "3"})]
        )
        async with app.worker():
            done = await task.wait_result(120)
    assert (done.status, done.dead) == ("error", "poison: its worker died 3 times running it alone")
    assert runs == []


async def test_one_that_is_given_back_is_not_counted(app: QueueTasks) -> None:
    begun = asyncio.Event()
    order: list[int] = []

    @app.task(name="candidate")
    async def candidate() -> str:
        order.append(1)
        begun.set()
        if len(order) == 1:
            await asyncio.sleep(60)
        return "fine"

    async with app:
        task = await candidate.add_task()
        waiting = await candidate.add_task()
        async with app.worker(grace=0.05):
            await begun.wait()
        for handle in (task, waiting):
            record = await app.get(handle.uuid)
            assert isolated_runs(record) == 0
        async with app.worker():
            # Both were released; neither waits for its lease of 1 s.
            assert (await task.wait_result(0.8)).returning == "fine"
            assert (await waiting.wait_result(0.8)).returning == "fine"


async def test_a_long_candidate_does_not_hold_up_the_others(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poison, "ISOLATION", 0.1)
    go_on = asyncio.Event()

    @app.task(name="candidate")
    async def candidate() -> None:
        await go_on.wait()

    @app.task(name="neighbour")
    async def neighbour() -> None: ...

    async with app, app.worker():
        long = await candidate.add_task()
        await asyncio.sleep(0.05)
        assert (await neighbour.add_task(timeout=120)).status == "success"
        go_on.set()
        assert (await long.wait_result(120)).status == "success"


async def test_a_candidate_that_is_cancelled_while_it_waits_does_not_run(app: QueueTasks) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    runs: list[int] = []

    @app.task(name="candidate")
    async def candidate(number: int) -> None:
        runs.append(number)
        begun.set()
        await go_on.wait()

    async with app, app.worker():
        first, second = await candidate.map([(1,), (2,)])
        await begun.wait()
        assert await second.cancel()
        go_on.set()
        await first.wait_result(120)
        assert (await second.wait_result(120)).status == "cancel"
    assert runs == [1]


async def test_a_long_candidate_does_not_hold_up_the_others_though_another_waits(
    app: QueueTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poison, "ISOLATION", 0.1)
    go_on = asyncio.Event()
    running: set[int] = set()

    @app.task(name="candidate")
    async def candidate(number: int) -> list[int]:
        running.add(number)
        await go_on.wait()
        running.remove(number)
        return sorted(running)

    @app.task(name="neighbour")
    async def neighbour() -> None: ...

    async with app, app.worker(grace=1):
        candidates = await candidate.map([(1,), (2,), (3,)])
        await asyncio.sleep(0.05)
        assert (await neighbour.add_task(timeout=120)).status == "success"
        assert running == {1}
        go_on.set()
        ends = [await task.wait_result(120) for task in candidates]
    assert [end.returning for end in ends] == [[], [], []]


async def test_a_candidate_whose_lease_was_lost_while_it_waited_is_left_to_who_has_it() -> None:
    lost = Event()

    class Losing(Counting):
        """Loses the lease of what waits."""

        async def subscribe(self, queues):  # type: ignore[no-untyped-def]
            subscription = await super().subscribe(queues)  # type: ignore[no-untyped-call]
            extend = subscription.extend

            async def extend_first(deliveries):  # type: ignore[no-untyped-def]
                kept = await extend(deliveries)
                if len(deliveries) == 1:
                    return kept
                lost.set()
                first = [b"\x01" in d.message.args for d in deliveries]
                return [d if is_first else None for d, is_first in zip(kept, first, strict=True)]

            subscription.extend = extend_first
            return subscription

    app = QueueTasks("losing", Losing("losing", lease=0.6), MemoryStorage("losing"))
    go_on = asyncio.Event()
    runs: list[int] = []

    @app.task(name="candidate")
    async def candidate(number: int) -> None:
        runs.append(number)
        await go_on.wait()

    async with app, app.worker(grace=1):
        first, _ = await candidate.map([(1,), (2,)])
        assert await asyncio.to_thread(lost.wait, 5)
        await asyncio.sleep(0.05)
        go_on.set()
        await first.wait_result(120)
        await asyncio.sleep(0.05)
        assert runs == [1]


async def test_a_candidate_whose_turn_comes_with_the_stop_is_given_back_uncounted() -> None:
    saving, let = Event(), Event()

    class Slow(MemoryStorage):
        async def save(self, tasks, transaction=None):  # type: ignore[no-untyped-def]
            if isolated_runs(tasks[0]) == 1:
                saving.set()
                while not let.is_set():  # noqa: ASYNC110  # set by another loop's thread
                    await asyncio.sleep(0.01)
            return await super().save(tasks, transaction)

    app = QueueTasks("turn", Counting("turn"), Slow("turn"))
    runs: list[int] = []

    @app.task(name="candidate")
    async def candidate() -> None:
        runs.append(1)

    async with app:
        task = await candidate.add_task()
        async with app.worker():
            assert await asyncio.to_thread(saving.wait, 5)
            asyncio.get_running_loop().call_later(0.1, let.set)
        assert runs == []
        assert isolated_runs(await app.get(task.uuid)) == 0
        depth = await app.client.broker.depth("default")
        assert (depth.ready, depth.in_flight) == (1, 0)
