"""Brokers made of others, as the kit builds them in its processes."""

from __future__ import annotations

from qtasks.compose import FailoverBroker, MigratingBroker, RoutedBroker, ShardedBroker
from qtasks_core import Broker
from qtasks_core.lookup import resolve_broker


def parts(*urls: str, lease: float) -> list[Broker]:
    return [resolve_broker(f"{url}?lease={lease}") for url in urls]


class Routed(RoutedBroker):
    """Has the queue `q`, which most tests use, and one more on another broker than the default."""

    def __init__(self, one: str, other: str, lease: float) -> None:
        default, others = parts(one, other, lease=lease)
        super().__init__(default, {"q": others, "held": others})


class Migrating(MigratingBroker):
    def __init__(self, one: str, other: str, lease: float) -> None:
        super().__init__(*parts(one, other, lease=lease))


class Failover(FailoverBroker):
    def __init__(self, one: str, other: str, lease: float) -> None:
        super().__init__(*parts(one, other, lease=lease))


class Sharded(ShardedBroker):
    def __init__(self, one: str, other: str, lease: float) -> None:
        first, second = parts(one, other, lease=lease)
        super().__init__({"first": first, "second": second})
