"""What is Redis's own: bells, tokens, pushes, rights, and a server that freezes or forgets."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from qtasks_core import DONE, LOST, Ack, Delivery, Release, Retry, Task, TaskMessage
from qtasks_core.errors import Closed, ConfigurationError, ServerTooOld, Unavailable
from qtasks_redis import RedisBackend, RedisBroker, RedisStorage, connection
from qtasks_redis.subscription import Fence, RedisSubscription
from tests.services import Service


def message(**fields: object) -> TaskMessage:
    return TaskMessage(uuid=str(uuid4()), task_name="tests:task", **fields)  # type: ignore[arg-type]


def final(uuid: str, **fields: object) -> Task:
    return Task(uuid=uuid, task_name="tests:task", status="success", **fields)  # type: ignore[arg-type]


def sent(delivery: Delivery) -> TaskMessage:
    assert isinstance(delivery.message, TaskMessage)
    return delivery.message


@pytest.fixture
async def parts(redis_server: Service) -> AsyncIterator[tuple[RedisBroker, RedisStorage]]:
    namespace = str(uuid4())
    broker = RedisBackend().broker(f"{redis_server.url}?lease=30&retention=60")
    storage = RedisBackend().storage(f"{redis_server.url}?lease=30&retention=60")
    await broker.start(namespace)
    await storage.start(namespace)
    yield broker, storage
    await broker.stop()
    await storage.stop()


async def subscribed(broker: RedisBroker, queue: str = "default") -> RedisSubscription:
    subscription = await broker.subscribe({queue: 10})
    assert isinstance(subscription, RedisSubscription)
    return subscription


async def calls(server: Redis) -> int:
    """Return how many commands clients have sent; those within scripts are not counted."""
    counts = await server.info("commandstats")
    return sum(counts.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "blpop"))


# Waiting


@pytest.mark.parametrize("survivor", range(3))
async def test_a_new_earliest_delay_is_heard_by_every_sleeper(
    parts: tuple[RedisBroker, RedisStorage], survivor: int
) -> None:
    """Whoever heard of it first may be gone when it is due."""
    broker, _ = parts
    sleepers = [await subscribed(broker) for _ in range(3)]
    await broker.publish([message(delay=60)])
    waiting = [asyncio.create_task(s.receive({"default": 1}, 1)) for s in sleepers]
    await asyncio.sleep(0.3)
    began = time.monotonic()
    await broker.publish([message(delay=3)])
    await asyncio.sleep(0.4)
    left = waiting.pop(survivor)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    async with asyncio.timeout(40):  # long before the other one is due
        assert [sent(delivery).delay for delivery in await left] == [3]
    assert time.monotonic() - began >= 3


async def test_waiting_costs_less_than_two_commands_a_second(
    parts: tuple[RedisBroker, RedisStorage], server: Redis
) -> None:
    subscription = await subscribed(parts[0])
    waiting = asyncio.create_task(subscription.receive({"default": 1}, 1))
    await asyncio.sleep(0.5)
    before = await calls(server)
    await asyncio.sleep(5)
    assert await calls(server) - before < 10
    await subscription.close()
    with pytest.raises(Closed):
        await waiting


async def test_a_token_heard_by_a_cancelled_receiver_wakes_another(
    parts: tuple[RedisBroker, RedisStorage],
) -> None:
    broker, _ = parts
    first, second = await subscribed(broker), await subscribed(broker)
    waiting = asyncio.create_task(first.receive({"default": 1}, 1))
    await asyncio.sleep(0.2)
    waiting.cancel()
    await asyncio.wait({waiting})
    receiving = asyncio.create_task(second.receive({"default": 1}, 1))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    # The first still listens, and is the longer in line.
    await broker.publish([message()])
    assert len(await receiving) == 1
    assert time.monotonic() - began < 3


async def test_another_queue_can_be_wanted_after_a_cancelled_receive(
    parts: tuple[RedisBroker, RedisStorage],
) -> None:
    broker, _ = parts
    subscription = await broker.subscribe({"a": 1, "b": 1})
    waiting = asyncio.create_task(subscription.receive({"a": 1}, 1))
    await asyncio.sleep(0.2)
    waiting.cancel()
    await asyncio.wait({waiting})
    receiving = asyncio.create_task(subscription.receive({"b": 1}, 1))
    await asyncio.sleep(0.2)
    await broker.publish([message(queue="b")])
    async with asyncio.timeout(3):
        assert len(await receiving) == 1


async def test_a_limit_is_kept_over_queues_and_the_rest_stays_receivable(
    parts: tuple[RedisBroker, RedisStorage],
) -> None:
    broker, _ = parts
    await broker.publish([message(queue=queue) for queue in "aaabbb"])
    one, two = await broker.subscribe({"a": 9, "b": 9}), await broker.subscribe({"b": 9})
    assert [d.queue for d in await one.receive({"a": 9, "b": 9}, 4)] == ["a", "a", "a", "b"]
    async with asyncio.timeout(3):
        assert len(await two.receive({"b": 9}, 9)) == 2


# Ownership


async def test_leases_of_different_length_are_each_kept(redis_server: Service) -> None:
    namespace = str(uuid4())
    long = RedisBroker(redis_server.url, lease=30)
    short = RedisBroker(redis_server.url, lease=0.3)
    await long.start(namespace)
    await short.start(namespace)
    holder, other = await subscribed(long), await subscribed(short)
    await long.publish([message()])
    (held,) = await holder.receive({"default": 1}, 1)
    receiving = asyncio.create_task(other.receive({"default": 1}, 1))
    await asyncio.sleep(1)
    assert not receiving.done()
    assert await holder.settle([Release(held)]) == [DONE]
    (again,) = await receiving
    assert again.count == 2
    zombie = replace(held, fence=Fence(held.fence.token, held.fence.priority, 0.0))
    assert await holder.settle([Ack(zombie)]) == [LOST]
    await short.stop()
    await long.stop()


async def test_a_settle_whose_answer_was_lost_can_be_repeated(
    parts: tuple[RedisBroker, RedisStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, _ = parts
    subscription = await subscribed(broker)
    await broker.publish([message()])
    (delivery,) = await subscription.receive({"default": 1}, 1)
    retry = Retry(delivery, replace(sent(delivery), attempt=2))
    call = connection.Connection.call

    async def deaf(self: connection.Connection, *command: Any) -> Any:
        await call(self, *command)
        raise Unavailable("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(connection.Connection, "call", deaf)
        with pytest.raises(Unavailable):
            await subscription.settle([retry])
    assert await subscription.settle([retry]) == [DONE]
    assert [sent(d).attempt for d in await subscription.receive({"default": 9}, 9)] == [2]


async def test_a_settle_whose_answer_was_lost_is_refused_when_another_may_own(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = RedisBroker(redis_server.url, lease=0.3)
    await broker.start(str(uuid4()))
    mine, other = await subscribed(broker), await subscribed(broker)
    await broker.publish([message()])
    (delivery,) = await mine.receive({"default": 1}, 1)

    async def down(self: connection.Connection, *command: Any) -> Any:
        raise Unavailable("the question was lost")

    with monkeypatch.context() as patch:
        patch.setattr(connection.Connection, "call", down)
        with pytest.raises(Unavailable):
            await mine.settle([Ack(delivery)])
    (taken,) = await other.receive({"default": 1}, 1)
    assert await mine.settle([Ack(delivery)]) == [LOST]
    assert await other.settle([Ack(taken)]) == [DONE]
    await broker.stop()


async def test_scripts_are_loaded_again_when_the_server_forgot_them(
    parts: tuple[RedisBroker, RedisStorage], server: Redis
) -> None:
    broker, storage = parts
    subscription = await subscribed(broker)
    ours = message()
    for _ in range(2):
        await server.script_flush()
        await broker.publish([ours])
        await server.script_flush()
        deliveries = await subscription.receive({"default": 1}, 1)
        await server.script_flush()
        assert await storage.save([final(ours.uuid)]) == [DONE]
        assert await subscription.extend(deliveries) == deliveries
        assert await subscription.settle([Ack(d) for d in deliveries]) == [DONE]


async def test_nothing_is_left_of_what_was_settled(
    parts: tuple[RedisBroker, RedisStorage], server: Redis
) -> None:
    broker, _ = parts
    subscription = await subscribed(broker)
    await broker.publish([message() for _ in range(2500)])
    left = 2500
    while left:
        deliveries = await subscription.receive({"default": 2000}, 2000)
        assert await subscription.settle([Ack(d) for d in deliveries]) == [DONE] * len(deliveries)
        left -= len(deliveries)
    key = broker.started().key
    assert await server.xlen(key("stream", "default")) == 0
    assert not await server.exists(key("leases", "default"), key("delayed", "default"))


# Records


async def test_a_final_record_expires_and_others_stay(
    parts: tuple[RedisBroker, RedisStorage], server: Redis
) -> None:
    _, storage = parts
    own, default, open_ = str(uuid4()), str(uuid4()), str(uuid4())
    running = replace(final(open_), status="process")
    forever = str(uuid4())
    records = [final(own, retention=0.2), final(default), running]
    await storage.save([*records, final(forever, retention=float("inf"))])
    key = storage.started().key
    assert 50 < await server.ttl(key("record", default)) <= 60
    assert await server.ttl(key("record", open_)) == -1
    assert await server.ttl(key("record", forever)) == -1
    await asyncio.sleep(0.4)
    assert await storage.get([own]) == [None]


async def test_large_records_are_only_named_and_still_arrive(
    parts: tuple[RedisBroker, RedisStorage],
) -> None:
    _, storage = parts
    inbox = await storage.inbox()
    uuids = [str(uuid4()) for _ in range(12)]
    inbox.expect(uuids[:8])
    await inbox.watch(uuids[8:])
    sizes = (10, 60_000, 70_000, 500_000)
    records = [
        final(uuid, returning=b"x" * sizes[at % 4], reply_to=inbox.address if at < 8 else None)
        for at, uuid in enumerate(uuids)
    ]
    assert await storage.save(records) == [DONE] * 12
    arrived: list[Task] = []
    while len(arrived) < 12:
        arrived += await inbox.receive()
    assert {task.uuid: task for task in arrived} == {record.uuid: record for record in records}
    await inbox.close()


async def test_many_calls_share_a_few_connections(
    parts: tuple[RedisBroker, RedisStorage], server: Redis
) -> None:
    _, storage = parts
    uuids = [str(uuid4()) for _ in range(400)]
    await asyncio.gather(*(storage.save([final(uuid)]) for uuid in uuids))
    found: Sequence[list[Task | None]] = await asyncio.gather(*(storage.get([u]) for u in uuids))
    assert all(tasks[0] is not None for tasks in found)
    assert (await server.info("clients"))["connected_clients"] < 60


async def test_a_cancelled_call_is_cancelled(parts: tuple[RedisBroker, RedisStorage]) -> None:
    _, storage = parts

    async def forever() -> None:
        while True:
            await storage.get(["a"])

    for turns in range(60):
        running = asyncio.create_task(forever())
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=60)
        assert done


# Trouble


async def test_a_frozen_server_is_unreachable_within_seconds(
    parts: tuple[RedisBroker, RedisStorage], redis_server: Service
) -> None:
    broker, storage = parts
    subscription, inbox = await subscribed(broker), await storage.inbox()
    uuid = str(uuid4())
    inbox.expect([uuid])
    waiting = [subscription.receive({"default": 1}, 1), inbox.receive()]
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(call) for call in waiting]
    await asyncio.sleep(0.3)
    await asyncio.to_thread(redis_server.freeze)
    try:
        tasks += [
            asyncio.create_task(broker.publish([message(queue="other")])),
            asyncio.create_task(storage.get([uuid])),
            asyncio.create_task(RedisBroker(redis_server.url).start("tests")),
        ]
        done, pending = await asyncio.wait(tasks, timeout=60)
    finally:
        await asyncio.to_thread(redis_server.thaw)
    assert not pending
    assert all(isinstance(task.exception(), Unavailable) for task in done)
    await storage.save([final(uuid)])
    assert [task.uuid for task in await inbox.receive()] == [uuid]
    await broker.publish([message()])
    assert len(await subscription.receive({"default": 1}, 1)) == 1


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://host", "redis://"),
        ("redis://host/name", "the database, a number"),
        ("redis://host:port", "port"),
        ("redis://host?lease=soon", "soon"),
        ("redis://host?lease=0", "lease"),
    ],
)
def test_a_wrong_url_is_told_when_the_part_is_built(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        RedisBackend().broker(url)


async def test_what_the_server_refuses_is_a_matter_of_configuration(redis_server: Service) -> None:
    port = urlsplit(redis_server.url).port
    for wrong in (
        f"redis://:guessed@127.0.0.1:{port}",
        f"redis://127.0.0.1:{port}",
        f"{redis_server.url}99999",
        f"{redis_server.url}?sockets=9",
    ):
        with pytest.raises(ConfigurationError) as told:
            await RedisBroker(wrong).start("tests")
        assert "guessed" not in str(told.value)


async def test_an_old_server_is_refused(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_NEEDS", (99, 0))
    with pytest.raises(ServerTooOld, match="Redis"):
        await RedisStorage(redis_server.url).start("tests")


async def test_a_user_without_rights_to_ask_gets_the_least_guarantees(
    redis_server: Service, server: Redis
) -> None:
    port = urlsplit(redis_server.url).port
    for forbidden in ("-@dangerous", "-config"):
        await server.execute_command(  # type: ignore[no-untyped-call]
            "ACL", "SETUSER", "worker", "reset", "on", ">pw", "~*", "&*", "+@all", forbidden
        )
        broker = RedisBroker(f"redis://worker:pw@127.0.0.1:{port}")
        await broker.start("tests")
        assert broker.guarantees.survives == "client crash"
        assert "not known completely" in str(broker.guarantees.advice)
        await broker.publish([message(queue=str(uuid4()))])
        await broker.stop()
    await server.acl_deluser("worker")


@pytest.mark.parametrize(
    ("appendfsync", "on_rewrite", "survives"),
    [
        ("no", "no", "server crash"),
        ("everysec", "no", "client crash"),
        ("always", "no", "machine crash"),
        ("always", "yes", "server crash"),
    ],
)
async def test_what_survives_follows_from_when_the_server_syncs(
    redis_server: Service, server: Redis, appendfsync: str, on_rewrite: str, survives: str
) -> None:
    before = str((await server.config_get("appendfsync"))["appendfsync"])
    await server.config_set("appendfsync", appendfsync)
    await server.config_set("no-appendfsync-on-rewrite", on_rewrite)
    try:
        storage = RedisStorage(redis_server.url)
        await storage.start("tests")
        assert storage.guarantees.survives == survives
        assert f"appendfsync {appendfsync}" in storage.guarantees.durability
        assert ("on-rewrite" in storage.guarantees.durability) == (on_rewrite == "yes")
        await storage.stop()
    finally:
        await server.config_set("no-appendfsync-on-rewrite", "no")
        await server.config_set("appendfsync", before)


async def test_a_server_that_loads_its_data_is_away(redis_server: Service, server: Redis) -> None:
    """And not taken for one without `appendonly`, which it says of itself until it has loaded."""
    storage = RedisStorage(redis_server.url)
    await storage.start("tests")
    # It answers now and then while it loads: after each 1024 commands of its file.
    for _ in range(20):
        await server.eval("for n = 1, 25000 do redis.call('INCR', KEYS[1]) end", 1, "load")
    await asyncio.to_thread(redis_server.kill)
    back = asyncio.create_task(asyncio.to_thread(redis_server.restart))
    said: Counter[str] = Counter()
    while not back.done() or "server crash" not in said:
        try:
            await storage.refresh()
            said[storage.guarantees.survives] += 1
        except Unavailable as error:
            said[str(error).partition(": ")[2]] += 1
            await asyncio.sleep(0.005)
    await back
    await server.connection_pool.disconnect()
    await server.delete("load")
    await storage.stop()
    assert said["the server is loading its data"], said
    assert not said["client crash"], said


async def test_eviction_is_advised_against(redis_server: Service, server: Redis) -> None:
    await server.config_set("maxmemory", "900mb")
    await server.config_set("maxmemory-policy", "allkeys-lru")
    try:
        storage = RedisStorage(redis_server.url)
        await storage.start("tests")
        assert "allkeys-lru" in str(storage.guarantees.advice)
        await storage.stop()
    finally:
        await server.config_set("maxmemory-policy", "noeviction")
        await server.config_set("maxmemory", "0")


async def test_a_full_server_takes_nothing_new_and_lets_what_is_there_be_finished(
    parts: tuple[RedisBroker, RedisStorage], server: Redis
) -> None:
    broker, storage = parts
    subscription = await subscribed(broker)
    messages = [message(), message(), message(delay=0.1)]
    uuids = [message.uuid for message in messages]
    await storage.save([replace(final(uuid), status="new") for uuid in uuids])
    await broker.publish(messages)
    await server.config_set("maxmemory", "1mb")
    try:
        for new in (message(), message(delay=0.1)):
            with pytest.raises(Unavailable, match="maxmemory"):
                await broker.publish([new])
        with pytest.raises(Unavailable, match="maxmemory"):
            await storage.save([replace(final(str(uuid4())), status="new")])
        left = set(uuids)
        again = True
        while left:
            for delivery in await subscription.receive({"default": 9}, 9):
                assert await subscription.extend([delivery]) == [delivery]
                if again:
                    again = False
                    retry = Retry(delivery, replace(sent(delivery), attempt=2))
                    assert await subscription.settle([retry]) == [DONE]
                    continue
                uuid = sent(delivery).uuid
                assert await storage.save([replace(final(uuid), status="process")]) == [DONE]
                assert await storage.save([final(uuid, returning=b"small")]) == [DONE]
                assert await subscription.settle([Ack(delivery)]) == [DONE]
                left.discard(uuid)
    finally:
        await server.config_set("maxmemory", "0")
    assert [task and task.status for task in await storage.get(uuids)] == ["success"] * 3
