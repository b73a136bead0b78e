"""Brokers that are made of others."""

from qtasks.compose.failover import FailoverBroker
from qtasks.compose.migrating import MigratingBroker
from qtasks.compose.routed import RoutedBroker

__all__ = ["FailoverBroker", "MigratingBroker", "RoutedBroker"]
