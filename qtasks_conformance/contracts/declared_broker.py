"""A broker is what its guarantees say, and no less than what is pinned for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
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
from qtasks_conformance.rig import Rig
from qtasks_conformance.subject import Subject
from qtasks_core import Broker, Command


class DeclaredBrokerContract(Contract):
    """The guarantees of a broker, and the methods that it may leave out."""

    async def test_guarantees_are_no_less_than_pinned(self, rig: Rig) -> None:
        """Each backend's least guarantees are pinned, so that declaring less passes no more."""
        broker = await rig.broker()
        assert_at_least(broker.guarantees, rig.subject.least_broker)
        lease = broker.guarantees.lease
        assert lease is not None, "a broker states its lease"
        assert 0 < lease <= rig.subject.lease

    async def test_missing_methods_are_named_when_it_is_built(self, subject: Subject) -> None:
        """A class that leaves out an abstract method fails when it is built, naming it."""
        assert_abstract_methods_are_missed(subject.broker, Broker)

    async def test_the_driver_is_imported_late(self, subject: Subject) -> None:
        """Importing and building it, and asking for its guarantees, imports no driver."""
        await assert_driver_comes_late(subject.broker, subject.driver)

    async def test_a_missing_driver_is_named(self, subject: Subject) -> None:
        """Without its driver `start` says in one line what is missing."""
        await assert_missing_driver_is_named(subject.broker, subject.driver)

    @pytest.mark.parametrize("method", optional_methods(Broker))
    async def test_unsupported_is_what_raises(self, rig: Rig, method: str) -> None:
        """A method raises `NotSupported` exactly when the guarantees list it."""
        broker = await rig.broker()
        call = optional_calls(broker)[method]
        await assert_declared(call, method, broker.guarantees.unsupported)

    async def test_it_is_closed_before_and_after(self, rig: Rig) -> None:
        """Before `start` and after `stop` each call raises `Closed`; stopping twice is harmless."""
        for broker in (rig.subject.broker.broker(), await rig.broker()):
            await broker.stop()
            await broker.stop()
            calls: dict[str, Call] = {
                "publish": partial(broker.publish, [rig.message()]),
                "subscribe": partial(broker.subscribe, {"q": 1}),
                **optional_calls(broker),
            }
            await assert_closed(calls, broker.guarantees.unsupported)

    async def test_the_clock_is_the_servers(self, rig: Rig) -> None:
        """Whoever asks hears one time, which goes on; or nobody is told any."""
        one, other = await rig.broker(), await rig.broker()
        told = [await part.clock() for part in (one, other, one)]
        times = [time for time in told if time is not None]
        assert len(times) in (0, 3)
        assert times == sorted(times)

    async def test_nothing_unknown_is_declared_unsupported(self, rig: Rig) -> None:
        """What is abstract cannot be left out, and what does not exist is a slip of the pen."""
        broker = await rig.broker()
        assert set(broker.guarantees.unsupported) <= set(optional_methods(Broker))


def optional_calls(broker: Broker) -> dict[str, Call]:
    """Return a call of each method that a broker may leave out."""
    return {
        "depth": partial(broker.depth, "q"),
        "purge": partial(broker.purge, "q"),
        "broadcast": partial(broker.broadcast, Command(name="ping")),
        "commands": lambda: first_command(broker.commands()),
        "migrate": partial(broker.migrate, "kit"),
    }


async def first_command(commands: AsyncIterator[Command]) -> None:
    """Listen for a moment: that nothing comes is fine."""
    try:
        async with asyncio.timeout(0.2):
            await anext(commands)
    except TimeoutError:
        return
