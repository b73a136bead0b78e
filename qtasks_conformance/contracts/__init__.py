"""The four contracts to subclass. Each is put together from one module per subject."""

from __future__ import annotations

import pytest

# pytest explains failed assertions only in modules named `test_…`, unless others are registered.
for _module in (
    "backends", "cancelling", "claims", "commands", "declared_broker", "declared_storage", "delays",
    "delivering", "depth", "faults", "freezing", "idling", "inboxes", "keys", "leases", "migrating",
    "outages", "pairs", "poison", "querying", "records", "repeating", "retention", "streams",
    "submitting", "transactions", "undecodable", "values",
):  # fmt: skip
    pytest.register_assert_rewrite(f"{__name__}.{_module}")
pytest.register_assert_rewrite("qtasks_conformance.waiting")

from qtasks_conformance.contracts.backends import BackendContract  # noqa: E402
from qtasks_conformance.contracts.cancelling import CancellingContract  # noqa: E402
from qtasks_conformance.contracts.claims import ClaimContract  # noqa: E402
from qtasks_conformance.contracts.commands import CommandContract  # noqa: E402
from qtasks_conformance.contracts.declared_broker import DeclaredBrokerContract  # noqa: E402
from qtasks_conformance.contracts.declared_storage import DeclaredStorageContract  # noqa: E402
from qtasks_conformance.contracts.delays import DelayContract  # noqa: E402
from qtasks_conformance.contracts.delivering import DeliveringContract  # noqa: E402
from qtasks_conformance.contracts.depth import DepthContract  # noqa: E402
from qtasks_conformance.contracts.faults import FaultContract  # noqa: E402
from qtasks_conformance.contracts.freezing import (  # noqa: E402
    BrokerFreezeContract,
    StorageFreezeContract,
)
from qtasks_conformance.contracts.idling import (  # noqa: E402
    BrokerIdleContract,
    StorageIdleContract,
)
from qtasks_conformance.contracts.inboxes import InboxContract  # noqa: E402
from qtasks_conformance.contracts.keys import KeyContract  # noqa: E402
from qtasks_conformance.contracts.leases import LeaseContract  # noqa: E402
from qtasks_conformance.contracts.migrating import (  # noqa: E402
    BrokerMigrationContract,
    StorageMigrationContract,
)
from qtasks_conformance.contracts.outages import (  # noqa: E402
    BrokerOutageContract,
    StorageOutageContract,
)
from qtasks_conformance.contracts.pairs import ComposingContract  # noqa: E402
from qtasks_conformance.contracts.poison import PoisonContract  # noqa: E402
from qtasks_conformance.contracts.querying import QueryContract  # noqa: E402
from qtasks_conformance.contracts.records import RecordContract  # noqa: E402
from qtasks_conformance.contracts.repeating import (  # noqa: E402
    BrokerRepeatContract,
    CompositionRepeatContract,
    StorageRepeatContract,
)
from qtasks_conformance.contracts.retention import RetentionContract  # noqa: E402
from qtasks_conformance.contracts.streams import StreamContract  # noqa: E402
from qtasks_conformance.contracts.submitting import SubmittingContract  # noqa: E402
from qtasks_conformance.contracts.transactions import (  # noqa: E402
    BrokerTransactionContract,
    CompositionTransactionContract,
    StorageTransactionContract,
)
from qtasks_conformance.contracts.undecodable import UndecodableContract  # noqa: E402
from qtasks_conformance.contracts.values import ValueContract  # noqa: E402


class BrokerContract(
    DeclaredBrokerContract,
    DeliveringContract,
    LeaseContract,
    DelayContract,
    CancellingContract,
    FaultContract,
    BrokerRepeatContract,
    BrokerIdleContract,
    UndecodableContract,
    DepthContract,
    CommandContract,
    BrokerMigrationContract,
    BrokerTransactionContract,
    BrokerOutageContract,
    BrokerFreezeContract,
):
    """Everything that a broker must do.

        class TestMyBroker(BrokerContract): ...

    Needs a fixture `subject` that returns a `Subject`.
    """


class StorageContract(
    DeclaredStorageContract,
    RecordContract,
    InboxContract,
    StorageRepeatContract,
    StorageIdleContract,
    QueryContract,
    ClaimContract,
    ValueContract,
    StreamContract,
    RetentionContract,
    StorageMigrationContract,
    StorageTransactionContract,
    StorageOutageContract,
    StorageFreezeContract,
):
    """Everything that a storage must do.

        class TestMyStorage(StorageContract): ...

    Needs a fixture `subject` that returns a `Subject`.
    """


class CompositionContract(
    ComposingContract,
    SubmittingContract,
    KeyContract,
    CompositionTransactionContract,
    CompositionRepeatContract,
    PoisonContract,
):
    """Everything that a broker and a storage must do together.

        class TestMyPair(CompositionContract): ...

    Needs a fixture `subject` that returns a `Subject`. It tests the joint composition if the broker
    has one with this storage, else the default composition.
    """


__all__ = ["BackendContract", "BrokerContract", "CompositionContract", "StorageContract"]
