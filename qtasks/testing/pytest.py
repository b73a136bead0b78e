"""Fixtures for pytest: an isolated app, and throwaway servers.

# conftest.py in the root folder of your tests
import pytest
from shop.qtasks_app import app

pytest_plugins = ["qtasks.testing.pytest"]

@pytest.fixture
def qtasks_app():
    return app
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from qtasks.app import App, default_app
from qtasks.testing.errors import Unobtainable
from qtasks.testing.recipes import RECIPES
from qtasks.testing.servers import Servers
from qtasks.testing.testers import AsyncTester, SyncTester

_LOCAL = ("memory", "sqlite")


@pytest.fixture
def qtasks_app() -> App:
    """The app under test.

        @pytest.fixture
        def qtasks_app():
            return app

    Override this fixture, or set `QTASKS_APP=module:app`.
    """
    if not os.environ.get("QTASKS_APP"):
        pytest.fail(
            "which app is tested? Write a fixture `qtasks_app` that returns it in your conftest.py",
            pytrace=False,
        )
    return default_app()


@pytest.fixture
def qtasks_tester(
    qtasks_app: App, qtasks_url: str, qtasks_storage_url: str
) -> Iterator[AsyncTester]:
    """An `AsyncTester` of `qtasks_app`, for async tests.

        async def test_order(qtasks_tester):
            await place_order("tea")
            assert qtasks_tester.enqueued(send_mail)
            await qtasks_tester.drain()

    The broker and the storage are in memory, unless `qtasks_url` has a parameter.
    """
    with AsyncTester(qtasks_app, qtasks_url, qtasks_storage_url) as tester:
        yield tester


@pytest.fixture
def qtasks_sync_tester(
    qtasks_app: App, qtasks_url: str, qtasks_storage_url: str
) -> Iterator[SyncTester]:
    """A `SyncTester` of `qtasks_app`, for blocking tests.

        def test_order(qtasks_sync_tester):
            place_order("tea")
            assert qtasks_sync_tester.enqueued(send_mail)
            qtasks_sync_tester.drain()

    The broker and the storage are in memory, unless `qtasks_url` has a parameter.
    """
    with SyncTester(qtasks_app, qtasks_url, qtasks_storage_url) as tester:
        yield tester


@pytest.fixture
def qtasks_url(request: pytest.FixtureRequest) -> str:
    """The URL of the broker; without a parameter, that of a broker in memory.

        @pytest.mark.parametrize("qtasks_url", ["memory", "redis", "postgres"], indirect=True)

    A parameter is `memory`, `sqlite` (a file that is removed), `redis`, `postgres`, `rabbitmq`,
    `kafka`, or a URL. The server is started for the session: in a container, or else its installed
    program. If neither is possible, the test is skipped; with `CI=true` in the environment it
    fails.
    """
    return _url_of(getattr(request, "param", "memory"), request)


@pytest.fixture
def qtasks_storage_url(request: pytest.FixtureRequest, qtasks_url: str) -> str:
    """The URL of the storage; without a parameter, that of the broker. Parameters as there."""
    param = getattr(request, "param", None)
    return qtasks_url if param is None else _url_of(param, request)


@pytest.fixture(scope="session")
def qtasks_servers() -> Iterator[Servers]:
    """The servers of this test run. They are stopped at its end, and their data is removed."""
    servers = Servers()
    yield servers
    servers.stop()


def _url_of(name: str, request: pytest.FixtureRequest) -> str:
    if "://" in name:
        return name
    if name == "memory":
        return "memory://"
    if name == "sqlite":
        return f"sqlite:///{request.getfixturevalue('tmp_path') / 'qtasks.db'}"
    if name not in RECIPES:
        known = ", ".join([*_LOCAL, *RECIPES])
        pytest.fail(f"{request.fixturename}: {name!r} is none of {known}, and no URL", False)
    servers: Servers = request.getfixturevalue("qtasks_servers")
    try:
        return servers.url(name)
    except Unobtainable as error:
        in_ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
        if in_ci:
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
