"""The dearer servers have their turn in the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEAR = ("kafka", "rabbitmq")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and any(server in item.name for server in DEAR):
            item.add_marker(pytest.mark.full)
