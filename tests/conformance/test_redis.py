"""The kit on Redis."""

import pytest

from qtasks_conformance import (
    BrokerContract,
    Least,
    PairContract,
    Part,
    StorageContract,
    Subject,
)
from tests.services import Service


@pytest.fixture
def subject(redis_server: Service) -> Subject:
    return Subject(
        broker=Part("qtasks_redis:RedisBroker", {"url": redis_server.url, "lease": 1.0}),
        storage=Part("qtasks_redis:RedisStorage", {"url": redis_server.url}),
        lease=1.0,
        server=redis_server,
        driver="redis",
        least_broker=Least(survives="server crash", settle_confirmed=True, counts_deliveries=True),
        least_storage=Least(survives="server crash", settle_confirmed=True),
    )


class TestRedisBroker(BrokerContract):
    pass


class TestRedisStorage(StorageContract):
    pass


class TestRedisPair(PairContract):
    pass
