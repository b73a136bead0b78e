from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.cli.places import empty_place
from tests.processes import Process

BACKENDS = ("sqlite", "postgres")
"""The backends on which these tests run."""


@pytest.fixture(params=BACKENDS)
def qtasks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Command]:
    """The command on an empty file or database of each backend."""
    with empty_place(request, request.param, tmp_path) as url:
        yield Command({"QTASKS_BROKER_URL": url})


@pytest.fixture
def worker(qtasks: Command) -> Iterator[Process]:
    """A worker of the same app that runs beside."""
    with qtasks.run() as process:
        process.wait_for("knows add")
        yield process
        assert process.terminate() == 0
