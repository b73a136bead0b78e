"""The kit on Redis."""

from urllib.parse import urlsplit

import pytest

from qtasks_conformance import (
    BackendContract,
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    StorageContract,
    Subject,
)
from qtasks_redis import RedisBroker, RedisStorage
from tests.services import Service


@pytest.fixture
def subject(redis_server: Service) -> Subject:
    async def inject(namespace: str, queue: str, data: bytes) -> None:
        broker = RedisBroker(redis_server.url)
        await broker.start(namespace)
        connection = broker.started()
        await connection.call("XADD", connection.key("stream", queue), "*", "m", data)
        await broker.stop()

    async def spoil(namespace: str, uuid: str, data: bytes) -> None:
        storage = RedisStorage(redis_server.url)
        await storage.start(namespace)
        connection = storage.started()
        key = connection.key("record", uuid)
        value = await connection.call("GET", key)
        # What the scripts compare stays in front.
        await connection.call("SET", key, value[: 13 + int(value[10:13])] + data)
        await storage.stop()

    return Subject(
        broker=Part("qtasks_redis:RedisBroker", {"url": redis_server.url, "lease": 1.0}),
        storage=Part("qtasks_redis:RedisStorage", {"url": redis_server.url}),
        lease=1.0,
        inject=inject,
        spoil=spoil,
        server=redis_server,
        driver="redis",
        url=redis_server.url,
        other_url=urlsplit(redis_server.url)._replace(path="/1").geturl(),
        options=("lease", "retention", "socket_timeout"),
        least_broker=Least(
            survives="server crash",
            settle_confirmed=True,
            atomic_retries=True,
            counts_deliveries=True,
            priorities=True,
            leases_survive=True,
            order="queue",
        ),
        least_storage=Least(survives="server crash", settle_confirmed=True),
    )


class TestRedisBroker(BrokerContract):
    pass


class TestRedisStorage(StorageContract):
    pass


class TestRedisPair(CompositionContract):
    pass


class TestRedisBackend(BackendContract):
    pass
