"""Brokers and storages that are made of two others, as the kit builds them in its processes."""

from __future__ import annotations

from qtasks.compose import (
    FailoverBroker,
    MigratingBroker,
    MigratingStorage,
    RoutedBroker,
    ShardedBroker,
    TieredStorage,
)
from qtasks_core import Broker
from qtasks_core.lookup import resolve_broker
from qtasks_core.records import RETENTION
from qtasks_postgres import OutboxBroker, PostgresBroker


def members(*urls: str, lease: float) -> list[Broker]:
    return [resolve_broker(f"{url}?lease={lease}") for url in urls]


class Routed(RoutedBroker):
    """The queue `q`, which most tests use, is not at the default. Nor is `held`."""

    def __init__(self, one: str, other: str, lease: float) -> None:
        default, routed = members(one, other, lease=lease)
        super().__init__(default, {"q": routed, "held": routed})


class Sharded(ShardedBroker):
    def __init__(self, one: str, other: str, lease: float) -> None:
        first, second = members(one, other, lease=lease)
        super().__init__({"first": first, "second": second})


class Migrating(MigratingBroker):
    def __init__(self, one: str, other: str, lease: float) -> None:
        super().__init__(*members(one, other, lease=lease))


class Failover(FailoverBroker):
    def __init__(self, one: str, other: str, lease: float) -> None:
        super().__init__(*members(one, other, lease=lease))


class Outbox(OutboxBroker):
    def __init__(self, one: str, other: str, lease: float) -> None:
        outbox, broker = members(one, other, lease=lease)
        assert isinstance(outbox, PostgresBroker)
        super().__init__(outbox, broker)


class MigratingRecords(MigratingStorage):
    def __init__(self, one: str, other: str, retention: float | None = RETENTION) -> None:
        kept = "none" if retention is None else retention
        super().__init__(f"{one}?retention={kept}", f"{other}?retention={kept}")


class Tiered(TieredStorage):
    """`expire` moves every finished record."""

    def __init__(self, one: str, other: str, retention: float | None = RETENTION) -> None:
        kept = "none" if retention is None else retention
        super().__init__(f"{one}?retention={kept}", f"{other}?retention={kept}", after=0)
