"""The kit on pairs of parts that have no server in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qtasks_conformance import (
    BrokerContract,
    CompositionContract,
    Part,
    StorageContract,
    Subject,
)
from tests.conformance.test_postgres import postgres_subject
from tests.conformance.test_redis import redis_subject
from tests.services import Service


@dataclass(frozen=True)
class Both:
    """Two servers that are killed and frozen as one."""

    one: Service
    other: Service

    def kill(self) -> None:
        self.one.kill()
        self.other.kill()

    def restart(self) -> None:
        self.one.restart()
        self.other.restart()

    def freeze(self) -> None:
        self.one.freeze()
        self.other.freeze()

    def thaw(self) -> None:
        self.one.thaw()
        self.other.thaw()


class Pair:
    """Two parts of servers that go away together."""

    driver: str | None = None
    broker: str
    """The server of the messages; the records are on the other."""

    @pytest.fixture
    def subject(self, redis_server: Service, postgres_server: Service) -> Subject:
        redis, postgres = redis_subject(redis_server), postgres_subject(postgres_server)
        one, other = (redis, postgres) if self.broker == "redis" else (postgres, redis)
        return replace(
            postgres,
            broker=one.broker,
            least_broker=one.least_broker,
            inject=one.inject,
            storage=other.storage,
            least_storage=other.least_storage,
            spoil=other.spoil,
            server=Both(redis_server, postgres_server),
            driver=self.driver,
        )


class RedisAndPostgres(Pair):
    """Messages on Redis, records in Postgres."""

    broker = "redis"


class PostgresAndRedis(Pair):
    """Messages in Postgres, records on Redis."""

    broker = "postgres"


class TestRedisAndPostgres(RedisAndPostgres, CompositionContract):
    pass


class TestPostgresAndRedis(PostgresAndRedis, CompositionContract):
    pass


# Alone, each half is tested with its own pair. Here its neighbour goes away with it.
@pytest.mark.full
class TestBrokerOfRedisAndPostgres(RedisAndPostgres, BrokerContract):
    driver = "redis"


@pytest.mark.full
class TestStorageOfRedisAndPostgres(RedisAndPostgres, StorageContract):
    driver = "asyncpg"


@pytest.mark.full
class TestBrokerOfPostgresAndRedis(PostgresAndRedis, BrokerContract):
    driver = "asyncpg"


@pytest.mark.full
class TestStorageOfPostgresAndRedis(PostgresAndRedis, StorageContract):
    driver = "redis"


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
