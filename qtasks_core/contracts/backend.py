"""The contract of a Backend: what a package registers for a URL scheme."""

from __future__ import annotations

from abc import ABC, abstractmethod

from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.storage import Storage

CONTRACT_VERSION = 1
"""Raised when a contract changes so that an older backend would not fit."""


class Backend(ABC):
    """Named by an entry point in the group `qtasks.backends`, a line a scheme.

    Importing it, and building its parts, must not import a driver: that happens in `start`. Both
    parts use the whole URL, and show its password nowhere. An option that does not exist is
    refused with `ConfigurationError` that lists those that do, here or in `start`.
    """

    @property
    @abstractmethod
    def contract(self) -> int:
        """The `CONTRACT_VERSION` this backend was written for, as a literal."""

    @abstractmethod
    def broker(self, url: str) -> Broker:
        """Return a broker for `url`. Raises `ConfigurationError` when the URL is wrong."""

    @abstractmethod
    def storage(self, url: str) -> Storage:
        """Return a storage for `url`. Raises `ConfigurationError` when the URL is wrong."""
