"""The contracts as tests: subclass them, say in one fixture which parts to test, run pytest.

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

It needs the extra `conformance` (pytest, pytest-asyncio) and no option of either.
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
    """Import the contracts, and with them pytest, only when asked: child processes do not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qtasks_conformance import contracts

    return getattr(contracts, name)
