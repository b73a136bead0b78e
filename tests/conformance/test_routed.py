"""The kit on a broker whose queues are on two brokers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtasks_conformance import BrokerContract, CompositionContract, Least, Part, Subject
from tests.services import Service

LEASE = 1.0
LEAST = Least(
    survives="server crash",
    settle_confirmed=True,
    counts_deliveries=True,
    priorities=True,
    leases_survive=True,
    order="queue",
)


def routed_subject(default: str, others: str, storage: Part, least: Least) -> Subject:
    return Subject(
        broker=Part(
            "tests.conformance.routed:Routed",
            {"default": default, "others": others, "lease": LEASE},
        ),
        storage=storage,
        lease=LEASE,
        least_broker=least,
    )


class OnTwoFiles:
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        one, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "other"))
        return routed_subject(one, other, Part("qtasks_sqlite:SqliteStorage", {"url": one}), LEAST)


class TestRoutedBroker(OnTwoFiles, BrokerContract):
    pass


class TestRoutedPair(OnTwoFiles, CompositionContract):
    pass


@pytest.mark.full
class TestRoutedToRedisAndPostgres(BrokerContract):
    @pytest.fixture
    def subject(self, redis_server: Service, postgres_server: Service) -> Subject:
        return routed_subject(
            redis_server.url,
            postgres_server.url,
            Part("qtasks_postgres:PostgresStorage", {"url": postgres_server.url}),
            Least(
                survives="nothing",
                settle_confirmed=True,
                counts_deliveries=True,
                priorities=True,
            ),
        )
