from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.processes import Process


@pytest.fixture
def qtasks(tmp_path: Path) -> Command:
    """The command on an empty file."""
    return Command({"QTASKS_BROKER_URL": f"sqlite:///{tmp_path}/qtasks.db"})


@pytest.fixture
def worker(qtasks: Command) -> Iterator[Process]:
    """A worker of the same app that runs beside."""
    with qtasks.run() as process:
        process.wait_for("knows add")
        yield process
        assert process.terminate() == 0
