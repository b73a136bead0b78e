"""The answer of brokers and storages that cannot join a caller's transaction."""

from __future__ import annotations

from typing import Literal, NoReturn

from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.storage import Storage
from qtasks_core.errors import NotSupported
from qtasks_core.lookup import installed_parts


def refuse_pair(broker: Broker, storage: Storage) -> NoReturn:
    """Raise `NotSupported`, naming the installed pairs that can join a caller's transaction."""
    storages = [told.part for told in installed_parts("storage") if told.transactions]
    able = [
        f"{told.part} with {storage}"
        for told in installed_parts("broker")
        for storage in storages
        if told.transactions and told.part.removesuffix("Broker") == storage.removesuffix("Storage")
    ]
    raise NotSupported(
        f"{type(broker).__name__} with {type(storage).__name__} cannot enqueue in the caller's "
        f"transaction; a pair that can, on one database: {', '.join(able) or 'none is installed'}"
    )


def refuse_transaction(part: Broker | Storage) -> NoReturn:
    """Raise `NotSupported`, naming the installed brokers or storages that can join one."""
    half: Literal["broker", "storage"] = "broker" if isinstance(part, Broker) else "storage"
    able = [told.part for told in installed_parts(half) if told.transactions]
    raise NotSupported(
        f"{type(part).__name__} cannot take part in the caller's transaction; each {half} that "
        f"can: {', '.join(able) or 'none that is installed'}"
    )
