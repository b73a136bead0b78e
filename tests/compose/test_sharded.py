"""Shards: where tasks go, what a new shard moves, and one that is drained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks import Task
from qtasks.asyncio import QueueTasks
from qtasks.compose import ShardedBroker
from qtasks_core import QueueDepth, TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker
from qtasks_memory import MemoryBroker
from tests.processes import PATIENCE

MANY = 4000


async def places_of(shards: dict[str, MemoryBroker], uuids: list[str]) -> dict[str, str]:
    """Publish messages, and return the shard of each."""
    broker = ShardedBroker(shards)
    await broker.start(uuid4().hex)
    await broker.publish([TaskMessage(uuid=uuid, task_name="t", queue="q") for uuid in uuids])
    places: dict[str, str] = {}
    for name, shard in shards.items():
        subscription = await shard.subscribe({"q": MANY})
        for delivery in await subscription.receive({"q": MANY}, MANY):
            assert isinstance(delivery.message, TaskMessage)
            places[delivery.message.uuid] = name
    await broker.stop()
    return places


async def test_a_new_shard_takes_its_share_and_moves_no_other_task() -> None:
    shards = {name: MemoryBroker(uuid4().hex) for name in "abcd"}
    uuids = [str(uuid4()) for _ in range(MANY)]
    before = await places_of({name: shards[name] for name in "abc"}, uuids)
    after = await places_of(shards, uuids)
    assert len(before) == len(after) == MANY
    assert {uuid for uuid in uuids if after[uuid] != before[uuid]} == {
        uuid for uuid in uuids if after[uuid] == "d"
    }
    for places, count in ((before, 3), (after, 4)):
        for number in Counter(places.values()).values():
            assert abs(number - MANY / count) < 150  # five times the standard deviation


async def test_a_shard_is_added_and_another_drained_while_the_app_works(tmp_path: Path) -> None:
    """Deployments that know different shards work beside each other, and nothing is lost."""
    one, two, three, records = (f"sqlite:///{tmp_path}/{name}.db" for name in "abcd")
    deployments = [
        ShardedBroker({"one": one, "two": two}),
        ShardedBroker({"one": one, "two": two, "three": three}),
        ShardedBroker({"one": one, "two": two, "three": three}, draining=["one"]),
    ]
    apps = [QueueTasks("shards", broker, records) for broker in deployments]

    async def add(x: int, y: int) -> int:
        if x % 10 == 0 and (x, y) not in seen:
            seen.add((x, y))
            raise ValueError("the first run of each tenth")
        return x + y

    seen: set[tuple[int, int]] = set()
    adds = [app.task(name="add", retry=1)(add) for app in apps]
    async with apps[0], apps[1], apps[2]:
        tasks: list[Task[int]] = []
        for at in range(3):
            tasks += await adds[at].map([(number, at) for number in range(40)])
            tasks.append(await adds[at].add_task(99, at, delay=0.5))
        filled = {url: resolve_broker(url) for url in (one, two, three)}
        for shard in filled.values():
            await shard.start("shards")
        assert all([(await shard.depth("default")).ready for shard in filled.values()])
        async with apps[1].worker(), apps[2].worker():
            results = [(await task.wait_result(PATIENCE)).returning for task in tasks]
        assert results == [n + at for at in range(3) for n in (*range(40), 99)]
        for shard in filled.values():
            nothing = QueueDepth(ready=0, delayed=0, in_flight=0)
            assert await shard.depth("default") == nothing
            await shard.stop()


async def test_a_draining_shard_gets_no_new_tasks() -> None:
    old, new = MemoryBroker(uuid4().hex), MemoryBroker(uuid4().hex)
    broker = ShardedBroker({"old": old, "new": new}, draining=["old"])
    await broker.start("shards")
    await broker.publish([TaskMessage(uuid=str(uuid4()), task_name="t") for _ in range(50)])
    assert [(await each.depth("default")).ready for each in (old, new)] == [0, 50]
    assert (await broker.depth("default")).ready == 50
    assert await broker.purge("default") == 50
    await broker.stop()


def test_it_guarantees_what_holds_for_a_whole_queue() -> None:
    told = ShardedBroker({"a": MemoryBroker("a"), "b": MemoryBroker("b")}).guarantees
    assert (told.order, told.priorities, told.atomic_retries) == ("none", False, True)


def test_wrong_shards_are_named() -> None:
    with pytest.raises(ConfigurationError, match="the same broker"):
        ShardedBroker({"a": "memory://", "b": "memory://"})
    with pytest.raises(ConfigurationError, match=r"draining=\['c'\] names no shard"):
        ShardedBroker({"a": "memory://"}, draining=["c"])
    with pytest.raises(ConfigurationError, match="no shard gets new tasks"):
        ShardedBroker({"a": "memory://"}, draining=["a"])
    with pytest.raises(ConfigurationError, match="no shard gets new tasks"):
        ShardedBroker({})
