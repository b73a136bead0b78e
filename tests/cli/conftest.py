from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.cli.command import Command
from tests.pairs import url_of
from tests.processes import Process

BACKENDS = (
    "sqlite",
    "redis",
    "postgres",
)
"""The backends on which the modules below run."""
ON_ALL = ("test_cancel", "test_queues", "test_tasks")
"""The modules whose commands read and change what a broker and a storage keep."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of these modules on each backend, unless it names its own."""
    module = metafunc.module.__name__.rpartition(".")[2]
    named = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "qtasks" in metafunc.fixturenames and module in ON_ALL and "qtasks" not in named:
        metafunc.parametrize("qtasks", BACKENDS, indirect=True)


@pytest.fixture
def qtasks(request: pytest.FixtureRequest, tmp_path: Path) -> Command:
    """The command on an empty file, or on a server under an unused name."""
    backend = getattr(request, "param", "sqlite")
    name = "qtasks" if backend == "sqlite" else f"cli-{uuid4().hex[:8]}"
    url = url_of(request, backend, tmp_path)
    return Command({"QTASKS_BROKER_URL": url, "QTASKS_NAME": name})


@pytest.fixture
def worker(qtasks: Command) -> Iterator[Process]:
    """A worker of the same app that runs beside."""
    with qtasks.run() as process:
        process.wait_for("knows add")
        yield process
        assert process.terminate() == 0
