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


def kafka_subject(server: Service) -> Subject:
    async def inject(namespace: str, queue: str, data: bytes) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=server.url.removeprefix("kafka://"))
        await producer.start()
        await producer.send_and_wait(topic_name(namespace, "queue", queue), data)
        await producer.stop()

    return Subject(
        broker=Part("qtasks_kafka:KafkaBroker", {"url": server.url, "lease": LEASE}),
        storage=Part("qtasks_kafka:KafkaStorage", {"url": server.url}),
        lease=LEASE,
        inject=inject,
        server=server,
        driver="aiokafka",
        url=server.url,
        options=("lease", "partitions", "replicas", "retention", "sasl_mechanism"),
        least_broker=Least(survives="machine crash", settle_confirmed=True, order="partition"),
        least_storage=Least(survives="machine crash", settle_confirmed=True),
    )


@pytest.fixture
def subject(kafka_server: Service) -> Subject:
    return kafka_subject(kafka_server)


class TestKafkaBroker(BrokerContract):
    pass


class TestKafkaStorage(StorageContract):
    pass


class TestKafkaPair(CompositionContract):
    pass


class TestKafkaBackend(BackendContract):
    pass
