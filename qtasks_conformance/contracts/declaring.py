"""Comparing what a part declares with what is pinned and with what it does."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping

import pytest

from qtasks_conformance.commands import encode
from qtasks_conformance.subject import Least, Part
from qtasks_core import Guarantees
from qtasks_core.errors import Closed, NotSupported

Call = Callable[[], Awaitable[object]]

_COMES_LATE = """
import sys
from qtasks_conformance.commands import part_decoder
part_decoder.decode(sys.argv[1]).build().guarantees
if sys.argv[2] in sys.modules:
    print(sys.argv[2])
"""
_IS_MISSING = """
import asyncio, sys
from qtasks_conformance.commands import part_decoder
from qtasks_core.errors import ConfigurationError
sys.modules[sys.argv[2]] = None
try:
    asyncio.run(part_decoder.decode(sys.argv[1]).build().start("kit"))
except ConfigurationError as error:
    print(error)
"""

EVENTS = ("nothing", "client crash", "server crash", "machine crash")
ORDERS = ("none", "partition", "queue")


def optional_methods(contract: type) -> list[str]:
    """Return the methods a part may leave out: those that raise `NotSupported` by themselves."""
    return [
        name
        for name, _ in inspect.getmembers(contract, inspect.isfunction)
        if not name.startswith("_")
        and name not in contract.__abstractmethods__  # type: ignore[attr-defined]
        and name not in ("clock", "join")
    ]


def assert_at_least(guarantees: Guarantees, least: Least) -> None:
    """Fail when less is declared than is pinned."""
    assert guarantees.part
    assert guarantees.durability
    assert EVENTS.index(guarantees.survives) >= EVENTS.index(least.survives)
    assert ORDERS.index(guarantees.order) >= ORDERS.index(least.order)
    for name in (
        "settle_confirmed", "counts_deliveries", "priorities", "transactions", "leases_survive",
        "atomic_retries",
    ):  # fmt: skip
        assert getattr(guarantees, name) >= getattr(least, name), name
    assert set(guarantees.unsupported) == set(least.lacks)


def assert_abstract_methods_are_missed(part: Part, contract: type) -> None:
    """Take each abstract method away from the part's class in turn, and try to build it."""
    for name in sorted(contract.__abstractmethods__):  # type: ignore[attr-defined]
        incomplete = type("Incomplete", (part.load(),), {name: getattr(contract, name)})
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            incomplete(**part.arguments)


async def assert_driver_comes_late(part: Part, driver: str | None) -> None:
    """Build the part in an interpreter of its own and look for the driver."""
    told = await told_by(_COMES_LATE, part, driver)
    assert told == "", f"{driver} is imported before `start`"


async def assert_missing_driver_is_named(part: Part, driver: str | None) -> None:
    """Start the part in an interpreter that cannot import the driver."""
    told = await told_by(_IS_MISSING, part, driver)
    assert told.count("\n") == 1, f"`start` without {driver} is no `MissingDriver` of one line"


async def told_by(program: str, part: Part, driver: str | None) -> str:
    """Run a program in an interpreter of its own, and return what it writes."""
    if driver is None:
        pytest.skip("it has no driver")
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, encode(part).decode(), driver,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    told, _ = await child.communicate()
    return told.decode()


async def assert_closed(calls: Mapping[str, Call], unsupported: tuple[str, ...]) -> None:
    """Fail unless each call that is supported raises `Closed`; `migrate` needs no `start`."""
    for method, call in calls.items():
        if method in (*unsupported, "migrate"):
            continue
        try:
            await call()
        except Closed:
            continue
        raise AssertionError(f"`{method}` is not closed")


async def assert_declared(call: Call, method: str, unsupported: tuple[str, ...]) -> None:
    """Fail unless the call raises `NotSupported` exactly when it is declared to."""
    if method in unsupported:
        with pytest.raises(NotSupported):
            await call()
    else:
        await call()
