"""The conformance kit of QTasks, on this backend."""

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
        broker=Part("qtasks_shelf:ShelfBroker", {"lease": 1.0}),
        storage=Part("qtasks_shelf:ShelfStorage"),
        lease=1.0,
        ends_with_process=True,
        url="shelf://one",
        other_url="shelf://other",
        least_broker=Least(
            settle_confirmed=True,
            atomic_retries=True,
            counts_deliveries=True,
            order="queue",
        ),
        least_storage=Least(settle_confirmed=True),
    )


class TestShelfBroker(BrokerContract):
    pass


class TestShelfStorage(StorageContract):
    pass


class TestShelfPair(CompositionContract):
    pass


class TestShelfBackend(BackendContract):
    pass
