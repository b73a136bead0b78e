"""Where the processes of a test find their parts, and a worker that runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.pairs import pair_of
from tests.processes import Process


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Which backend; tests that ask for others are parametrized indirectly."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture
def environment(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> dict[str, str]:
    return {
        **pair_of(request, backend, tmp_path).environment,
        "QTASKS_NAME": f"faces-{uuid4().hex[:8]}",
    }


@pytest.fixture
def worker_process(environment: dict[str, str]) -> Iterator[Process]:
    with Process("-m", "tests.faces.sums", environment=environment) as process:
        process.wait_for("knows")
        yield process
