"""What the tests of the Kafka backend share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from uuid_utils import uuid4

from tests.conftest import serve
from tests.services import Service
from tests.services.kafka import asking
from tests.services.secured_kafka import SecuredKafka


@pytest.fixture(scope="session")
def secured(pytestconfig: pytest.Config) -> Iterator[SecuredKafka]:
    for server in serve(pytestconfig, "secured kafka", SecuredKafka()):
        assert isinstance(server, SecuredKafka)
        yield server


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def admin(kafka_server: Service) -> AsyncIterator[AIOKafkaAdminClient]:
    async with asking(kafka_server.url) as client:
        yield client
