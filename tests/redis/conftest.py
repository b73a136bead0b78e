from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from qtasks_redis import RedisStorage
from tests.services import Service


@pytest.fixture
async def server(redis_server: Service) -> AsyncIterator[Redis]:
    client: Redis = Redis.from_url(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
async def storage(redis_server: Service) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url)
    await storage.start(f"storage-{uuid4().hex[:8]}")
    yield storage
    await storage.stop()
