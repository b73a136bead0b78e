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


def redis_subject(server: Service) -> Subject:
    """Return what is tested: a broker and a storage on one server."""

    async def inject(namespace: str, queue: str, data: bytes) -> None:
        broker = RedisBroker(server.url)
        await broker.start(namespace)
        connection = broker.started()
        await connection.call("XADD", connection.key("stream", queue), "*", "m", data)
        await broker.stop()

    async def spoil(namespace: str, uuid: str, data: bytes) -> None:
        storage = RedisStorage(server.url)
        await storage.start(namespace)
        connection = storage.started()
        key = connection.key("record", uuid)
        value = await connection.call("GET", key)
        # What the scripts compare stays in front.
        await connection.call("SET", key, value[: 13 + int(value[10:13])] + data)
        await storage.stop()

    return Subject(
        broker=Part("qtasks_redis:RedisBroker", {"url": server.url, "lease": 1.0}),
        storage=Part("qtasks_redis:RedisStorage", {"url": server.url}),
        lease=1.0,
        inject=inject,
        spoil=spoil,
        server=server,
        driver="redis",
        url=server.url,
        other_url=urlsplit(server.url)._replace(path="/1").geturl(),
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


@pytest.fixture
def subject(redis_server: Service) -> Subject:
    return redis_subject(redis_server)


class TestRedisBroker(BrokerContract):
    pass


class TestRedisStorage(StorageContract):
    pass


class TestRedisPair(CompositionContract):
    pass


class TestRedisBackend(BackendContract):
    pass
