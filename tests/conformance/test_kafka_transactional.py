"""The kit on Kafka's transactions: the broker alone, with its log storage, and with another one.

Its storage is that of `kafka://`, so only the broker and the pairs are tested here.
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
from tests.conformance.test_kafka import LEASE, kafka_subject
from tests.services import Service

SLACK = 16.0
"""Seconds. A process that dies within a transaction holds up the readers of its partitions until
the server has aborted it."""


def transactional(server: Service) -> Part:
    return Part("qtasks_kafka:TransactionalKafkaBroker", {"url": server.url, "lease": LEASE})


@pytest.fixture
def subject(kafka_server: Service) -> Subject:
    return replace(
        kafka_subject(kafka_server),
        broker=transactional(kafka_server),
        slack=SLACK,
        url=kafka_server.url.replace("kafka://", "kafka+transactional://"),
        least_broker=Least(
            survives="machine crash",
            settle_confirmed=True,
            atomic_retries=True,
            order="partition",
        ),
    )


pytestmark = pytest.mark.full


class TestKafkaTransactionalBroker(BrokerContract):
    pass


class TestKafkaTransactionalPair(CompositionContract):
    pass


class TestKafkaTransactionalBackend(BackendContract):
    pass


class TestKafkaTransactionalAndRedis(CompositionContract):
    """Two servers: a separate composition, whose retries are one step all the same."""

    @pytest.fixture
    def subject(self, kafka_server: Service, redis_server: Service) -> Subject:
        return Subject(
            broker=transactional(kafka_server),
            storage=Part("qtasks_redis:RedisStorage", {"url": redis_server.url}),
            lease=LEASE,
            slack=SLACK,
        )
