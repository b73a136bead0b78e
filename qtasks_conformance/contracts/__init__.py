"""The three classes to subclass, put together from a file a theme.

Test modules are named for what they test, so pytest is told to explain their assertions too.
"""

from __future__ import annotations

import pytest

for _theme in (
    "cancelling", "declared_broker", "declared_storage", "delays", "delivering", "inboxes",
    "leases", "outages", "pairs", "records",
):  # fmt: skip
    pytest.register_assert_rewrite(f"{__name__}.{_theme}")
pytest.register_assert_rewrite("qtasks_conformance.waiting")

from qtasks_conformance.contracts.cancelling import CancellingContract  # noqa: E402
from qtasks_conformance.contracts.declared_broker import DeclaredBrokerContract  # noqa: E402
from qtasks_conformance.contracts.declared_storage import DeclaredStorageContract  # noqa: E402
from qtasks_conformance.contracts.delays import DelayContract  # noqa: E402
from qtasks_conformance.contracts.delivering import DeliveringContract  # noqa: E402
from qtasks_conformance.contracts.inboxes import InboxContract  # noqa: E402
from qtasks_conformance.contracts.leases import LeaseContract  # noqa: E402
from qtasks_conformance.contracts.outages import (  # noqa: E402
    BrokerOutageContract,
    StorageOutageContract,
)
from qtasks_conformance.contracts.pairs import PairContract  # noqa: E402
from qtasks_conformance.contracts.records import RecordContract  # noqa: E402


class BrokerContract(
    DeclaredBrokerContract,
    DeliveringContract,
    LeaseContract,
    DelayContract,
    CancellingContract,
    BrokerOutageContract,
):
    """All that a Broker must do. Needs a fixture `subject`."""


class StorageContract(
    DeclaredStorageContract, RecordContract, InboxContract, StorageOutageContract
):
    """All that a Storage must do. Needs a fixture `subject`."""


__all__ = ["BrokerContract", "PairContract", "StorageContract"]
