"""The conformance kit: the contracts of brokers and storages as tests for your backend.

Write one fixture that names the classes to test, subclass the contracts, and run pytest:

    from qtasks_conformance import (
        BackendContract, BrokerContract, CompositionContract, Part, StorageContract, Subject,
    )

    @pytest.fixture
    def subject() -> Subject:
        return Subject(
            broker=Part("my_package:MyBroker", {"url": "my://…", "lease": 2.0}),
            storage=Part("my_package:MyStorage", {"url": "my://…"}),
            lease=2.0,
            url="my://…",
        )

    class TestMyBroker(BrokerContract): ...
    class TestMyStorage(StorageContract): ...
    class TestMyPair(CompositionContract): ...
    class TestMyBackend(BackendContract): ...

`BrokerContract` tests a broker, `StorageContract` a storage, `CompositionContract` both together,
and `BackendContract` the backend that is registered for a URL. Leave out what you do not need.

Install the extra `conformance` (pytest and pytest-asyncio). No options are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtasks_conformance.patience import SlowPass
from qtasks_conformance.subject import Least, Part, Server, Subject

if TYPE_CHECKING:
    from qtasks_conformance.contracts import (
        BackendContract,
        BrokerContract,
        CompositionContract,
        StorageContract,
    )

__all__ = [
    "BackendContract",
    "BrokerContract",
    "CompositionContract",
    "Least",
    "Part",
    "Server",
    "SlowPass",
    "StorageContract",
    "Subject",
]


def __getattr__(name: str) -> Any:
    """Import the contracts on first use: child processes import this package without pytest."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qtasks_conformance import contracts

    return getattr(contracts, name)
