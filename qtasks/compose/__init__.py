"""Brokers that are made of others."""

from qtasks.compose.failover import FailoverBroker
from qtasks.compose.migrating import MigratingBroker
from qtasks.compose.routed import RoutedBroker
from qtasks.compose.sharded import ShardedBroker

__all__ = ["FailoverBroker", "MigratingBroker", "RoutedBroker", "ShardedBroker"]
