"""Brokers that are made of other brokers."""

from qtasks.compose.migrating import MigratingBroker
from qtasks.compose.routed import RoutedBroker
from qtasks.compose.sharded import ShardedBroker

__all__ = ["MigratingBroker", "RoutedBroker", "ShardedBroker"]
