"""The servers as fixtures: started when a test first asks, once a run, and told of at its end."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from qtasks_core.urls import redact
from tests import unchanged
from tests.services import (
    SERVICES,
    NotInContainers,
    NotOurs,
    NotReady,
    Service,
    Unobtainable,
    in_containers,
)

collect_ignore = ["stranger"]
"""A package of its own, which tests/packaging installs and tests."""
VERIFIED = "has passed on what it looks at, which has not changed since: --full runs it"
# What became of each server that a test asked for, and in each process that started one of its own:
# name -> (how, version, URL or reason).
TOLD = pytest.StashKey[dict[str, list[tuple[str, str, str]]]]()


def in_ci() -> bool:
    """Tell whether a test that cannot run is a failure."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TOLD] = {}
    # Kafka lives for minutes here, so it compiles little: half the processor time of a start.
    os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    config.addinivalue_line("markers", "full: takes long; runs with --full only")
    config.addinivalue_line("markers", "native: looks at a server's processes on this machine")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell ignores Ctrl-C in what it runs in the background, and every child inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Return what deals out tests with `-n`."""
    from tests.dealing import Scheduling

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if in_containers():
        for item in items:
            if item.get_closest_marker("native"):
                item.add_marker(pytest.mark.skip(reason="looks at processes, not at containers"))
        return
    if not config.getoption("--full"):
        verified = tuple(unchanged.LOOK_AT.keys() - set(unchanged.changed()))
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes long: --full runs it"))
            elif item.nodeid.startswith(verified):
                item.add_marker(pytest.mark.skip(reason=VERIFIED))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """In containers, a test that needs a native server is skipped with that reason."""
    try:
        return (yield)
    except NotInContainers as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that would kill a server somebody else runs is skipped with that reason."""
    try:
        return (yield)
    except NotInContainers as error:
        pytest.skip(str(error))
    except NotOurs as error:
        if in_ci():
            raise
        pytest.skip(str(error))


def serve(config: pytest.Config, name: str, service: Service | None = None) -> Iterator[Service]:
    """Give the started server; what cannot be had skips its tests, in CI it fails them."""
    told, service = config.stash[TOLD], service or SERVICES[name]()
    try:
        service.start()
    except Unobtainable as error:
        told[name] = [("not had", "", str(error))]
        (pytest.fail if in_ci() else pytest.skip)(f"{name} cannot be had: {error}")
    except NotReady as error:
        told[name] = [("failed", "", str(error))]
        raise
    told[name] = [(service.how, service.version, redact(service.url))]
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="session")
def redis_server(pytestconfig: pytest.Config) -> Iterator[Service]:
    yield from serve(pytestconfig, "redis")


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> Iterator[Service]:
    yield from serve(pytestconfig, "postgres")


@pytest.fixture(scope="session")
def rabbitmq_server(pytestconfig: pytest.Config) -> Iterator[Service]:
    yield from serve(pytestconfig, "rabbitmq")


@pytest.fixture(scope="session")
def kafka_of_all(pytestconfig: pytest.Config) -> Iterator[Service]:
    yield from serve(pytestconfig, "kafka")


@pytest.fixture
def kafka_server(kafka_of_all: Service) -> Iterator[Service]:
    yield kafka_of_all
    kafka_of_all.clear()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what this process knows of its servers to the one that prints the table."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["servers"] = session.config.stash[TOLD]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a test process knew of its servers."""
    told = node.config.stash[TOLD]
    for name, rows in getattr(node, "workeroutput", {}).get("servers", {}).items():
        told.setdefault(name, []).extend(tuple(row) for row in rows)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("servers")
    for name in SERVICES | config.stash[TOLD]:
        rows = config.stash[TOLD].get(name, [("not asked for", "", "")])
        for (how, version, detail), count in Counter(
            (how, version, "" if how == "native" and len(rows) > 1 else detail)
            for how, version, detail in rows
        ).items():
            times = f"{count} times" if count > 1 else ""
            line = f"{name:10} {how:14} {version:10} {detail or times}"
            terminalreporter.write_line(line.rstrip())
