"""A server that a test has frozen is thawed, whatever becomes of the test."""

from __future__ import annotations

import asyncio

import pytest

from qtasks_conformance import Part, Server, Subject
from qtasks_conformance.contracts.freezing import assert_unavailable, freezable, frozen, never
from qtasks_conformance.rig import Rig
from qtasks_core.errors import Unavailable
from tests.kit.served import FlagServer


class Unfreezable:
    """A server that can be killed, but not frozen."""

    def kill(self) -> None: ...

    def restart(self) -> None: ...


def rig_on(server: Server | Unfreezable | None) -> Rig:
    part = Part("qtasks_memory:MemoryStorage")
    return Rig(Subject(broker=part, storage=part, lease=1.0, server=server))  # type: ignore[arg-type]


async def test_it_is_thawed_when_the_test_fails() -> None:
    server = FlagServer()

    async def fail() -> None:
        async with frozen(server):
            assert server.frozen
            raise AssertionError("the test")

    with pytest.raises(AssertionError, match="the test"):
        await fail()
    assert not server.frozen


async def test_it_is_thawed_when_the_test_is_cancelled() -> None:
    server, inside = FlagServer(), asyncio.Event()

    async def hang() -> None:
        async with frozen(server):
            inside.set()
            await asyncio.Event().wait()

    hanging = asyncio.create_task(hang())
    await inside.wait()
    hanging.cancel()
    await asyncio.wait({hanging})
    assert hanging.cancelled()
    assert not server.frozen


async def test_it_is_thawed_when_it_could_not_be_frozen_whole() -> None:
    class Half(FlagServer):
        def freeze(self) -> None:
            super().freeze()
            raise OSError("one process is left")

    server = Half()
    with pytest.raises(OSError, match="one process"):
        await frozen(server).__aenter__()
    assert not server.frozen


@pytest.mark.parametrize("server", [None, Unfreezable()])
def test_without_a_server_to_freeze_the_test_is_skipped(server: Unfreezable | None) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no server|cannot be frozen"):
        freezable(rig_on(server))


async def test_each_wrong_call_is_named() -> None:
    async def lie() -> str:
        return "done"

    async def fail() -> None:
        raise OSError("broken")

    async def give_up() -> None:
        raise Unavailable("no answer")

    calls = {"publish": (lie, never), "extend": (fail, never), "start": (give_up, never)}
    with pytest.raises(AssertionError) as told:
        await assert_unavailable(calls)
    assert "publish answered 'done'" in str(told.value)
    assert "extend raised OSError('broken')" in str(told.value)
    assert "start" not in str(told.value)
