"""The kit on RabbitMQ: quorum queues, and a log storage on a stream."""

import aiormq
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
from qtasks_rabbitmq.topology import Names
from tests.services import Service


@pytest.fixture
def subject(rabbitmq_server: Service) -> Subject:
    async def inject(namespace: str, queue: str, data: bytes) -> None:
        connection = await aiormq.connect(rabbitmq_server.url)
        channel = await connection.channel()
        await channel.basic_publish(data, routing_key=Names(namespace).queue(queue))
        await connection.close()

    return Subject(
        broker=Part("qtasks_rabbitmq:RabbitMQBroker", {"url": rabbitmq_server.url, "lease": 3.0}),
        storage=Part("qtasks_rabbitmq:RabbitMQStorage", {"url": rabbitmq_server.url}),
        lease=3.0,
        inject=inject,
        server=rabbitmq_server,
        driver="aiormq",
        url=rabbitmq_server.url,
        options=("lease", "retention", "cafile"),
        least_broker=Least(
            survives="machine crash", counts_deliveries=True, priorities=True, order="queue"
        ),
        least_storage=Least(survives="server crash", settle_confirmed=True),
    )


class TestRabbitMQBroker(BrokerContract):
    pass


class TestRabbitMQStorage(StorageContract):
    pass


class TestRabbitMQPair(CompositionContract):
    pass


class TestRabbitMQBackend(BackendContract):
    pass
