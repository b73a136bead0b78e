"""Brokers and storages that are made of others."""

from qtasks.compose.routed import RoutedBroker

__all__ = ["RoutedBroker"]
