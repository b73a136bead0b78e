"""The contract of a Backend: what a package registers for a URL scheme."""

from __future__ import annotations

from abc import ABC, abstractmethod

from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.storage import Storage

CONTRACT_VERSION = 1
"""Increased when a contract changes so that an older backend no longer fits."""


class Backend(ABC):
    """Builds the brokers and storages of a URL scheme.

    A package registers a backend as an entry point in the group `qtasks.backends`, one line for
    each scheme.

    Importing a backend, or building a broker or storage, must not import a driver. `start` imports
    it. The broker and the storage both use the whole URL, and never show its password. An option
    that does not exist raises `ConfigurationError`, here or in `start`. The error lists the options
    that exist.
    """

    @property
    @abstractmethod
    def contract(self) -> int:
        """The `CONTRACT_VERSION` that this backend was written for, as a literal."""

    @abstractmethod
    def broker(self, url: str) -> Broker:
        """Return a broker for `url`. Raises `ConfigurationError` if the URL is wrong."""

    @abstractmethod
    def storage(self, url: str) -> Storage:
        """Return a storage for `url`. Raises `ConfigurationError` if the URL is wrong."""
