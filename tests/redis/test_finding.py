"""Sentinels and clusters: the server is found, and found again when another one takes over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from qtasks.testing.recipes import PASSWORD
from qtasks_core import DONE, Ack, Broker, Completion, Storage, Task, TaskMessage, TaskQuery
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.separate import compose
from qtasks_redis import RedisBackend, RedisBroker, RedisStorage
from tests.redis.ports import has_bus
from tests.redis.test_roles import OwnRedis, follow, port, until
from tests.services import RedisServer, Service
from tests.services.redis import NativeRedis
from tests.services.service import Way

SERVICE = "shop"


class NativeSentinel(NativeRedis):
    """A Sentinel that asks for a password of its own."""

    def __init__(self, primary: int) -> None:
        super().__init__()
        self._primary = primary

    def command(self) -> list[str]:
        lines = (
            f"port {self.port}", "bind 127.0.0.1", f"dir {self.directory}",
            "requirepass watcher", "sentinel sentinel-pass watcher",
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._primary} 2",
            f"sentinel auth-pass {SERVICE} {PASSWORD}",
            f"sentinel down-after-milliseconds {SERVICE} 700",
            f"sentinel failover-timeout {SERVICE} 3000",
        )  # fmt: skip
        path = self.write("sentinel.conf", "\n".join(lines) + "\n")
        return [self.program, str(path), "--sentinel"]


class NativeNode(NativeRedis):
    """A node of a cluster."""

    def prepare(self) -> str:
        while True:
            url = super().prepare()
            if has_bus(self.port):
                return url

    def command(self) -> list[str]:
        return [*super().command(), "--cluster-enabled", "yes", "--masterauth", PASSWORD]


class OwnSentinel(RedisServer):
    def __init__(self, primary: int) -> None:
        super().__init__()
        self._primary = primary

    def ways(self) -> tuple[Way, ...]:
        return (NativeSentinel(self._primary),)

    async def probe(self, url: str) -> str:
        return await super().probe(url.replace(PASSWORD, "watcher"))


class OwnNode(RedisServer):
    def ways(self) -> tuple[Way, ...]:
        return (NativeNode(),)


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[list[Service], list[Service]]]:
    """Two servers, and three Sentinels that watch the first one."""
    with ExitStack() as stack:

        def started(service: Service) -> Service:
            stack.callback(service.stop)
            service.start()
            return service

        servers = [started(OwnRedis()) for _ in range(2)]
        yield servers, [started(OwnSentinel(port(servers[0]))) for _ in range(3)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Service]]:
    with ExitStack() as stack:
        services: list[Service] = [OwnNode() for _ in range(2)]
        for service in services:
            stack.callback(service.stop)
            service.start()
        yield services


class Load:
    """A client that publishes and a worker that finishes what it receives, through any outage."""

    def __init__(self, broker: Broker, storage: Storage) -> None:
        self.broker, self.storage = broker, storage
        self.pair = compose(broker, storage)
        self.going = asyncio.Event()
        self.going.set()
        self.idle = asyncio.Event()
        self.confirmed: list[str] = []
        self.finished: set[str] = set()

    async def publish(self) -> None:
        while True:
            if not self.going.is_set():
                self.idle.set()
                await self.going.wait()
                self.idle.clear()
            number = len(self.confirmed)
            new = TaskMessage(
                uuid=str(uuid4()), task_name="a", created_at=float(number), priority=number % 10
            )
            await again(lambda: self.pair.submit([new]))  # noqa: B023
            self.confirmed.append(new.uuid)
            await asyncio.sleep(0.005)

    async def work(self) -> None:
        subscription = await self.broker.subscribe({"default": 20})
        while True:
            for delivery in await again(lambda: subscription.receive({"default": 20}, 20)):
                message = delivery.message
                assert isinstance(message, TaskMessage)
                end = Task(
                    uuid=message.uuid,
                    task_name="a",
                    status="success",
                    created_at=message.created_at,
                )
                completion = Completion(Ack(delivery), end)
                await again(lambda: self.pair.complete(subscription, [completion]))  # noqa: B023
                self.finished.add(message.uuid)

    async def confirms(self, more: int) -> None:
        enough = len(self.confirmed) + more

        async def confirmed_enough() -> bool:
            return len(self.confirmed) >= enough

        await until(confirmed_enough)

    async def rest(self) -> None:
        """Publish no more, and wait until all is finished."""
        self.going.clear()
        await self.idle.wait()

        async def finished_all() -> bool:
            return self.finished >= set(self.confirmed)

        await until(finished_all)


def fields(reply: Any) -> dict[str, str]:
    """Return a reply as pairs of text, as the driver has paired it or not."""
    flat = [part for pair in reply.items() for part in pair] if isinstance(reply, dict) else reply
    texts = [part.decode() if isinstance(part, bytes) else str(part) for part in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


async def again(call: Callable[[], Any]) -> Any:
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0.02)


async def under_load(url: str, change: Callable[[Load], Any]) -> None:
    """Work while the servers change, and check that nothing is lost."""
    broker, storage = RedisBackend().broker(f"{url}&lease=5"), RedisBackend().storage(url)
    assert broker.join(storage) is not None
    namespace = f"found-{uuid4().hex[:8]}"
    async with asyncio.timeout(90):
        await broker.start(namespace)
        await storage.start(namespace)
        load = Load(broker, storage)
        tasks = [asyncio.create_task(load.publish()), asyncio.create_task(load.work())]
        try:
            await load.confirms(30)
            await change(load)
            load.going.set()
            await load.confirms(30)
            await load.rest()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        found = await storage.get(load.confirmed)
        assert {task and task.status for task in found} == {"success"}
        page = await storage.query(TaskQuery(status=("success",), limit=len(found) + 1))
        assert len(page.tasks) == len(found)
        await broker.stop()
        await storage.stop()


def sentinel_url(sentinels: list[Service], service: str = SERVICE) -> str:
    hosts = ",".join(f"127.0.0.1:{port(sentinel)}" for sentinel in sentinels)
    return f"redis+sentinel://:{PASSWORD}@{hosts}/{service}?sentinel_password=watcher"


async def test_a_failover_by_sentinel_under_load(
    watched: tuple[list[Service], list[Service]],
) -> None:
    servers, sentinels = watched
    first, second = (Redis.from_url(service.url) for service in servers)
    watcher: Redis = Redis(host="127.0.0.1", port=port(sentinels[0]), password="watcher")
    await first.config_set("masterauth", PASSWORD)
    await follow(second, servers[0])

    async def in_step() -> bool:
        told = fields(await watcher.execute_command("SENTINEL", "MASTER", SERVICE))  # type: ignore[no-untyped-call]
        replication = await first.info("replication")
        online = replication.get("slave0", {}).get("state") == "online"
        return bool(online and int(told["num-slaves"]) and int(told["num-other-sentinels"]) == 2)

    async with asyncio.timeout(120):
        await until(in_step)

    async def lose_the_first(load: Load) -> None:
        # What a replica has not got is lost with its primary. So nothing is written just then.
        await load.rest()
        offset = (await first.info("replication"))["master_repl_offset"]

        async def replicated() -> bool:
            return bool((await second.info("replication"))["slave_repl_offset"] >= offset)

        await until(replicated)
        servers[0].kill()

    try:
        await under_load(sentinel_url(sentinels), lose_the_first)
        # The Sentinels have closed the connections of the server that they promoted.
        async with Redis.from_url(servers[1].url) as promoted:
            assert (await promoted.info("replication"))["role"] == "master"
    finally:
        for client in (first, second, watcher):
            await client.aclose()


async def test_one_sentinel_that_answers_is_enough(
    watched: tuple[list[Service], list[Service]],
) -> None:
    _, sentinels = watched
    url = sentinel_url(sentinels[1:]).replace("@", "@127.0.0.1:1,")
    storage = RedisStorage(url)
    await storage.start(f"found-{uuid4().hex[:8]}")
    await storage.stop()


async def test_what_sentinels_refuse_is_told(
    watched: tuple[list[Service], list[Service]],
) -> None:
    _, sentinels = watched
    with pytest.raises(Unavailable, match="does not know it"):
        await RedisStorage(sentinel_url(sentinels, "other")).start("a")
    wrong = sentinel_url(sentinels).replace("watcher", "hidden")
    with pytest.raises(ConfigurationError) as told:
        await RedisStorage(wrong).start("a")
    assert "hidden" not in str(told.value)


async def test_a_url_of_sentinels_needs_a_service() -> None:
    with pytest.raises(ConfigurationError, match="names the service"):
        RedisBroker("redis+sentinel://127.0.0.1:1,127.0.0.1:2")
    with pytest.raises(ConfigurationError, match="names the database"):
        RedisBroker("redis+sentinel://127.0.0.1:1/shop/one")
    with pytest.raises(ConfigurationError, match="database 0 only"):
        RedisBroker("redis+cluster://127.0.0.1:1/1")


@pytest.fixture
async def cluster(nodes: list[Service]) -> AsyncIterator[list[Redis]]:
    """Clients of both nodes; the first half of the slots is on the first one."""
    clients = [Redis.from_url(node.url) for node in nodes]
    halves = (range(8192), range(8192, 16384))
    with suppress(Exception):  # another test has given them
        for client, slots in zip(clients, halves, strict=True):
            await client.execute_command("CLUSTER", "ADDSLOTS", *slots)  # type: ignore[no-untyped-call]
    await clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port(nodes[1]))  # type: ignore[no-untyped-call]

    async def agreed() -> bool:
        for client in clients:
            info = str(await client.execute_command("CLUSTER", "INFO"))  # type: ignore[no-untyped-call]
            if "cluster_state:ok" not in info or "cluster_known_nodes:2" not in info:
                return False
        return True

    async with asyncio.timeout(120):
        await until(agreed)
    yield clients
    for client in clients:
        await client.aclose()


async def test_a_slot_of_a_cluster_moves_under_load(
    nodes: list[Service], cluster: list[Redis]
) -> None:
    async def move(load: Load) -> None:
        assert isinstance(load.storage, RedisStorage)
        key = load.storage.started().key("record", "")
        slot = key_slot(key.encode())
        start, to = (0, 1) if slot < 8192 else (1, 0)
        ids = [(await c.execute_command("CLUSTER", "MYID")).decode() for c in cluster]  # type: ignore[no-untyped-call]

        async def order(node: int, *command: str | int) -> Any:
            return await cluster[node].execute_command(*command)  # type: ignore[no-untyped-call]

        await order(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[start])
        await order(start, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[to])
        while keys := await order(start, "CLUSTER", "GETKEYSINSLOT", slot, 50):
            await order(
                start, "MIGRATE", "127.0.0.1", port(nodes[to]), "", 0, 5000,
                "AUTH", PASSWORD, "KEYS", *keys,
            )  # fmt: skip
            await asyncio.sleep(0.02)
        for node in (to, start):
            await order(node, "CLUSTER", "SETSLOT", slot, "NODE", ids[to])

    url = f"redis+cluster://:{PASSWORD}@127.0.0.1:1,127.0.0.1:{port(nodes[0])}/?socket_timeout=5"
    await under_load(url, move)


async def test_a_server_that_is_no_cluster_is_told(redis_server: Service) -> None:
    with pytest.raises(ConfigurationError, match="cluster support disabled"):
        await RedisStorage(redis_server.url.replace("redis://", "redis+cluster://")).start("a")


async def test_a_password_of_any_characters(redis_server: Service) -> None:
    password = "p@ss:/?#[]%&= +\"'\\é漢~"
    admin: Redis = Redis.from_url(redis_server.url)
    name = f"user@{uuid4().hex}"
    try:
        await admin.execute_command(  # type: ignore[no-untyped-call]
            "ACL", "SETUSER", name, "on", f">{password}", "~*", "&*", "+@all"
        )
        host = redis_server.url.rpartition("@")[2]
        url = f"redis://{quote(name, safe='')}:{quote(password, safe='')}@{host}"
        broker, storage = RedisBroker(url), RedisStorage(url)
        assert broker.join(storage) is not None
        await broker.start("a")
        assert await broker.publish([TaskMessage(uuid="u", task_name="a")]) == [DONE]
        await broker.purge("default")
        await broker.stop()
    finally:
        await admin.acl_deluser(name)
        await admin.aclose()
