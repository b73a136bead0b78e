"""The wheel in clean environments: alone, and with each extra alone on its real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.packaging.installed import Installation
from tests.packaging.test_wheel import PACKAGES, PROJECT
from tests.services import Service

ONE_TASK = str(Path(__file__).with_name("one_task.py"))
DRIVERS = {"redis": "redis", "rabbitmq": "aio-pika", "kafka": "aiokafka", "postgres": "asyncpg"}


def check_one_task(installation: Installation, url: str, storage: str = "") -> None:
    """Run a client and a worker in one process; without a storage on both halves of a backend."""
    environment = {"QTASKS_BROKER_URL": url, "QTASKS_STORAGE_URL": storage}
    said = installation.output(ONE_TASK, environment=environment)
    status, result, file = said.split()
    assert (status, result) == ("success", "3")
    assert file.startswith(str(installation.directory)), "another copy was imported"


def test_alone_it_needs_three_packages(bare: Installation) -> None:
    assert bare.packages() == {"qtasks", "click", "msgspec", "uuid_utils"}


def test_every_package_but_the_kit_imports_without_an_extra(bare: Installation) -> None:
    names = sorted(PACKAGES - {"qtasks_conformance"})
    bare.output("-c", f"import {', '.join(names)}; from qtasks import *")


def test_the_command_is_there(bare: Installation) -> None:
    environment = {"QTASKS_BROKER_URL": f"sqlite:///{bare.directory}/command.db"}
    for command in ([str(bare.directory / "bin" / "qtasks")], ["-m", "qtasks"]):
        said = json.loads(bare.output(*command, "guarantees", "--json", environment=environment))
        assert said["broker"]["part"] == "SqliteBroker"


def test_memory_and_sqlite_need_no_extra(bare: Installation) -> None:
    check_one_task(bare, "memory://")
    check_one_task(bare, f"sqlite:///{bare.directory}/qtasks.db")


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("redis://127.0.0.1:1/0", "redis"),
        ("amqp://127.0.0.1:1", "rabbitmq"),
        ("kafka://127.0.0.1:1", "kafka"),
        ("postgresql://127.0.0.1:1/x", "postgres"),
    ],
)
def test_a_missing_driver_is_one_line_that_names_the_extra(
    bare: Installation, url: str, extra: str
) -> None:
    done = bare.run(ONE_TASK, environment={"QTASKS_BROKER_URL": url})
    assert done.returncode != 0
    scheme = url.partition(":")[0]
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"qtasks_core.errors.MissingDriver: {scheme}:// needs its driver: "
        f"pip install '.[{extra}]' in the checkout"
    )


@pytest.mark.parametrize("extra", DRIVERS)
def test_each_extra_alone_runs_a_task_on_its_server(
    extra: str, wheel: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    service: Service = request.getfixturevalue(f"{extra}_server")
    installation = Installation(tmp_path / "environment", wheel, extra)
    packages = installation.packages()
    assert DRIVERS[extra] in packages
    assert not packages & (set(DRIVERS.values()) - {DRIVERS[extra]})
    check_one_task(installation, service.url)


def test_no_extra_is_left_out() -> None:
    """`dev` is for this checkout; the others are installed here one by one."""
    assert {*DRIVERS, "all", "conformance", "dev", "testing"} == {
        *PROJECT["project"]["optional-dependencies"]
    }


def test_all_of_them_in_one_environment(
    wheel: Path, tmp_path: Path, kafka_server: Service, postgres_server: Service
) -> None:
    installation = Installation(tmp_path / "environment", wheel, "all")
    assert installation.packages() >= set(DRIVERS.values())
    check_one_task(installation, kafka_server.url, postgres_server.url)


def test_with_its_extra_a_test_of_an_app_runs(wheel: Path, tmp_path: Path) -> None:
    installation = Installation(tmp_path / "environment", wheel, "testing")
    (installation.directory / "conftest.py").write_text(FIXTURES)
    (installation.directory / "test_app.py").write_text(TEST)
    said = installation.output("-m", "pytest", "-q", "test_app.py")
    assert "1 passed" in said


def test_with_its_extra_the_kit_imports_and_runs(wheel: Path, tmp_path: Path) -> None:
    installation = Installation(tmp_path / "environment", wheel, "conformance")
    (installation.directory / "test_memory.py").write_text(KIT)
    said = installation.output("-m", "pytest", "-q", "-k", "settling_again", "test_memory.py")
    assert "1 passed" in said


FIXTURES = """
import pytest
from qtasks import QueueTasks

pytest_plugins = ["qtasks.testing.pytest"]

@pytest.fixture(scope="session")
def qtasks_app():
    return QueueTasks("installed", "redis://127.0.0.1:1")
"""
TEST = """
def test_it(qtasks_app, qtasks_sync_tester):
    @qtasks_app.task()
    def add(x, y):
        return x + y

    add.add_task(1, 2)
    [done] = qtasks_sync_tester.drain()
    assert done.returning == 3
"""
KIT = """
import pytest
from qtasks_conformance import BrokerContract, Part, Subject

@pytest.fixture
def subject():
    return Subject(
        broker=Part("qtasks_memory:MemoryBroker", {"lease": 1.0}),
        storage=Part("qtasks_memory:MemoryStorage"),
        lease=1.0,
        ends_with_process=True,
    )

class TestMemory(BrokerContract): ...
"""
