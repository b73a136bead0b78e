"""The answer of brokers and storages that cannot join a caller's transaction."""

from __future__ import annotations

from typing import Literal, NoReturn

from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.storage import Storage
from qtasks_core.errors import NotSupported
from qtasks_core.lookup import installed_parts


def refuse_transaction(part: Broker | Storage) -> NoReturn:
    """Raise `NotSupported`, naming the installed brokers or storages that can join one."""
    half: Literal["broker", "storage"] = "broker" if isinstance(part, Broker) else "storage"
    able = [told.part for told in installed_parts(half) if told.transactions]
    raise NotSupported(
        f"{type(part).__name__} cannot take part in the caller's transaction; each {half} that "
        f"can: {', '.join(able) or 'none that is installed'}"
    )
