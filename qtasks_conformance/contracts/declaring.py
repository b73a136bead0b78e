"""Checks that compare the declared guarantees with the pinned ones, and with what happens."""

from __future__ import annotations

import asyncio
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


NEEDED = (
    "guarantees", "start", "stop", "publish", "subscribe", "save", "get", "inbox"
)  # fmt: skip
"""What no worker and no client can do without, of a broker and of a storage."""


def optional_methods(contract: type) -> list[str]:
    """Return the methods that may raise `NotSupported`, because a transport cannot do them."""
    return sorted(contract.__abstractmethods__.difference(NEEDED))  # type: ignore[attr-defined]


def assert_at_least(guarantees: Guarantees, least: Least) -> None:
    """Fail if less is declared than is pinned."""
    assert guarantees.part, "`guarantees.part` is empty: give the name of the class"
    assert guarantees.durability, "`guarantees.durability` is empty: say what survives a crash"
    assert EVENTS.index(guarantees.survives) >= EVENTS.index(least.survives), (
        f"`survives` is {guarantees.survives!r}, which is less than the pinned {least.survives!r}"
    )
    assert ORDERS.index(guarantees.order) >= ORDERS.index(least.order), (
        f"`order` is {guarantees.order!r}, which is less than the pinned {least.order!r}"
    )
    for name in (
        "settle_confirmed", "counts_deliveries", "priorities", "transactions", "leases_survive",
        "atomic_retries",
    ):  # fmt: skip
        assert getattr(guarantees, name) >= getattr(least, name), (
            f"the guarantees declare {name}=False, but the subject pins {name}=True"
        )
    assert set(guarantees.unsupported) == set(least.lacks), (
        "`guarantees.unsupported` and `lacks` of the subject must list the same methods"
    )


def assert_abstract_methods_are_missed(part: Part, contract: type) -> None:
    """Remove each abstract method in turn from a subclass; it must refuse to be built."""
    for name in sorted(contract.__abstractmethods__):  # type: ignore[attr-defined]
        incomplete = type("Incomplete", (part.load(),), {name: getattr(contract, name)})
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            incomplete(**part.arguments)


async def assert_driver_comes_late(part: Part, driver: str | None) -> None:
    """Build the class in a new interpreter; fail if that imports the driver."""
    output = await output_of(_COMES_LATE, part, driver)
    assert output == "", (
        f"{driver} is imported before `start`: import the driver inside `start`, so that programs "
        "that do not use this backend do not need it"
    )


async def assert_missing_driver_is_named(part: Part, driver: str | None) -> None:
    """Start the class in an interpreter that cannot import the driver."""
    output = await output_of(_IS_MISSING, part, driver)
    assert output.count("\n") == 1, (
        f"without the module {driver}, `start` must raise `MissingDriver` with a message of one "
        f"line; the message was {output!r}"
    )


async def output_of(program: str, part: Part, driver: str | None) -> str:
    """Run a program in a new interpreter, and return its stdout."""
    if driver is None:
        pytest.skip("the subject has no `driver`")
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, encode(part).decode(), driver,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    output, _ = await child.communicate()
    return output.decode()


async def assert_closed(calls: Mapping[str, Call], unsupported: tuple[str, ...]) -> None:
    """Fail unless each supported call raises `Closed`. `migrate` is left out: it needs no start."""
    for method, call in calls.items():
        if method in (*unsupported, "migrate"):
            continue
        try:
            await call()
        except Closed:
            continue
        raise AssertionError(
            f"`{method}` worked before `start` or after `stop`; it must raise `Closed`"
        )


async def assert_declared(call: Call, method: str, unsupported: tuple[str, ...]) -> None:
    """Fail unless the call raises `NotSupported` exactly if the method is declared unsupported."""
    if method in unsupported:
        with pytest.raises(NotSupported):
            await call()
    else:
        await call()
