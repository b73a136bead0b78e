from __future__ import annotations

from pathlib import Path

import pytest

from tests.life.setting import Setting
from tests.pairs import pair_of


@pytest.fixture
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(pair_of(request, getattr(request, "param", "sqlite"), tmp_path))
