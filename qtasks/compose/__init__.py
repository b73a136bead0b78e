"""Brokers and storages that are made of others."""

from qtasks.compose.failover import FailoverBroker
from qtasks.compose.migrating import MigratingBroker
from qtasks.compose.migrating_storage import MigratingStorage
from qtasks.compose.routed import RoutedBroker
from qtasks.compose.sharded import ShardedBroker
from qtasks.compose.tiered import TieredStorage

__all__ = [
    "FailoverBroker",
    "MigratingBroker",
    "MigratingStorage",
    "RoutedBroker",
    "ShardedBroker",
    "TieredStorage",
]
