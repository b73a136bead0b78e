"""The queue that a call goes to: by a key, in turns, the emptiest, or by a policy of one's own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtasks import control
from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import AsyncTask
from qtasks.routes import KeyHash, LeastDepth, RoundRobin
from qtasks_core import RoutePolicy
from qtasks_core.errors import ConfigurationError, SignatureMismatch
from tests.pairs import SERVERS, pair_of

QUEUES = ["q-0", "q-1", "q-2"]
WAIT = 120.0
MANY = 40

keys = st.one_of(st.text(), st.integers(), st.binary(), st.uuids())


@pytest.fixture
def app() -> QueueTasks:
    return QueueTasks(f"routes-{uuid4().hex[:8]}", "memory://")


def declare(app: QueueTasks, queue: str | RoutePolicy) -> AsyncTask[..., Any, Any]:
    @app.task(name="work", queue=queue)
    async def work(tenant: Any = "none", page: int = 0) -> None:
        """Do nothing."""

    return work


async def sent(app: QueueTasks, task: AsyncTask[..., Any, Any], calls: list[Any]) -> list[str]:
    """Return the queues to which calls go."""
    async with app:
        return [(await task.add_task(tenant)).queue for tenant in calls]


@given(keys)
def test_a_key_has_one_queue_until_one_is_added(key: str | int | bytes | UUID) -> None:
    arguments = {"tenant": key}
    before = KeyHash("tenant", QUEUES).choose(arguments, {})
    assert before == KeyHash("tenant", reversed(QUEUES)).choose(arguments, {})
    after = KeyHash("tenant", [*QUEUES, "new"]).choose(arguments, {})
    assert after in (before, "new")


def test_keys_are_spread_evenly() -> None:
    policy = KeyHash("tenant", QUEUES)
    counts = Counter(policy.choose({"tenant": f"tenant {n}"}, {}) for n in range(3000))
    assert counts.keys() == set(QUEUES)
    assert min(counts.values()) > 900


async def test_calls_of_a_key_go_to_one_queue(app: QueueTasks) -> None:
    task = declare(app, KeyHash("tenant", QUEUES))
    first = await sent(app, task, ["a", "b", "c", "d", "e", "f"])
    assert first == await sent(app, task, ["a", "b", "c", "d", "e", "f"])
    assert len(set(first)) > 1


async def test_a_default_is_a_key_too(app: QueueTasks) -> None:
    task = declare(app, KeyHash("tenant", QUEUES))
    async with app:
        given = await task.add_task("none")
        left_out = await task.add_task()
        assert given.queue == left_out.queue


async def test_a_value_that_is_no_key_is_named(app: QueueTasks) -> None:
    task = declare(app, KeyHash("tenant", QUEUES))
    async with app:
        with pytest.raises(SignatureMismatch, match=r"KeyHash\('tenant', …\): list is no text"):
            await task.add_task(["a"])


def test_a_parameter_that_the_function_lacks_is_named(app: QueueTasks) -> None:
    with pytest.raises(ConfigurationError, match="no such parameter, but tenant, page"):
        declare(app, KeyHash("customer", QUEUES))


@pytest.mark.parametrize("queues", [[], ["a", ""], ["a", "b/\0"]])
@pytest.mark.parametrize("policy", [RoundRobin, LeastDepth])
def test_wrong_queues_are_refused(policy: type[RoundRobin], queues: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        policy(queues)


async def test_calls_take_turns(app: QueueTasks) -> None:
    task = declare(app, RoundRobin(QUEUES))
    assert await sent(app, task, [0] * 7) == [*QUEUES, *QUEUES, QUEUES[0]]


async def test_a_queue_that_is_given_to_the_call_goes_first(app: QueueTasks) -> None:
    task = declare(app, RoundRobin(QUEUES))
    async with app:
        assert (await task.add_task(queue="mine")).queue == "mine"


async def test_a_worker_receives_from_all_queues_of_a_policy(app: QueueTasks) -> None:
    task = declare(app, RoundRobin(QUEUES))
    async with app, app.worker():
        tasks = await task.map([(n,) for n in range(6)])
        for each in tasks:
            assert (await each.wait_result(WAIT)).status == "success"


class Elsewhere(RoutePolicy):
    """Chooses a queue that it does not name."""

    @property
    def queues(self) -> Sequence[str]:
        return ["here"]

    def choose(self, arguments: Mapping[str, Any], depths: Mapping[str, int]) -> str:
        return "elsewhere"


async def test_a_queue_that_the_policy_does_not_name_is_refused(app: QueueTasks) -> None:
    """No worker would receive from it."""
    task = declare(app, Elsewhere())
    async with app:
        with pytest.raises(ConfigurationError, match="Elsewhere has chosen the queue 'elsewhere'"):
            await task.add_task()
        assert (await app.control(control.depths, ["elsewhere"]))["elsewhere"].ready == 0


@given(st.dictionaries(st.sampled_from(QUEUES), st.integers(0, 3)).map(Counter))
def test_the_emptiest_queue_is_chosen_in_turns(depths: Counter[str]) -> None:
    policy, numbers = LeastDepth(QUEUES), {queue: depths[queue] for queue in QUEUES}
    least = [queue for queue in QUEUES if numbers[queue] == min(numbers.values())]
    came = {policy.choose({}, numbers) for _ in range(len(QUEUES))}
    assert came == set(least)


@pytest.fixture(params=["memory", "sqlite", *SERVERS])
def on_each(request: pytest.FixtureRequest, tmp_path: Path) -> QueueTasks:
    pair = pair_of(request, request.param, tmp_path)
    return QueueTasks(f"depths-{uuid4().hex[:8]}", pair.broker, pair.storage)


async def test_calls_go_where_the_fewest_wait(on_each: QueueTasks) -> None:
    """Another program has filled a queue: from when its length is known, the others get all calls.

    Until then, each queue gets every third call.
    """
    app = on_each
    full, *others = QUEUES
    task = declare(app, LeastDepth(QUEUES))
    async with app:
        for _ in range(MANY):
            await task.add_task(queue=full)
        passed: list[str] = []
        async with asyncio.timeout(WAIT):
            while len(passed) < MANY / 2:
                queue = (await task.add_task()).queue
                passed = [] if queue == full else [*passed, queue]
    counts = Counter(passed)
    assert min(counts[queue] for queue in others) >= MANY / 8
