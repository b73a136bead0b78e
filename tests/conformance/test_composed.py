"""The kit on brokers and storages that are made of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from qtasks_conformance import (
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    StorageContract,
    Subject,
)
from qtasks_conformance.contracts.cancelling import CancellingContract
from qtasks_conformance.contracts.commands import CommandContract
from qtasks_conformance.contracts.delivering import DeliveringContract
from qtasks_conformance.contracts.repeating import BrokerRepeatContract
from qtasks_conformance.contracts.transactions import (
    BrokerTransactionContract,
    CompositionTransactionContract,
)
from tests.conformance.test_pairs import Both
from tests.conformance.test_postgres import postgres_subject
from tests.services import Service

LEASE = 1.0

ROUTED = Least(
    survives="server crash",
    settle_confirmed=True,
    counts_deliveries=True,
    priorities=True,
    leases_survive=True,
    order="queue",
)
SHARDED = replace(ROUTED, priorities=False, order="none", atomic_retries=True)
MIGRATING = replace(SHARDED, atomic_retries=False)


class Composed:
    """A broker on two others, with a storage that is on neither."""

    kind: ClassVar[str]
    least: ClassVar[Least]

    def composed(self, one: str, other: str, storage: Part) -> Subject:
        urls = {"one": one, "other": other, "lease": LEASE}
        return Subject(
            broker=Part(f"tests.conformance.composed:{self.kind}", urls),
            storage=storage,
            lease=LEASE,
            least_broker=self.least,
        )


class Routed(Composed):
    kind, least = "Routed", ROUTED


class Sharded(Composed):
    kind, least = "Sharded", SHARDED


class Migrating(Composed):
    kind, least = "Migrating", MIGRATING


class Failover(Composed):
    kind, least = "Failover", SHARDED


class OnTwoFiles(Composed):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        one, other, records = (f"sqlite:///{tmp_path}/{name}.db" for name in "abc")
        return self.composed(one, other, Part("qtasks_sqlite:SqliteStorage", {"url": records}))


class InMemory(Composed):
    @pytest.fixture
    def subject(self) -> Subject:
        subject = self.composed(
            "memory://one", "memory://other", Part("qtasks_memory:MemoryStorage")
        )
        least = replace(self.least, survives="nothing", leases_survive=False)
        return replace(subject, ends_with_process=True, least_broker=least)


class OnTwoServers(Composed):
    """Redis and PostgreSQL, which are killed and frozen together."""

    @pytest.fixture
    def subject(self, redis_server: Service, postgres_server: Service) -> Subject:
        storage = Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url})
        subject = self.composed(redis_server.url, postgres_server.url, storage)
        return replace(subject, server=Both(redis_server, postgres_server))


class TestRoutedOnTwoFiles(
    Routed, OnTwoFiles, DeliveringContract, BrokerRepeatContract, CancellingContract
):
    """What a composed broker does itself."""


class TestShardedInMemory(Sharded, InMemory, DeliveringContract, CancellingContract):
    pass


class TestMigratingInMemory(Migrating, InMemory, DeliveringContract, CommandContract):
    pass


class TestFailoverInMemory(Failover, InMemory, DeliveringContract, CommandContract):
    pass


REST = tuple(
    each for each in BrokerContract.__bases__ if each not in TestRoutedOnTwoFiles.__bases__
)
TestRoutedRest = pytest.mark.full(type("TestRoutedRest", (Routed, OnTwoFiles, *REST), {}))


@pytest.mark.full
class TestShardedOnTwoFiles(Sharded, OnTwoFiles, BrokerContract):
    pass


@pytest.mark.full
class TestMigratingOnTwoFiles(Migrating, OnTwoFiles, BrokerContract):
    pass


@pytest.mark.full
class TestFailoverOnTwoFiles(Failover, OnTwoFiles, BrokerContract):
    pass


@pytest.mark.full
class TestFailoverPair(Failover, OnTwoFiles, CompositionContract):
    pass


@pytest.mark.full
class TestRoutedPair(Routed, OnTwoFiles, CompositionContract):
    pass


@pytest.mark.full
class TestShardedPair(Sharded, OnTwoFiles, CompositionContract):
    pass


@pytest.mark.full
class TestMigratingPair(Migrating, OnTwoFiles, CompositionContract):
    pass


@pytest.mark.full
class TestRoutedOnTwoServers(Routed, OnTwoServers, BrokerContract):
    pass


@pytest.mark.full
class TestShardedOnTwoServers(Sharded, OnTwoServers, BrokerContract):
    pass


@pytest.mark.full
class TestFailoverOnTwoServers(Failover, OnTwoServers, BrokerContract):
    pass


@pytest.mark.full
class TestMigratingOnTwoServers(Migrating, OnTwoServers, BrokerContract):
    pass


class Records:
    """A storage on two others, with a broker that is on neither."""

    kind: ClassVar[str] = "MigratingRecords"

    def on(self, one: str, other: str, broker: Part) -> Subject:
        return Subject(
            broker=broker.but(lease=LEASE),
            storage=Part(f"tests.conformance.composed:{self.kind}", {"one": one, "other": other}),
            lease=LEASE,
            least_storage=Least(survives="server crash", settle_confirmed=True),
        )


class RecordsInMemory(Records):
    @pytest.fixture
    def subject(self) -> Subject:
        subject = self.on("memory://one", "memory://other", Part("qtasks_memory:MemoryBroker"))
        least = Least(settle_confirmed=True)
        return replace(subject, ends_with_process=True, least_storage=least)


class TestMigratingRecordsInMemory(RecordsInMemory, StorageContract):
    pass


class TestTieredInMemory(RecordsInMemory, StorageContract):
    kind = "Tiered"


class RecordsInTwoFiles(Records):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        one, other, messages = (f"sqlite:///{tmp_path}/{name}.db" for name in "abc")
        return self.on(one, other, Part("qtasks_sqlite:SqliteBroker", {"url": messages}))


@pytest.mark.full
class TestMigratingRecordsInTwoFiles(RecordsInTwoFiles, StorageContract):
    pass


@pytest.mark.full
class TestMigratingRecordsPair(RecordsInTwoFiles, CompositionContract):
    pass


@pytest.mark.full
class TestTieredInTwoFiles(RecordsInTwoFiles, StorageContract):
    kind = "Tiered"


@pytest.mark.full
class TestTieredPair(RecordsInTwoFiles, CompositionContract):
    kind = "Tiered"


class RecordsOnTwoServers(Records):
    @pytest.fixture
    def subject(self, redis_server: Service, postgres_server: Service) -> Subject:
        broker = Part("qtasks_postgres:PostgresBroker", {"url": postgres_server.url})
        subject = self.on(redis_server.url, postgres_server.url, broker)
        return replace(subject, server=Both(redis_server, postgres_server))


@pytest.mark.full
class TestMigratingRecordsOnTwoServers(RecordsOnTwoServers, StorageContract):
    pass


@pytest.mark.full
class TestTieredOnTwoServers(RecordsOnTwoServers, StorageContract):
    kind = "Tiered"


class Outbox(Composed):
    """On Postgres and Redis. Most tests see only the broker that it leads to."""

    kind = "Outbox"
    least = replace(SHARDED, priorities=True, transactions=True)

    @pytest.fixture
    def subject(self, redis_server: Service, postgres_server: Service) -> Subject:
        storage = Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url})
        subject = self.composed(postgres_server.url, redis_server.url, storage)
        begin = postgres_subject(postgres_server).begin
        return replace(subject, server=Both(redis_server, postgres_server), begin=begin)


class TestOutboxMessages(Outbox, BrokerTransactionContract):
    pass


class TestOutboxTasks(Outbox, CompositionTransactionContract):
    pass


@pytest.mark.full
class TestOutboxBroker(Outbox, BrokerContract):
    pass


@pytest.mark.full
class TestOutboxPair(Outbox, CompositionContract):
    pass
