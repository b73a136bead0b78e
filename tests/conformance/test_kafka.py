"""The kit on the Kafka backend: a consumer group as the broker, a log as the storage."""

import pytest
from aiokafka import AIOKafkaProducer

from qtasks_conformance import (
    BackendContract,
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    StorageContract,
    Subject,
)
from qtasks_kafka.connection import topic_name
from tests.services import Service

LEASE = 2.0


@pytest.fixture
def subject(kafka_server: Service) -> Subject:
    async def inject(namespace: str, queue: str, data: bytes) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=kafka_server.url.removeprefix("kafka://"))
        await producer.start()
        await producer.send_and_wait(topic_name(namespace, "queue", queue), data)
        await producer.stop()

    return Subject(
        broker=Part("qtasks_kafka:KafkaBroker", {"url": kafka_server.url, "lease": LEASE}),
        storage=Part("qtasks_kafka:KafkaStorage", {"url": kafka_server.url}),
        lease=LEASE,
        inject=inject,
        server=kafka_server,
        driver="aiokafka",
        url=kafka_server.url,
        options=("lease", "partitions", "replicas", "retention", "sasl_mechanism"),
        least_broker=Least(survives="machine crash", settle_confirmed=True, order="partition"),
        least_storage=Least(survives="machine crash", settle_confirmed=True),
    )


class TestKafkaBroker(BrokerContract):
    pass


class TestKafkaStorage(StorageContract):
    pass


class TestKafkaPair(CompositionContract):
    pass


class TestKafkaBackend(BackendContract):
    pass
