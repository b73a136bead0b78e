"""The kit on LogStorage over a log in memory; the real logs are tested with their backends."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

import pytest

from qtasks_conformance import Least, Part, StorageContract, Subject
from qtasks_core.records import RETENTION
from qtasks_log import LogStorage
from tests.unit.memory_log import MemoryLog, Server

_servers: WeakKeyDictionary[asyncio.AbstractEventLoop, Server] = WeakKeyDictionary()


class MemoryLogStorage(LogStorage):
    """A log storage on a server that lives as long as the event loop."""

    def __init__(self, *, retention: float | None = RETENTION, compacts: bool = True) -> None:
        super().__init__(MemoryLog(Server()), retention=retention)
        self._compacts = compacts

    async def start(self, namespace: str) -> None:
        self._log = self._log_of_this_loop()
        await super().start(namespace)

    async def migrate(self, namespace: str) -> list[str]:
        return await self._log_of_this_loop().migrate(namespace)

    def _log_of_this_loop(self) -> MemoryLog:
        server = _servers.setdefault(asyncio.get_running_loop(), Server(partitions=3))
        return MemoryLog(server, compacts=self._compacts)


@pytest.fixture(params=[True, False], ids=["compacting", "whole"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(
        broker=Part("qtasks_memory:MemoryBroker", {"lease": 1.0}),
        storage=Part("tests.conformance.test_log:MemoryLogStorage", {"compacts": request.param}),
        lease=1.0,
        ends_with_process=True,
        least_broker=Least(settle_confirmed=True, counts_deliveries=True, priorities=True),
        least_storage=Least(settle_confirmed=True),
    )


class TestLogStorage(StorageContract):
    pass
