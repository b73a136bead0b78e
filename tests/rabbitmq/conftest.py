"""What the tests of the RabbitMQ backend share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from uuid_utils import uuid4

from qtasks_rabbitmq import RabbitMQBroker
from tests.services import Service


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def broker(rabbitmq_server: Service, namespace: str) -> AsyncIterator[RabbitMQBroker]:
    broker = RabbitMQBroker(rabbitmq_server.url, lease=3.0)
    await broker.start(namespace)
    yield broker
    await broker.stop()
