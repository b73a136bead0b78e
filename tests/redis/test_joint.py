"""The joint composition: each step is one script, and leaves both halves or neither."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from qtasks_core import (
    DONE,
    LOST,
    Ack,
    Completion,
    Delivery,
    QueueDepth,
    Release,
    Retry,
    Task,
    TaskMessage,
)
from qtasks_core.contracts.composition import Composition
from qtasks_core.errors import Unavailable
from qtasks_core.wire import encode_message
from qtasks_redis import RedisBroker, RedisStorage, composition, connection
from qtasks_redis.composition import RedisComposition
from tests.services import Service


class Pair:
    """A broker and a storage of one namespace, and their composition."""

    def __init__(self, url: str, namespace: str, storage_url: str | None = None) -> None:
        self.broker = RedisBroker(url, lease=30.0)
        self.storage = RedisStorage(storage_url or url)
        self.namespace = namespace

    async def start(self) -> Pair:
        await self.broker.start(self.namespace)
        await self.storage.start(self.namespace)
        self.subscription = await self.broker.subscribe({"default": 100})
        return self

    async def stop(self) -> None:
        await self.broker.stop()
        await self.storage.stop()

    @property
    def joint(self) -> Composition:
        found = self.broker.join(self.storage)
        assert isinstance(found, RedisComposition)
        return found

    async def receive(self, count: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        while len(deliveries) < count:
            deliveries += await self.subscription.receive({"default": 100}, 100)
        return deliveries


@pytest.fixture
async def pair(redis_server: Service) -> AsyncIterator[Pair]:
    pair = await Pair(redis_server.url, f"joint-{uuid4().hex[:8]}").start()
    yield pair
    await pair.stop()


def message(**fields: object) -> TaskMessage:
    fields = {"created_at": time.time(), **fields}
    return TaskMessage(uuid=str(uuid4()), task_name="a", **fields)  # type: ignore[arg-type]


def end(delivery: Delivery, **fields: object) -> Task:
    told = delivery.message
    assert isinstance(told, TaskMessage)
    return end_of(told, **fields)


def end_of(told: TaskMessage, **fields: object) -> Task:
    fields = {"status": "success", "reply_to": told.reply_to, "finished_at": time.time(), **fields}
    return Task(uuid=told.uuid, task_name="a", **fields)  # type: ignore[arg-type]


async def calls(server: Redis) -> int:
    stats = await server.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))


async def test_each_step_of_many_tasks_is_one_call(pair: Pair, server: Redis) -> None:
    # A server that does not have a script yet is sent it in another call.
    await pair.joint.submit([message()])
    (one,) = await pair.receive(1)
    await pair.joint.complete(pair.subscription, [Completion(Ack(one), end(one))])
    inbox = await pair.storage.inbox()
    messages = [message(reply_to=inbox.address, priority=at % 10) for at in range(100)]
    inbox.expect([m.uuid for m in messages])
    before = await calls(server)
    assert await pair.joint.submit(messages) == [DONE] * 100
    assert await calls(server) == before + 1
    deliveries = await pair.receive(100)
    completions = [Completion(Ack(delivery), end(delivery)) for delivery in deliveries]
    before = await calls(server)
    assert await pair.joint.complete(pair.subscription, completions) == [DONE] * 100
    assert await calls(server) == before + 1
    arrived: list[Task] = []
    while len(arrived) < 100:
        arrived += await inbox.receive()
    assert {task.status for task in arrived} == {"success"}
    assert await pair.broker.depth("default") == QueueDepth(0, 0, 0)


async def test_first_records_are_seen_when_their_messages_are_taken(
    pair: Pair, server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [message() for _ in range(5)]
    await pair.joint.submit(messages)
    now = ("success", "cancel", "retry", "new", "new")
    records = [
        Task(uuid=m.uuid, task_name="a", status=status, execution="e")  # type: ignore[arg-type]
        for m, status in zip(messages, now, strict=True)
    ]
    await pair.storage.save(records[:3])
    deliveries = await pair.receive(5)
    expected = ["final", "cancelled", "stale", "run", "run"]
    assert [verdict for verdict, _ in await pair.joint.admit(deliveries)] == expected
    before = await server.info("commandstats")
    assert await pair.joint.admit(deliveries[3:]) == [("run", None)] * 2
    after = await server.info("commandstats")
    assert after["cmdstat_mget"]["calls"] == before["cmdstat_mget"]["calls"]
    # What was seen may be old by now: a delivery can wait in the subscription.
    await pair.storage.save([end(deliveries[3], status="cancel")])
    monkeypatch.setattr(composition, "_SEEN_WITHIN", 0.0)
    assert [verdict for verdict, _ in await pair.joint.admit(deliveries[3:])] == [
        "cancelled",
        "run",
    ]


async def test_a_message_of_another_program_is_admitted_by_its_record(pair: Pair) -> None:
    """Its fields may have another order, and its uuid may be any text."""
    first, other = message(), message()
    named = replace(message(), uuid="n" * 60)
    await pair.joint.submit([first, other, named])
    await pair.broker.purge("default")
    await pair.storage.save([end_of(m, status="cancel") for m in (other, named)])
    fields = msgspec.msgpack.decode(encode_message(other)[1:])
    mixed = b"\x01" + msgspec.msgpack.encode(dict(reversed(fields.items())))
    connection = pair.broker.started()
    for data in (mixed, encode_message(named), encode_message(first)):
        await connection.call("XADD", connection.key("stream", "default"), "*", "m", data)
    await pair.broker.publish([first])
    admitted = await pair.joint.admit(await pair.receive(4))
    assert [verdict for verdict, _ in admitted] == ["cancelled", "cancelled", "run", "run"]


async def test_nobody_sees_half_a_step(pair: Pair, server: Redis) -> None:
    """Whoever looks finds a message with its record, or a final record without its message."""
    key = pair.broker.started().key
    done = asyncio.Event()
    looks = 0

    async def look() -> None:
        nonlocal looks
        while not done.is_set():
            async with server.pipeline(transaction=True) as both:
                both.zcard(key("index", '["default","a"]:new'))
                both.xlen(key("stream", "default"))
                waiting, there = await both.execute()
            assert waiting == there
            looks += 1

    looking = asyncio.create_task(look())
    for _ in range(30):
        await pair.joint.submit([message() for _ in range(40)])
        deliveries = await pair.receive(40)
        completions = [Completion(Ack(delivery), end(delivery)) for delivery in deliveries]
        assert await pair.joint.complete(pair.subscription, completions) == [DONE] * 40
    done.set()
    await looking
    assert looks > 30


async def test_a_full_server_takes_neither_half(pair: Pair, server: Redis) -> None:
    first = message()
    await pair.joint.submit([first])
    await server.config_set("maxmemory", "1mb")
    try:
        for new in (message(), message(delay=0.1), message(submission="s")):
            with pytest.raises(Unavailable, match="maxmemory"):
                await pair.joint.submit([new])
            assert await pair.storage.get([new.uuid]) == [None]
        # What has begun may be finished.
        (delivery,) = await pair.receive(1)
        completion = Completion(Ack(delivery), end(delivery))
        assert await pair.joint.complete(pair.subscription, [completion]) == [DONE]
    finally:
        await server.config_set("maxmemory", "0")
    assert await pair.broker.depth("default") == QueueDepth(0, 0, 0)
    (task,) = await pair.storage.get([first.uuid])
    assert task is not None
    assert task.status == "success"


async def test_of_a_lost_lease_only_a_result_is_recorded(pair: Pair) -> None:
    messages = [message() for _ in range(3)]
    await pair.joint.submit(messages)
    ended, retried, released = await pair.receive(3)
    other = await pair.broker.subscribe({"default": 9})
    await pair.subscription.settle([Release(d) for d in (ended, retried, released)])
    await other.receive({"default": 9}, 9)
    outcomes = await pair.joint.complete(
        pair.subscription,
        [
            Completion(Ack(replace(ended, fence=_forgetful(ended))), end(ended)),
            Completion(
                Retry(replace(retried, fence=_forgetful(retried)), message()),
                end(retried, status="retry"),
            ),
            Completion(Release(replace(released, fence=_forgetful(released))), None),
        ],
    )
    assert outcomes == [DONE, LOST, LOST]
    found = await pair.storage.get([m.uuid for m in messages])
    assert [task and task.status for task in found] == ["success", "new", "new"]
    assert (await pair.broker.depth("default")).in_flight == 3


def _forgetful(delivery: Delivery) -> Any:
    """Return the fence without what it remembers of its settlement."""
    fence = delivery.fence
    return type(fence)(fence.token, fence.priority, 0.0)


@pytest.mark.parametrize("kind", ["end", "retry"])
async def test_a_step_whose_answer_was_lost_can_be_repeated(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    await pair.joint.submit([message()])
    (delivery,) = await pair.receive(1)
    again = message(attempt=2)
    if kind == "end":
        completion = Completion(Ack(delivery), end(delivery))
    else:
        completion = Completion(Retry(delivery, again), end(delivery, status="retry"))
    call = connection.Connection.call

    async def deaf(self: connection.Connection, *command: Any) -> Any:
        await call(self, *command)
        raise Unavailable("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(connection.Connection, "call", deaf)
        with pytest.raises(Unavailable):
            await pair.joint.complete(pair.subscription, [completion])
    assert await pair.joint.complete(pair.subscription, [completion]) == [DONE]
    assert await pair.joint.complete(pair.subscription, [completion]) == [DONE]
    depth = await pair.broker.depth("default")
    assert (depth.ready, depth.in_flight) == ((0, 0) if kind == "end" else (1, 0))
    (task,) = await pair.storage.get([end(delivery).uuid])
    assert task == completion.task


async def test_two_deliveries_of_one_task_in_one_step(pair: Pair) -> None:
    """A message that was published twice may come twice in one batch."""
    twice = message()
    await pair.joint.submit([twice, twice])
    first, second = await pair.receive(2)
    results = [end(first, execution="one"), end(second, execution="two")]
    completions = [Completion(Ack(first), results[0]), Completion(Ack(second), results[1])]
    outcomes = await pair.joint.complete(pair.subscription, completions)
    assert [outcome.status for outcome in outcomes] == ["done", "refused"]
    assert outcomes[1].current == results[0]
    assert await pair.broker.depth("default") == QueueDepth(0, 0, 0)


@pytest.fixture
async def small(redis_server: Service, server: Redis) -> AsyncIterator[Pair]:
    """A pair on a server that takes at most 1 MiB."""
    before = await server.config_get("proto-max-bulk-len")
    await server.config_set("proto-max-bulk-len", 2**20)
    pair = Pair(redis_server.url, f"joint-{uuid4().hex[:8]}")
    try:
        yield await pair.start()
    finally:
        await pair.stop()
        await server.config_set("proto-max-bulk-len", str(before["proto-max-bulk-len"]))


async def test_a_large_result_is_replaced_and_its_neighbours_are_kept(small: Pair) -> None:
    pair, much = small, b"x" * 2**20
    large = message(args=much)
    outcomes = await pair.joint.submit([message(), large])
    assert [outcome.status for outcome in outcomes] == ["done", "refused"]
    await pair.joint.submit([message()])
    one, other = await pair.receive(2)
    completions = [
        Completion(Ack(one), end(one, returning=much)),
        Completion(Ack(other), end(other)),
    ]
    assert await pair.joint.complete(pair.subscription, completions) == [DONE] * 2
    found = await pair.storage.get([large.uuid, end(one).uuid, end(other).uuid])
    assert [task and task.status for task in found] == ["error", "error", "success"]


async def test_only_one_database_of_one_user_is_joined(redis_server: Service) -> None:
    url = redis_server.url
    base, _, _ = url.rpartition("/")
    broker = RedisBroker(f"{base}/0?socket_timeout=3")
    assert broker.join(RedisStorage(f"{base}?db=0")) is not None
    assert broker.join(RedisStorage(f"{base}/1")) is None
    assert broker.join(RedisStorage(url.replace("redis://", "redis://other:word@"))) is None
    assert broker.join(RedisStorage("redis://localhost:1")) is None


async def test_two_namespaces_are_not_mixed(redis_server: Service) -> None:
    """A composition is made before its parts start, and a program may start them as it likes."""
    pair = await Pair(redis_server.url, f"joint-{uuid4().hex[:8]}").start()
    await pair.storage.stop()
    await pair.storage.start(f"other-{uuid4().hex[:8]}")
    one = message()
    assert await pair.joint.submit([one]) == [DONE]
    (task,) = await pair.storage.get([one.uuid])
    assert task is not None
    (delivery,) = await pair.receive(1)
    completion = Completion(Ack(delivery), end(delivery))
    assert await pair.joint.complete(pair.subscription, [completion]) == [DONE]
    (task,) = await pair.storage.get([one.uuid])
    assert task == completion.task
    await pair.stop()
