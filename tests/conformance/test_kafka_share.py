"""The kit on a share group of Kafka as the broker, alone and with other storages.

Its storage is that of `kafka://`, so only the broker is tested here.
"""

from dataclasses import replace

import pytest

from qtasks_conformance import (
    BackendContract,
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    Subject,
)
from qtasks_conformance.contracts.delivering import DeliveringContract
from qtasks_conformance.contracts.leases import LeaseContract
from qtasks_conformance.contracts.poison import PoisonContract
from tests.conformance.test_kafka import LEASE, kafka_subject
from tests.services import Service

SLACK = 6.0
"""Seconds. The first group on a server makes it create the topic with the state of such groups."""


def share_groups(server: Service) -> Part:
    return Part("qtasks_kafka:ShareGroupKafkaBroker", {"url": server.url, "lease": LEASE})


@pytest.fixture
def subject(kafka_server: Service) -> Subject:
    url = kafka_server.url.replace("kafka://", "kafka+share://")
    return replace(
        kafka_subject(kafka_server),
        broker=share_groups(kafka_server),
        slack=SLACK,
        url=url,
        least_broker=Least(
            survives="machine crash",
            settle_confirmed=True,
            counts_deliveries=True,
            order="partition",
        ),
    )


pytestmark = pytest.mark.full


class TestKafkaShareBroker(DeliveringContract, LeaseContract):
    """What share groups do in their own way."""


REST = tuple(
    each for each in BrokerContract.__bases__ if each not in TestKafkaShareBroker.__bases__
)
TestKafkaShareRest = type("TestKafkaShareRest", REST, {})


class TestKafkaShareBackend(BackendContract):
    pass


class TestKafkaShareAndPostgres(PoisonContract):
    """The counts of the server and of the engine together."""

    @pytest.fixture
    def subject(self, kafka_server: Service, postgres_server: Service) -> Subject:
        return Subject(
            broker=share_groups(kafka_server),
            storage=Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url}),
            lease=LEASE,
        )


class TestKafkaShareAndRedis(CompositionContract):
    @pytest.fixture
    def subject(self, kafka_server: Service, redis_server: Service) -> Subject:
        return Subject(
            broker=share_groups(kafka_server),
            storage=Part("qtasks_redis:RedisStorage", {"url": redis_server.url}),
            lease=LEASE,
        )
