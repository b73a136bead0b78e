"""The kit on LogStorage over a log in memory; the real logs are tested with their backends."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

import pytest

from qtasks_conformance import Least, Part, StorageContract, Subject
from qtasks_log import LogStorage
from tests.unit.memory_log import MemoryLog, Server

_servers: WeakKeyDictionary[asyncio.AbstractEventLoop, Server] = WeakKeyDictionary()


class MemoryLogStorage(LogStorage):
    """A log storage on a server that lives as long as the event loop."""

    def __init__(self) -> None:
        super().__init__(MemoryLog(Server()))

    async def start(self, namespace: str) -> None:
        loop = asyncio.get_running_loop()
        self._log = MemoryLog(_servers.setdefault(loop, Server(partitions=3)))
        await super().start(namespace)


# Not built yet; what is built is taken off, or its tests would go on being skipped.
STORAGE_LACKS = (
    "query", "claim", "release", "set", "get_value", "values", "watch_value", "append", "read",
    "delete", "expire", "migrate",
)  # fmt: skip


@pytest.fixture
def subject() -> Subject:
    return Subject(
        broker=Part("qtasks_memory:MemoryBroker", {"lease": 1.0}),
        storage=Part("tests.conformance.test_log:MemoryLogStorage"),
        lease=1.0,
        ends_with_process=True,
        least_broker=Least(settle_confirmed=True, counts_deliveries=True, priorities=True),
        least_storage=Least(settle_confirmed=True, lacks=STORAGE_LACKS),
    )


class TestLogStorage(StorageContract):
    pass
