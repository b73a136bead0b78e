"""A broker declares true guarantees, and no less than the subject pins."""

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
    """The guarantees of a broker, its optional methods, its driver, and its start and stop."""

    async def test_guarantees_are_no_less_than_pinned(self, rig: Rig) -> None:
        """A broker declares at least what `least_broker` pins; its lease is at most the subject's.

        Otherwise a broker could pass more tests by declaring less.
        """
        broker = await rig.broker()
        assert_at_least(broker.guarantees, rig.subject.least_broker)
        lease = broker.guarantees.lease
        assert lease is not None, "`guarantees.lease` is None: a broker must state its lease"
        assert 0 < lease <= rig.subject.lease, "the declared lease is longer than the subject's"

    async def test_missing_methods_are_named_when_it_is_built(self, subject: Subject) -> None:
        """A class without one of the abstract methods raises `TypeError` when it is built."""
        assert_abstract_methods_are_missed(subject.broker, Broker)

    async def test_the_driver_is_imported_late(self, subject: Subject) -> None:
        """The driver is imported in `start`, not by importing or building the broker."""
        await assert_driver_comes_late(subject.broker, subject.driver)

    async def test_a_missing_driver_is_named(self, subject: Subject) -> None:
        """Without its driver, `start` raises an error of one line that names what is missing."""
        await assert_missing_driver_is_named(subject.broker, subject.driver)

    @pytest.mark.parametrize("method", optional_methods(Broker))
    async def test_unsupported_is_what_raises(self, rig: Rig, method: str) -> None:
        """A method raises `NotSupported` exactly when the guarantees list it."""
        broker = await rig.broker()
        call = optional_calls(broker)[method]
        await assert_declared(call, method, broker.guarantees.unsupported)

    async def test_it_is_closed_before_and_after(self, rig: Rig) -> None:
        """Before `start` and after `stop`, each call raises `Closed`. Stopping twice is allowed."""
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
        """All instances read the same clock, which never goes back; or all return None."""
        one, other = await rig.broker(), await rig.broker()
        answers = [await part.clock() for part in (one, other, one)]
        times = [time for time in answers if time is not None]
        assert len(times) in (0, 3), "`clock` must always return a time, or always None"
        assert times == sorted(times), "`clock` went back: it must be the server's, not this host's"

    async def test_nothing_unknown_is_declared_unsupported(self, rig: Rig) -> None:
        """`guarantees.unsupported` names methods that may be refused: no needed ones, no others."""
        broker = await rig.broker()
        unknown = set(broker.guarantees.unsupported) - set(optional_methods(Broker))
        assert not unknown, f"{sorted(unknown)} are not methods that a broker may refuse"


def optional_calls(broker: Broker) -> dict[str, Call]:
    """Return a call of each optional method."""
    return {
        "depth": partial(broker.depth, "q"),
        "purge": partial(broker.purge, "q"),
        "broadcast": partial(broker.broadcast, Command(name="ping")),
        "commands": lambda: first_command(broker.commands()),
        "migrate": partial(broker.migrate, "kit"),
    }


async def first_command(commands: AsyncIterator[Command]) -> None:
    """Listen for a moment. No command need come."""
    try:
        async with asyncio.timeout(0.2):
            await anext(commands)
    except TimeoutError:
        return
