from __future__ import annotations

import pytest

from tests.testing import shop


@pytest.fixture(autouse=True)
def _fresh_lists() -> None:
    shop.sent.clear()
    shop.threads.clear()
