"""The kit on the memory backend, which ends with its process and is let off the kills.

It keeps no bytes, and no other program can reach it: so nothing in it is ever undecodable.
"""

import pytest

from qtasks_conformance import (
    BackendContract,
    BrokerContract,
    CompositionContract,
    Least,
    Part,
    StorageContract,
    Subject,
)


@pytest.fixture
def subject() -> Subject:
    return Subject(
        broker=Part("qtasks_memory:MemoryBroker", {"lease": 1.0}),
        storage=Part("qtasks_memory:MemoryStorage"),
        lease=1.0,
        ends_with_process=True,
        url="memory://one",
        other_url="memory://other",
        options=("lease", "retention"),
        least_broker=Least(
            settle_confirmed=True,
            atomic_retries=True,
            counts_deliveries=True,
            priorities=True,
            order="queue",
        ),
        least_storage=Least(settle_confirmed=True),
    )


class TestMemoryBroker(BrokerContract):
    pass


class TestMemoryStorage(StorageContract):
    pass


class TestMemoryPair(CompositionContract):
    pass


class TestMemoryBackend(BackendContract):
    pass
