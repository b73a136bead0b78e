"""How a worker shares its slots among queues: strictly, fairly, or by a balancer of one's own."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtasks import Task
from qtasks.asyncio import QueueTasks
from qtasks.balancers import Greedy, Strict, WeightedFair
from qtasks_core import Balancer
from qtasks_core.errors import ConfigurationError
from tests.pairs import SERVERS, pair_of

FLOOD = 300
FEW = 15
CONCURRENCY = 2
WAIT = 120.0
QUEUES = ["flood", "few"]

running = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 50), min_size=1)
weights = st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 100))


@given(running, st.integers(1, 100), weights)
def test_every_balancer_asks_every_queue_for_something(
    running: dict[str, int], free: int, weights: dict[str, float]
) -> None:
    """Else a slot stays free although there is a task for it."""
    for balancer in (Greedy(), Strict(), WeightedFair(weights)):
        wanted = balancer.wanted(free, running)
        assert wanted.keys() == running.keys()
        assert all(1 <= most <= free for most in wanted.values())


@given(weights.filter(lambda weights: len(weights) > 1), st.integers(1, 200))
def test_backlogs_get_slots_by_their_weights(weights: dict[str, float], concurrency: int) -> None:
    """Each queue always has tasks, and one task after the other ends."""
    balancer = WeightedFair(weights)
    running = dict.fromkeys(weights, 0)
    while (free := concurrency - sum(running.values())) > 0:
        for queue, most in balancer.wanted(free, running).items():
            taken = min(most, concurrency - sum(running.values()))
            running[queue] += taken
    for queue, weight in weights.items():
        share = concurrency * weight / sum(weights.values())
        assert running[queue] <= share + len(weights)
        assert running[queue] >= share - len(weights)


@given(st.integers(1, 30), st.integers(1, 20))
def test_tasks_start_in_proportion(concurrency: int, weight: int) -> None:
    """Also with fewer slots than the weights would need at once."""
    balancer = WeightedFair({"a": weight, "b": 1})
    running, started = {"a": 0, "b": 0}, Counter[str]()
    ends: list[str] = []
    for _ in range(30 * (weight + 1)):
        left = concurrency - len(ends)
        for queue, most in balancer.wanted(left, running).items():
            count = min(most, concurrency - len(ends))
            running[queue] += count
            started[queue] += count
            ends += [queue] * count
        running[ends.pop(0)] -= 1
    assert abs(started["a"] - weight * started["b"]) <= 2 * weight + 2 + concurrency


def test_a_queue_of_long_tasks_gets_no_more_than_its_share() -> None:
    """Its tasks never end, and those of the other queue at once."""
    balancer, running = WeightedFair(), {"long": 0, "short": 0}
    for _ in range(50):
        for queue, most in balancer.wanted(10 - running["long"], running).items():
            running[queue] += min(most, 10 - sum(running.values()))
        running["short"] = 0
    assert running["long"] == 6


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(ConfigurationError, match=r"weight of 'paid' is .*: it must be above 0"):
        WeightedFair({"paid": weight})


async def order_of(app: QueueTasks, balancer: Balancer) -> list[str]:
    """Return the queues of all tasks in the order in which they started."""
    started: list[str] = []

    async def work(sent_to: str) -> None:
        started.append(sent_to)
        await asyncio.sleep(0)

    task = app.task(name="work")(work)
    async with app:
        tasks: list[Task[Any]] = []
        for queue, count in (("flood", FLOOD), ("few", FEW)):
            tasks += [await task.add_task(queue, queue=queue) for _ in range(count)]
        async with app.worker(queues=QUEUES, concurrency=CONCURRENCY, balancer=balancer):
            for each in tasks:
                await each.wait_result(WAIT)
    assert Counter(started) == {"flood": FLOOD, "few": FEW}
    return started


def before_the_last_of_few(started: list[str]) -> int:
    """Return how many tasks of the flood started before the few were done."""
    last = len(started) - list(reversed(started)).index("few")
    return started[:last].count("flood")


# Kafka and RabbitMQ fetch messages of all queues ahead.
STRICT = ("memory", "sqlite", "redis", "postgres")
SLOW = [pytest.param(name, marks=pytest.mark.full) for name in ("rabbitmq", "kafka")]


@pytest.fixture(params=["memory", "sqlite", *SERVERS])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> QueueTasks:
    pair = pair_of(request, request.param, tmp_path)
    return QueueTasks(f"fair-{uuid4().hex[:8]}", pair.broker, pair.storage)


async def test_a_flood_does_not_starve_another_queue(app: QueueTasks) -> None:
    """With equal weights, both queues get the same number of tasks while both have some."""
    started = await order_of(app, WeightedFair())
    print(f"{before_the_last_of_few(started)} of the flood before the last of {FEW}")
    assert before_the_last_of_few(started) <= 3 * FEW


@pytest.mark.parametrize("app", [*STRICT, *SLOW], indirect=True)
async def test_a_weight_gives_more(app: QueueTasks) -> None:
    started = await order_of(app, WeightedFair({"few": 1, "flood": 3}))
    assert FEW <= before_the_last_of_few(started) <= 6 * FEW


@pytest.mark.parametrize("app", STRICT, indirect=True)
async def test_a_strict_order_comes_first(app: QueueTasks) -> None:
    started = await order_of(app, Strict())
    assert len(list(takewhile(lambda queue: queue == "flood", started))) == FLOOD
