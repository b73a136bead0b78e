"""Chooses an app's broker and storage: by arguments, by the environment, or SQLite."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from qtasks_core import Broker, Storage
from qtasks_core.errors import ConfigurationError
from qtasks_core.lookup import resolve_broker, resolve_storage

logger = logging.getLogger("qtasks")


def given_parts(
    broker: Broker | str | None, storage: Storage | str | None
) -> tuple[Broker | str, Storage | str]:
    """Return the broker and the storage: from the arguments, the environment, or else SQLite.

    A broker's URL without a storage is used for both. Raises `ConfigurationError` for a storage
    without a broker, and for a broker object without a storage.
    """
    if broker is None:
        broker = os.environ.get("QTASKS_BROKER_URL") or None
        if storage is None:
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
    return broker, storage


def built_parts(broker: Broker | str, storage: Storage | str) -> tuple[Broker, Storage]:
    """Return the broker and the storage; build new ones if they were given as URLs."""
    return (
        resolve_broker(broker) if isinstance(broker, str) else broker,
        resolve_storage(storage) if isinstance(storage, str) else storage,
    )


def _default_path() -> Path:
    """Return the absolute path of the default SQLite file (XDG base directory specification).

    Raises `ConfigurationError` if its directory cannot be made.
    """
    base = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA") or "~/.local/share"
    try:
        directory = Path(base).expanduser().absolute() / "qtasks"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        raise ConfigurationError(
            f"no place for the embedded default ({error}): set QTASKS_BROKER_URL, "
            "or XDG_DATA_HOME to a directory that can be written"
        ) from error
    return directory / "qtasks.db"
