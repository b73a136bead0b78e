"""A storage declares true guarantees, and no less than the subject pins."""

from __future__ import annotations

from functools import partial

import pytest

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.declaring import (
    Call,
    assert_abstract_methods_are_missed,
    assert_at_least,
    assert_closed,
    assert_declared,
    assert_driver_comes_late,
    assert_missing_driver_is_named,
    optional_methods,
)
from qtasks_conformance.rig import Rig, new_uuid
from qtasks_conformance.subject import Subject
from qtasks_core import Claim, Storage, TaskQuery


class DeclaredStorageContract(Contract):
    """The guarantees of a storage, its optional methods, its driver, and its start and stop."""

    async def test_guarantees_are_no_less_than_pinned(self, rig: Rig) -> None:
        """A storage declares at least what `least_storage` pins.

        Otherwise a storage could pass more tests by declaring less.
        """
        storage = await rig.storage()
        assert_at_least(storage.guarantees, rig.subject.least_storage)

    async def test_missing_methods_are_named_when_it_is_built(self, subject: Subject) -> None:
        """A class without one of the abstract methods raises `TypeError` when it is built."""
        assert_abstract_methods_are_missed(subject.storage, Storage)

    async def test_the_driver_is_imported_late(self, subject: Subject) -> None:
        """The driver is imported in `start`, not by importing or building the storage."""
        await assert_driver_comes_late(subject.storage, subject.driver)

    async def test_a_missing_driver_is_named(self, subject: Subject) -> None:
        """Without its driver, `start` raises an error of one line that names what is missing."""
        await assert_missing_driver_is_named(subject.storage, subject.driver)

    @pytest.mark.parametrize("method", optional_methods(Storage))
    async def test_unsupported_is_what_raises(self, rig: Rig, method: str) -> None:
        """A method raises `NotSupported` exactly when the guarantees list it."""
        storage = await rig.storage()
        call = optional_calls(storage)[method]
        await assert_declared(call, method, storage.guarantees.unsupported)

    async def test_it_is_closed_before_and_after(self, rig: Rig) -> None:
        """Before `start` and after `stop`, each call raises `Closed`. Stopping twice is allowed."""
        for storage in (rig.subject.storage.storage(), await rig.storage()):
            await storage.stop()
            await storage.stop()
            calls: dict[str, Call] = {
                "save": partial(storage.save, [rig.record("new")]),
                "get": partial(storage.get, [new_uuid()]),
                "inbox": storage.inbox,
                **optional_calls(storage),
            }
            await assert_closed(calls, storage.guarantees.unsupported)

    async def test_the_clock_is_the_servers(self, rig: Rig) -> None:
        """All instances read the same clock, which never goes back; or all return None."""
        one, other = await rig.storage(), await rig.storage()
        answers = [await part.clock() for part in (one, other, one)]
        times = [time for time in answers if time is not None]
        assert len(times) in (0, 3), "`clock` must always return a time, or always None"
        assert times == sorted(times), "`clock` went back: it must be the server's, not this host's"

    async def test_nothing_unknown_is_declared_unsupported(self, rig: Rig) -> None:
        """`guarantees.unsupported` names methods that may be refused: no needed ones, no others."""
        storage = await rig.storage()
        unknown = set(storage.guarantees.unsupported) - set(optional_methods(Storage))
        assert not unknown, f"{sorted(unknown)} are not methods that a storage may refuse"


def optional_calls(storage: Storage) -> dict[str, Call]:
    """Return a call of each optional method."""
    uuid = new_uuid()
    return {
        "query": partial(storage.query, TaskQuery()),
        "claim": partial(storage.claim, "key", "owner", 1.0),
        "release": partial(storage.release, Claim("key", "owner", 0.0)),
        "set": partial(storage.set, "key", b"value"),
        "get_value": partial(storage.get_value, "key"),
        "values": partial(storage.values, "k"),
        "watch_value": lambda: anext(storage.watch_value("key")),
        "append": partial(storage.append, uuid, [b"item"]),
        "read": partial(storage.read, uuid, 0),
        "delete": partial(storage.delete, [uuid]),
        "expire": storage.expire,
        "migrate": partial(storage.migrate, "kit"),
    }
