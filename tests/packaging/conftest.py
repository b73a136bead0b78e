"""The wheel is built once a run; environments that several tests use are made once too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.installed import Installation, build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installation:
    """The wheel without any extra."""
    return Installation(tmp_path_factory.mktemp("bare"), wheel)
