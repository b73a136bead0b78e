"""The kit on a share group of Kafka as the broker."""

import pytest
from aiokafka import AIOKafkaProducer

from qtasks_conformance import BackendContract, BrokerContract, Least, Part, Subject
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

    url = kafka_server.url.replace("kafka://", "kafka+share://")
    return Subject(
        broker=Part("qtasks_kafka:ShareGroupKafkaBroker", {"url": url, "lease": LEASE}),
        storage=Part("qtasks_kafka:KafkaStorage", {"url": url}),
        lease=LEASE,
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


class TestKafkaShareBroker(BrokerContract):
    pass


class TestKafkaShareBackend(BackendContract):
    pass
