"""Which parts an app is made of: those it is given, else the environment's, else the default."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from qtasks_core import Broker, Storage
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker, resolve_storage

logger = logging.getLogger("qtasks")


class Parts(NamedTuple):
    """A broker and a storage, as objects or as the URLs they are made from."""

    broker: Broker | str
    storage: Storage | str

    def made(self) -> tuple[Broker, Storage]:
        """Return the two as objects."""
        return (
            resolve_broker(self.broker) if isinstance(self.broker, str) else self.broker,
            resolve_storage(self.storage) if isinstance(self.storage, str) else self.storage,
        )

    def made_anew(self) -> tuple[Broker, Storage]:
        """Return two that share nothing with those made before. Raises `ConfigurationError`."""
        for part in self:
            if not isinstance(part, str):
                raise ConfigurationError(
                    f"this process was forked while {type(part).__name__} was in use: give the "
                    "app URLs, from which it makes new parts, or stop it before the fork"
                )
        return self.made()


def find_parts(broker: Broker | str | None, storage: Storage | str | None) -> Parts:
    """Return the parts that the arguments name, else the environment, else the default."""
    if broker is None and storage is None:
        broker = os.environ.get("QTASKS_BROKER_URL") or None
        storage = os.environ.get("QTASKS_STORAGE_URL") or None
        if broker is None and storage is None:
            broker = f"sqlite:///{_default_path()}"
            logger.warning("no broker is configured; using the embedded default, %s", broker)
    if broker is None:
        raise ConfigurationError("a storage without a broker: set QTASKS_BROKER_URL, or broker=")
    if storage is None:
        if not isinstance(broker, str):
            raise ConfigurationError(f"{type(broker).__name__} needs storage= beside it")
        storage = broker
    return Parts(broker, storage)


def _default_path() -> Path:
    """Return the absolute path of the embedded default (XDG base directory specification)."""
    base = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    directory = (Path(base) if base else Path.home() / ".local" / "share") / "qtasks"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / "qtasks.db"
