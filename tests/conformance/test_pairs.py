"""The kit on pairs of parts that have no server in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtasks_conformance import CompositionContract, Part, Subject
from tests.services import Service


class TestKafkaAndPostgres(CompositionContract):
    @pytest.fixture
    def subject(self, kafka_server: Service, postgres_server: Service) -> Subject:
        return Subject(
            broker=Part("qtasks_kafka:KafkaBroker", {"url": kafka_server.url, "lease": 3.0}),
            storage=Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url}),
            lease=3.0,
            slack=6.0,
        )


class TestRabbitMQAndRedis(CompositionContract):
    @pytest.fixture
    def subject(self, rabbitmq_server: Service, redis_server: Service) -> Subject:
        return Subject(
            broker=Part(
                "qtasks_rabbitmq:RabbitMQBroker", {"url": rabbitmq_server.url, "lease": 3.0}
            ),
            storage=Part("qtasks_redis:RedisStorage", {"url": redis_server.url}),
            lease=3.0,
        )


class TestSqliteAndSqlite(CompositionContract):
    """Two files: the pair cannot be joined in one transaction."""

    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        return Subject(
            broker=Part(
                "qtasks_sqlite:SqliteBroker",
                {"url": f"sqlite:///{tmp_path}/messages.db", "lease": 1.5},
            ),
            storage=Part("qtasks_sqlite:SqliteStorage", {"url": f"sqlite:///{tmp_path}/tasks.db"}),
            lease=1.5,
        )


class TestMemoryAndSqlite(CompositionContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        return Subject(
            broker=Part("qtasks_memory:MemoryBroker", {"lease": 1.0}),
            storage=Part("qtasks_sqlite:SqliteStorage", {"url": f"sqlite:///{tmp_path}/tasks.db"}),
            lease=1.0,
            ends_with_process=True,
        )


class TestSqliteAndMemory(CompositionContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        return Subject(
            broker=Part(
                "qtasks_sqlite:SqliteBroker",
                {"url": f"sqlite:///{tmp_path}/messages.db", "lease": 1.5},
            ),
            storage=Part("qtasks_memory:MemoryStorage"),
            lease=1.5,
            ends_with_process=True,
        )
