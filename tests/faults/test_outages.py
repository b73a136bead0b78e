"""Servers that stop, are killed or freeze while four clients publish and two workers work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.crash import Setting
from tests.faults.load import loaded
from tests.pairs import SERVERS, pair_of
from tests.services import Service

SHORT = {"shut_down": 0.5, "kill": 0.5, "freeze": 3.0}
"""What happens to a server, one after the other, and for how many seconds it is away."""
LONG = [*SHORT.items(), ("shut_down", 5.0), ("kill", 15.0), ("freeze", 10.0), ("freeze", 30.0)]
LONG_LEASE = 60.0
"""Seconds: a worker keeps its tasks for so long, even on a machine that hardly runs it."""
STORAGES_AWAY = ["kafka+postgres", "rabbitmq+redis", "redis+postgres", "postgres+redis"]


@asynccontextmanager
async def away(server: Service, how: str) -> AsyncIterator[None]:
    """Let the server be away for the block."""
    await asyncio.to_thread(getattr(server, how))
    try:
        yield
    finally:
        await asyncio.to_thread(server.thaw if how == "freeze" else server.restart)


@pytest.fixture
def setting(request: pytest.FixtureRequest, pair: str, tmp_path: Path) -> Setting:
    lease = LONG_LEASE if "+" in pair else None
    return Setting(pair_of(request, pair, tmp_path, lease), tmp_path)


def server_of(request: pytest.FixtureRequest, pair: str) -> Service:
    """Return the server of the pair's storage."""
    server: Service = request.getfixturevalue(f"{pair.rpartition('+')[2]}_server")
    return server


@pytest.mark.parametrize("pair", SERVERS)
async def test_a_server_that_goes_and_comes_back(
    request: pytest.FixtureRequest, setting: Setting, pair: str
) -> None:
    server = server_of(request, pair)
    async with loaded(setting) as load:
        for how, seconds in SHORT.items():
            async with away(server, how):
                await asyncio.sleep(seconds)
            await load.goes_on()


@pytest.mark.parametrize("pair", STORAGES_AWAY[:2])
async def test_a_storage_that_goes_and_comes_back(
    request: pytest.FixtureRequest, setting: Setting, pair: str
) -> None:
    """The broker lives on, so the workers keep their leases and no task runs twice."""
    server = server_of(request, pair)
    async with loaded(setting, runs=1) as load:
        for how, seconds in (("kill", 1.0), ("freeze", 3.0)):
            async with away(server, how):
                await asyncio.sleep(seconds)
            await load.goes_on()


@pytest.mark.full
@pytest.mark.parametrize("pair", SERVERS)
@pytest.mark.parametrize("turn", range(2))
async def test_a_server_that_is_away_for_longer(
    request: pytest.FixtureRequest, setting: Setting, pair: str, turn: int
) -> None:
    server = server_of(request, pair)
    async with loaded(setting) as load:
        for how, seconds in LONG:
            async with away(server, how):
                await asyncio.sleep(seconds)
            await load.goes_on()


@pytest.mark.full
@pytest.mark.parametrize("pair", STORAGES_AWAY)
@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_a_storage_that_is_away_for_longer(
    request: pytest.FixtureRequest, setting: Setting, pair: str, how: str
) -> None:
    server = server_of(request, pair)
    async with loaded(setting, runs=1) as load:
        for seconds in (3.0, 10.0, 30.0):
            async with away(server, how):
                await asyncio.sleep(seconds)
            await load.goes_on()
