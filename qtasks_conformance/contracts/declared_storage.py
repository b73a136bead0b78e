"""A storage is what its guarantees say, and no less than what is pinned for it."""

from __future__ import annotations

from typing import Any

import pytest

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.declaring import (
    assert_abstract_methods_are_missed,
    assert_at_least,
    assert_declared,
    assert_driver_comes_late,
    optional_methods,
)
from qtasks_conformance.rig import Rig, new_uuid
from qtasks_conformance.subject import Subject
from qtasks_core import Claim, Storage, TaskQuery


class DeclaredStorageContract(Contract):
    """The guarantees of a storage, and the methods that it may leave out."""

    async def test_guarantees_are_no_less_than_pinned(self, rig: Rig) -> None:
        """Each backend's least guarantees are pinned, so that declaring less passes no more."""
        storage = await rig.storage()
        assert_at_least(storage.guarantees, rig.subject.least_storage)

    async def test_missing_methods_are_named_when_it_is_built(self, subject: Subject) -> None:
        """A class that leaves out an abstract method fails when it is built, naming it."""
        assert_abstract_methods_are_missed(subject.storage, Storage)

    async def test_the_driver_is_imported_late(self, subject: Subject) -> None:
        """Importing and building it, and asking for its guarantees, imports no driver."""
        await assert_driver_comes_late(subject.storage, subject.driver)

    @pytest.mark.parametrize("method", optional_methods(Storage))
    async def test_unsupported_is_what_raises(self, rig: Rig, method: str) -> None:
        """A method raises `NotSupported` exactly when the guarantees list it."""
        storage = await rig.storage()
        uuid = new_uuid()
        calls: dict[str, Any] = {
            "query": lambda: storage.query(TaskQuery()),
            "claim": lambda: storage.claim("key", "owner", 1.0),
            "release": lambda: storage.release(Claim("key", "owner", 0.0)),
            "set": lambda: storage.set("key", b"value"),
            "get_value": lambda: storage.get_value("key"),
            "values": lambda: storage.values("k"),
            "watch_value": lambda: anext(storage.watch_value("key")),
            "append": lambda: storage.append(uuid, [b"item"]),
            "read": lambda: storage.read(uuid, 0),
            "delete": lambda: storage.delete([uuid]),
            "expire": lambda: storage.expire(),
            "migrate": lambda: storage.migrate(),
        }
        await assert_declared(calls[method], method, storage.guarantees.unsupported)

    async def test_nothing_unknown_is_declared_unsupported(self, rig: Rig) -> None:
        """What is abstract cannot be left out, and what does not exist is a slip of the pen."""
        storage = await rig.storage()
        assert set(storage.guarantees.unsupported) <= set(optional_methods(Storage))
