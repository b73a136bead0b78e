"""The kit on brokers that are made of brokers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtasks_conformance import BrokerContract, CompositionContract, Least, Part, Subject
from tests.services import Service

LEASE = 1.0


class Composed:
    kind: str
    survives = "server crash"
    leases_survive = True
    order = "none"
    priorities = False

    def composed(self, one: str, other: str, storage: Part) -> Subject:
        return Subject(
            broker=Part(
                f"tests.conformance.composed:{self.kind}",
                {"one": one, "other": other, "lease": LEASE},
            ),
            storage=storage,
            lease=LEASE,
            least_broker=Least(
                survives=self.survives,  # type: ignore[arg-type]
                settle_confirmed=True,
                counts_deliveries=True,
                priorities=self.priorities,
                leases_survive=self.leases_survive,
                order=self.order,  # type: ignore[arg-type]
            ),
        )


class OnTwoFiles(Composed):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        one, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "other"))
        return self.composed(one, other, Part("qtasks_sqlite:SqliteStorage", {"url": one}))


class OnRedisAndPostgres(Composed):
    survives = "nothing"
    leases_survive = False

    @pytest.fixture
    def subject(self, redis_server: Service, postgres_server: Service) -> Subject:
        storage = Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url})
        return self.composed(redis_server.url, postgres_server.url, storage)


class TestRoutedBroker(OnTwoFiles, BrokerContract):
    kind = "Routed"
    order = "queue"
    priorities = True


class TestRoutedPair(OnTwoFiles, CompositionContract):
    kind = "Routed"
    order = "queue"
    priorities = True


class TestMigratingBroker(OnTwoFiles, BrokerContract):
    kind = "Migrating"


class TestFailoverBroker(OnTwoFiles, BrokerContract):
    kind = "Failover"


class TestShardedBroker(OnTwoFiles, BrokerContract):
    kind = "Sharded"


@pytest.mark.full
class TestRoutedToRedisAndPostgres(OnRedisAndPostgres, BrokerContract):
    kind = "Routed"
    priorities = True


@pytest.mark.full
class TestMigratingFromRedisToPostgres(OnRedisAndPostgres, BrokerContract):
    kind = "Migrating"


@pytest.mark.full
class TestFailoverFromRedisToPostgres(OnRedisAndPostgres, BrokerContract):
    kind = "Failover"


@pytest.mark.full
class TestShardedOnRedisAndPostgres(OnRedisAndPostgres, BrokerContract):
    kind = "Sharded"


@pytest.mark.full
class TestMigratingPair(OnTwoFiles, CompositionContract):
    kind = "Migrating"


@pytest.mark.full
class TestFailoverPair(OnTwoFiles, CompositionContract):
    kind = "Failover"


@pytest.mark.full
class TestShardedPair(OnTwoFiles, CompositionContract):
    kind = "Sharded"
