"""The kit on a share group of Kafka as the broker, alone and with other storages.

Its storage is that of `kafka://`, so only the broker is tested here.
"""

import pytest
from aiokafka import AIOKafkaProducer

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
from qtasks_kafka.connection import topic_name
from tests.services import Service

LEASE = 2.0
SLACK = 6.0
"""Seconds. The first group on a server makes it create the topic with the state of such groups."""


@pytest.fixture
def subject(kafka_server: Service) -> Subject:
    async def inject(namespace: str, queue: str, data: bytes) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=kafka_server.url.removeprefix("kafka://"))
        await producer.start()
        await producer.send_and_wait(topic_name(namespace, "queue", queue), data)
        await producer.stop()

    url = kafka_server.url.replace("kafka://", "kafka+share://")
    return Subject(
        broker=Part("qtasks_kafka:ShareGroupKafkaBroker", {"url": url, "lease": LEASE}),
        storage=Part("qtasks_kafka:KafkaStorage", {"url": url}),
        lease=LEASE,
        slack=SLACK,
        inject=inject,
        server=kafka_server,
        driver="aiokafka",
        url=url,
        options=("lease", "partitions", "replicas", "retention", "sasl_mechanism"),
        least_broker=Least(
            survives="machine crash",
            settle_confirmed=True,
            counts_deliveries=True,
            order="partition",
        ),
        least_storage=Least(survives="machine crash", settle_confirmed=True),
    )


pytestmark = pytest.mark.full


class TestKafkaShareBroker(DeliveringContract, LeaseContract):
    """What share groups do in their own way."""


REST = tuple(
    each for each in BrokerContract.__bases__ if each not in TestKafkaShareBroker.__bases__
)
TestKafkaShareRest = pytest.mark.full(type("TestKafkaShareRest", REST, {}))


@pytest.mark.full
class TestKafkaShareBackend(BackendContract):
    pass


class TestKafkaShareAndPostgres(PoisonContract):
    """The counts of the server and of the engine together."""

    @pytest.fixture
    def subject(self, kafka_server: Service, postgres_server: Service) -> Subject:
        return Subject(
            broker=Part(
                "qtasks_kafka:ShareGroupKafkaBroker", {"url": kafka_server.url, "lease": LEASE}
            ),
            storage=Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url}),
            lease=LEASE,
        )


@pytest.mark.full
class TestKafkaShareAndRedis(CompositionContract):
    @pytest.fixture
    def subject(self, kafka_server: Service, redis_server: Service) -> Subject:
        return Subject(
            broker=Part(
                "qtasks_kafka:ShareGroupKafkaBroker", {"url": kafka_server.url, "lease": LEASE}
            ),
            storage=Part("qtasks_redis:RedisStorage", {"url": redis_server.url}),
            lease=LEASE,
        )
